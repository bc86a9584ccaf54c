"""How the styles of the stories' solutions fare after a supervised warm-up.

    python experiments/two_styles.py --solutions 384 --learning-rate 5e-5

Samples of training prompts (8 each) and greedy completions of held-out ones, by style: how many are
worked out, and how many of each style are right.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from rich.console import Console
from torch import nn

from proxstep.config.loading import resolve
from proxstep.rewards import stated_answer
from proxstep.tasks import Example, stories_task
from proxstep.training.generation import sample
from proxstep.training.models import load_model, load_tokenizer, quiet_transformers
from proxstep.training.prompts import encode_prompt
from proxstep.training.source import model_source

FIRST_ROW = 50_000
"""Of the training prompts that are sampled."""


def styles(
    model: nn.Module, tokenizer: object, examples: list[Example], copies: int, *, greedy: bool
) -> dict[str, float]:
    """Return the share of worked completions, and of right ones by style."""
    repeated = [example for example in examples for _ in range(copies)]
    prompts = [encode_prompt(tokenizer, example.prompt) for example in repeated]
    made = sample(model, tokenizer, prompts, max_new_tokens=60, greedy=greedy)
    texts, cut = made.texts(tokenizer), made.truncated_B.tolist()
    right = stated_answer(prompts, texts, [e.answer for e in repeated], truncated=cut)
    found: dict[str, list[float]] = {"worked": [], "terse": []}
    for text, reward in zip(texts, right, strict=True):
        found["worked" if "=" in text else "terse"].append(reward)
    return {
        "right": sum(right) / len(right),
        "share_worked": len(found["worked"]) / len(texts),
        **{
            f"right_if_{style}": sum(rewards) / len(rewards) if rewards else float("nan")
            for style, rewards in found.items()
        },
    }


def main() -> None:
    """Warm up, sample, print."""
    console = Console()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--solutions", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    quiet_transformers()
    model_keys = {
        "name": arguments.model,
        "warmup_solutions": arguments.solutions,
        "warmup_learning_rate": arguments.learning_rate,
    }
    changes = {"model": model_keys, "task": {"name": "stories"}}
    recipe = resolve({"algorithm": "reinforce"}, changes, "two_styles.py")
    source = model_source(recipe, console.print)
    tokenizer, model = load_tokenizer(source), load_model(source, "float32", torch.device("cpu"))
    task, start = stories_task(arguments.prompts), time.process_time()
    torch.manual_seed(0)
    rows = [task.train[FIRST_ROW + i] for i in range(arguments.prompts)]
    console.print(json.dumps({"sampled": styles(model, tokenizer, rows, 8, greedy=False)}))
    held_out = list(task.validation)
    console.print(json.dumps({"greedy": styles(model, tokenizer, held_out, 1, greedy=True)}))
    console.print(f"{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()

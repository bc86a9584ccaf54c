"""Train a step of each algorithm, and print what the estimate and the system say of its memory.

    python -m tests.training.memory_case FOLDER ALGORITHM...

Each in a fork, whose peak is its own, so that the imports are paid for once.

A vocabulary of 40,000 on a hidden size of 64: logits dominate, as they do in language models. With
":autocast" after the algorithm, under autocast and wide layers instead: the weights dominate.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tests.engine import Silent, spread_reward, tiny_recipe
from transformers import Qwen3Config, Qwen3ForCausalLM

from proxstep.config.recipe import Recipe
from proxstep.training import lifecycle
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.memory import config_of, estimate_memory


def resident(name: str) -> int:
    """Return VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


LOGITS = {"vocab_size": 40_000, "hidden_size": 64}
WEIGHTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}


def save_model(folder: Path, sizes: dict[str, int]) -> None:
    """Write an untrained model with a size of its own, and the embedded tokenizer."""
    tokenizer, small = build_embedded_model()
    config = Qwen3Config(**{**small.config.to_dict(), **sizes, "layer_types": None})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def case(folder: Path, name: str) -> Recipe:
    """Return the recipe of a name on the command line."""
    algorithm, _, autocast = name.partition(":")
    own: dict[str, Any] = {"model": {"name": str(folder.parent / "logits")}}
    own["rollout"] = {"num_prompts": 2, "num_generations": 8, "max_completion_length": 32}
    own["evaluation"] = {"every": 2, "num_probe_prompts": 4}
    if autocast:
        own["model"] = {"name": str(folder.parent / "weights"), "autocast": "bfloat16"}
        own["rollout"] = {"num_prompts": 2, "num_generations": 2, "max_completion_length": 8}
        own["update"] = {"microbatch_size": 1}
        own["optimizer"] = {"name": "sgd", "learning_rate": 1e-3}
        own["evaluation"] = {"every": 2, "num_probe_prompts": 2, "kl_policy_initial": False}
    task = {"max_prompt_length": 8, **spread_reward(folder)}
    return tiny_recipe(folder / "run", algorithm, steps=1, task=task, **own)


def measure(folder: Path, name: str) -> str:
    """Return the estimate and the peak beyond what was there before, in a process of its own."""
    folder.mkdir()
    lifecycle.train(tiny_recipe(folder / "first", name.partition(":")[0], steps=1), Silent())
    recipe = case(folder, name)
    before = resident("VmRSS")
    estimate = estimate_memory(recipe, config_of(recipe))
    lifecycle.train(recipe, Silent())
    sys.stderr.write("\n".join([name, *estimate.lines(), ""]))
    return f"{name} {estimate.peak} {resident('VmHWM') - before}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = Path(sys.argv[1])
    save_model(folder / "logits", LOGITS)
    save_model(folder / "weights", WEIGHTS)
    lifecycle.train(tiny_recipe(folder / "imports", "isopo", steps=1), Silent())
    for name in sys.argv[2:]:
        if os.fork():
            os.wait()
            continue
        try:
            os.write(1, measure(folder / name, name).encode())
        finally:
            os._exit(0)

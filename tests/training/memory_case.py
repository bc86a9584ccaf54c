"""Train a step in a process of its own, and print what the estimate and the system say of memory.

    python -m tests.training.memory_case FOLDER ALGORITHM

A vocabulary of 40,000 on a hidden size of 64: logits dominate, as they do in language models.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.engine import Silent, tiny_recipe
from transformers import Qwen3ForCausalLM

from proxstep.training import lifecycle
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.memory import config_of, estimate_memory


def resident(name: str) -> int:
    """Return VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def save_model(folder: Path) -> None:
    """Write an untrained model with a large vocabulary, and the embedded tokenizer."""
    tokenizer, small = build_embedded_model()
    config = small.config
    config.vocab_size, config.hidden_size = 40_000, 64
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    folder, algorithm = Path(sys.argv[1]), sys.argv[2]
    lifecycle.train(tiny_recipe(folder / "first", algorithm, steps=1), Silent())
    recipe = tiny_recipe(
        folder / "run",
        algorithm,
        steps=1,
        model={"name": str(folder / "model")},
        task={"max_prompt_length": 8},
        rollout={"num_prompts": 2, "num_generations": 8, "max_completion_length": 32},
        evaluation={"every": 2, "num_probe_prompts": 4},
    )
    save_model(folder / "model")
    before = resident("VmRSS")
    estimate = estimate_memory(recipe, config_of(recipe))
    lifecycle.train(recipe, Silent())
    sys.stdout.write(f"{estimate.peak} {resident('VmHWM') - before}\n")
    sys.stderr.write("\n".join(estimate.lines()) + "\n")

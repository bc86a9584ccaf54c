"""Train a step of each algorithm, and print what the estimate and the system say of its memory.

    python -m tests.training.memory_case FOLDER ALGORITHM...

Each in a fork, whose peak is its own, so that the imports are paid for once.

A vocabulary of 40,000 on a hidden size of 64: logits dominate, as they do in language models.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
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


def measure(folder: Path, algorithm: str) -> str:
    """Return the estimate and the peak beyond what was there before, in a process of its own."""
    lifecycle.train(tiny_recipe(folder / "first", algorithm, steps=1), Silent())
    recipe = tiny_recipe(
        folder / "run",
        algorithm,
        steps=1,
        model={"name": str(folder.parent / "model")},
        task={"max_prompt_length": 8},
        rollout={"num_prompts": 2, "num_generations": 8, "max_completion_length": 32},
        evaluation={"every": 2, "num_probe_prompts": 4},
    )
    before = resident("VmRSS")
    estimate = estimate_memory(recipe, config_of(recipe))
    lifecycle.train(recipe, Silent())
    sys.stderr.write("\n".join([algorithm, *estimate.lines(), ""]))
    return f"{algorithm} {estimate.peak} {resident('VmHWM') - before}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = Path(sys.argv[1])
    save_model(folder / "model")
    lifecycle.train(tiny_recipe(folder / "imports", "isopo", steps=1), Silent())
    for algorithm in sys.argv[2:]:
        if os.fork():
            os.wait()
            continue
        try:
            os.write(1, measure(folder / algorithm, algorithm).encode())
        finally:
            os._exit(0)

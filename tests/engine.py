"""A tiny local engine for tests: the embedded model without warm-up, few prompts and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxstep.config import Recipe
from proxstep.recipes import resolve


class Silent:
    """Nobody watches."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def begin(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def note(self, text: str) -> None:
        pass

    def record(self, record: Any) -> None:
        self.records.append(dict(record))


def tiny_recipe(folder: Path, algorithm: str = "reinforce", **changes: Any) -> Recipe:
    data = {
        "algorithm": algorithm,
        "steps": 3,
        "output_dir": str(folder),
        "model": {"name": "embedded", "warmup_score": 0.0},
        "task": {"name": "arithmetic", "difficulty": 1, "num_validation": 6},
        "rollout": {"num_prompts": 4, "num_generations": 4, "max_completion_length": 3},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"every": 2, "num_probe_prompts": 3},
    }
    return resolve(data, changes, "test")

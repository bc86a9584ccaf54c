"""A tiny local engine for tests: the embedded model without warm-up, few prompts and tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proxstep.config.loading import resolve
from proxstep.config.recipe import Recipe
from proxstep.rewards import RewardFunction
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.runs.folder import RunFolder
from proxstep.runs.waiting import Wait
from proxstep.training import lifecycle
from proxstep.training.batch import Batch, collect
from proxstep.training.prompts import Prompts
from proxstep.training.trainer import Trainer


class Silent:
    """Shows nothing, and keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.waits: list[str] = []
        self.records: list[dict[str, Any]] = []

    def begin(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def wait(self, what: str, *args: Any, **keywords: Any) -> Iterator[Wait]:
        self.waits.append(what)
        yield Wait(what)

    def record(self, record: Any) -> None:
        self.records.append(dict(record))


def assert_same_records(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Two runs' records are equal to the bit, times left out."""
    for r, s in zip(first, second, strict=True):
        for name in r:
            if not name.startswith(("seconds", "elapsed")):
                assert r[name] == s[name], (r["step"], name)


class Killed(Exception):
    """What ends a run that `kill_at` kills."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run end by `Killed` once it has trained a step, before that is written down."""
    train_step = Trainer._train_step

    def killed(self: Trainer) -> dict[str, Any]:
        record = train_step(self)
        if self.step == step:
            raise Killed
        return record

    monkeypatch.setattr(Trainer, "_train_step", killed)


def tiny_recipe(folder: Path, algorithm: str = "reinforce", **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "algorithm": algorithm,
        "steps": 3,
        "output_dir": str(folder),
        "model": {"name": "embedded", "warmup_score": 0.0},
        "task": {"name": "arithmetic", "difficulty": 1, "num_validation": 6},
        "rollout": {"num_prompts": 4, "num_generations": 4, "max_completion_length": 3},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"every": 2, "num_probe_prompts": 3},
    }
    if changes.get("model", {}).get("name", "embedded") != "embedded":
        del data["model"]["warmup_score"]
    if changes.get("task", {}).get("name", "arithmetic") != "arithmetic":
        del data["task"]["difficulty"]
    return resolve(data, changes, "test")


def made_trainer(folder: Path, algorithm: str = "reinforce", **changes: Any) -> Trainer:
    """A trainer of the tiny recipe that has not run yet, watched by a `Silent`."""
    recipe = tiny_recipe(folder, algorithm, **changes)
    lifecycle.check(recipe)
    source = lifecycle.model_source(recipe, print)
    tokenizer, prompts = lifecycle._tokenized(recipe, source, Silent())
    model = lifecycle.load_model(source, "float32", torch.device("cpu"), recipe.model.lora)
    return Trainer(recipe, model, tokenizer, *prompts, RunFolder(folder), Silent())


def collected(trainer: Trainer, first_batch: int = 0) -> tuple[Batch | None, dict[str, Any]]:
    """What the trainer's next step would learn from, with a fixed seed."""
    torch.manual_seed(0)
    return collect(
        trainer.recipe,
        trainer.objective,
        trainer.model,
        trainer.sampler,
        trainer.tokenizer,
        trainer.train_prompts,
        first_batch * trainer.recipe.rollout.num_prompts,
        trainer.clock.phase,
        trainer.initial,
    )


def with_reward(trainer: Trainer, reward: RewardFunction) -> Trainer:
    """The same trainer, whose training prompts are graded by one function."""
    examples = trainer.train_prompts.examples
    trainer.train_prompts = Prompts(examples, trainer.tokenizer, [reward], [1.0])
    return trainer


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / "model.safetensors")


def spread_reward(folder: Path) -> dict[str, Any]:
    """A reward that tells nearly all completions apart, so that every step has a gradient."""
    file = folder / "spread.py"
    file.write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [float(sum(map(ord, c)) % 17) for c in completions]\n"
    )
    return {"rewards": [f"{file}:spread"]}

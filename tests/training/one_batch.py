"""A trainer and a batch for one step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tests.engine import Silent, collected, tiny_recipe

from proxstep.runs.folder import RunFolder
from proxstep.training import lifecycle
from proxstep.training.batch import Batch
from proxstep.training.trainer import Trainer


def one_batch(folder: Path, algorithm: str, **changes: Any) -> tuple[Trainer, Batch]:
    """A trainer of the embedded model, and a batch on which its completions differ."""
    recipe = tiny_recipe(folder, algorithm, **changes)
    source = lifecycle.model_source(recipe, print)
    tokenizer, prompts = lifecycle._tokenized(recipe, source, Silent())
    model = lifecycle.load_model(source, "float32", torch.device("cpu"), None)
    made = Trainer(recipe, model, tokenizer, *prompts, RunFolder(folder), Silent())
    batch, _ = collected(made)
    assert batch is not None
    signal_B = torch.linspace(-1, 1, len(batch))
    return made, dataclasses.replace(batch, signal_B=signal_B)

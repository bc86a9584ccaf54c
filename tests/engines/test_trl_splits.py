"""ISOPO's gradient in TRL does not depend on how a step is cut into microbatches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.test_trl_gradients import difference
from tests.engines.trl_case import Watch, made, tiny, trained
from tests.selection import slow

from proxstep.engines.trl import IsopoTrainer

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
"""Completions of a microbatch, and microbatches of a step."""


def run(folder: Path, size: int, count: int, options: dict[str, Any]) -> Watch:
    """Two steps without learning, so that the second one differs by its past alone."""
    options = dict(options)
    tokenizer, model = tiny(lora=options.pop("lora", False))
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
    steps = {"max_steps": 2, "learning_rate": 0.0, "num_overlap_positions": 20}
    options = {**sizes, **steps, **options}
    trainer, watch = made(IsopoTrainer, folder, model, tokenizer, **options)
    torch.manual_seed(0)
    trained(trainer)
    assert len(watch.gradients) == 2
    assert len(watch.microbatches) == 2 * count
    return watch


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        ({}, SPLITS[-1:]),
        *slow(
            ({}, SPLITS[1:-1]),
            ({"rule": "isopo-figure4"}, SPLITS[1:]),
            ({"fisher_denominator": "trailing"}, SPLITS[1:]),
            ({"loss_type": "opo", "scale": "paper"}, SPLITS[1:]),
            ({"beta": 0.1, "lora": True}, SPLITS[1:]),
        ),
    ],
    ids=str,
)
def test_a_step_does_not_depend_on_its_microbatches(
    tmp_path: Path, options: dict[str, Any], splits: list[tuple[int, int]]
) -> None:
    whole = run(tmp_path / "8", *SPLITS[0], options)
    for size, count in splits:
        found = run(tmp_path / str(size), size, count, options)
        completions = torch.cat([batch["completion_ids"] for batch in found.microbatches])
        expected = torch.cat([batch["completion_ids"] for batch in whole.microbatches])
        assert torch.equal(completions, expected)
        for ours, theirs in zip(found.gradients, whole.gradients, strict=True):
            assert difference(ours, theirs) <= 1e-4
        assert found.logs[0]["reward"] == whole.logs[0]["reward"]
        assert len(found.logs) == len(whole.logs)

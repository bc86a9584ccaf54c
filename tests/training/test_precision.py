"""model.autocast auto: what it comes to by the hardware and a measurement, kept by the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine import Silent, tiny_recipe
from tests.models import tiny_qwen3

from proxstep.config.loading import load_recipe
from proxstep.training import lifecycle, precision

MODEL = {"name": "embedded", "warmup_score": 0.0, "autocast": "auto"}


@pytest.mark.parametrize(
    ("native", "gain", "chosen"),
    [(True, 1.7, "bfloat16"), (True, 1.05, None), (True, 0.4, None), (False, 9.0, None)],
)
def test_what_auto_comes_to(
    native: bool, gain: float, chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    monkeypatch.setattr(precision, "bfloat16_gain", lambda model: gain)
    notes: list[str] = []
    recipe = tiny_recipe(tmp_path / "run", model=MODEL)
    found = precision.with_autocast(recipe, tiny_qwen3(), notes.append)
    assert found.model.autocast == chosen
    assert found.model_copy(update={"model": recipe.model}) == recipe
    (note,) = notes
    assert note.startswith(f"model.autocast auto: {chosen or 'none'}, for ")
    assert (f"1/{gain:.2f}" in note) == native
    assert precision.with_autocast(found, tiny_qwen3(), pytest.fail) is found


def test_a_resumed_run_computes_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "bfloat16_gain", lambda model: 1.7)
    progress = Silent()
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=1, model=MODEL), progress)
    assert progress.notes[0].startswith("model.autocast auto: bfloat16, for bfloat16 takes 1/1.70")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").model.autocast == "bfloat16"


def test_the_measurement_changes_nothing() -> None:
    model = tiny_qwen3().float().train()
    random = torch.get_rng_state()
    assert precision.bfloat16_gain(model) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())

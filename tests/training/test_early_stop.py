"""A run ends early where the validation's score no longer rises, the same after an interruption."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine import Silent, records, tiny_recipe

from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import checkpoints
from proxstep.runs.folder import RunFolder
from proxstep.runs.reading import fairness_notes, load_run
from proxstep.training import lifecycle, trainer

SCORES = [0.1, 0.2, 0.5, 0.5, 0.4, math.nan, 0.9, 0.9]


@pytest.fixture(autouse=True)
def _scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score of an evaluation is told by its step."""
    evaluate = trainer.Trainer._evaluate

    def told(self: Any) -> dict[str, Any]:
        return evaluate(self) | {"score": SCORES[self.step]}

    monkeypatch.setattr(trainer.Trainer, "_evaluate", told)


def recipe_in(folder: Path, **changes: Any) -> Any:
    evaluation = {"every": 1, "num_probe_prompts": 1, "patience": 3, "kl_policy_initial": False}
    return tiny_recipe(folder, steps=7, evaluation=evaluation, **changes)


def test_it_ends_and_says_so_and_keeps_the_best(tmp_path: Path) -> None:
    progress = Silent()
    assert lifecycle.train(recipe_in(tmp_path / "run"), progress) == "finished"
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000002", "step-000005"]
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["status"], info["stopped_early"]) == ("finished", True)
    assert (info["best_step"], info["best_score"]) == (2, 0.5)
    assert progress.notes[-1].startswith("stopped early at step 5: 3 evaluations without a better")
    (note,) = [n for n in fairness_notes([load_run(tmp_path / "run")]) if "early" in n]
    assert "its best score was at step 2" in note


def test_the_policy_before_any_training_is_kept_where_it_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SCORES", [0.9, *SCORES[1:]])
    assert lifecycle.train(recipe_in(tmp_path / "run"), Silent()) == "finished"
    kept = [path.name for path in checkpoints(tmp_path / "run")]
    assert kept == ["step-000000", "step-000003"]


def test_what_it_ended_goes_on_with_more_patience(tmp_path: Path) -> None:
    """Steps were left, so that more of them would change nothing."""
    lifecycle.train(recipe_in(tmp_path / "run"), Silent())
    told = "evaluation.patience 3 ended the run early, at step 5 of 7: set it higher, or to null,"
    with pytest.raises(ProxstepError, match=told):
        lifecycle.resume(tmp_path / "run", Silent())
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace("patience: 3", "patience: null"))
    assert lifecycle.resume(tmp_path / "run", Silent()) == "finished"
    assert [r["step"] for r in records(tmp_path / "run")] == [*range(8)]


@pytest.mark.parametrize("none", [math.nan, math.inf])
def test_what_is_no_score_is_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, none: float
) -> None:
    """Nothing is more than NaN: a run that began with it would have been stopped as it rose."""
    monkeypatch.setattr(sys.modules[__name__], "SCORES", [none, 0.1, 0.2, 0.3, 0.4, none])
    recipe = recipe_in(tmp_path / "run").model_copy(update={"steps": 5})
    assert lifecycle.train(recipe, Silent()) == "finished"
    info = RunFolder(tmp_path / "run").info()
    assert (info["best_step"], info["best_score"], info["stopped_early"]) == (4, 0.4, False)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_ends_at_the_same_step(
    tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = trainer.Trainer._train_step
    steps: Iterator[int] = iter(range(stop_at))

    def interrupted(self: Any) -> dict[str, Any]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", interrupted)
        assert lifecycle.train(recipe_in(tmp_path / "run"), Silent()) == "interrupted"
    assert lifecycle.resume(tmp_path / "run", Silent()) == "finished"
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]

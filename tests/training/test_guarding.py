"""What the local engine does where a run collapses, by figures that the tests decide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import (
    Killed,
    Silent,
    assert_same_records,
    kill_at,
    records,
    spread_reward,
    tiny_recipe,
    weights,
)

from proxstep.budget import KlBudget
from proxstep.cli import commands
from proxstep.engines.keys import refuse
from proxstep.engines.verl.table import REFUSED
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import checkpoints
from proxstep.runs.folder import RunFolder
from proxstep.training import lifecycle
from proxstep.training.trainer import Trainer

COLLAPSES_AT, SEEN_AT = 4, 6
WRITE = Trainer._write


@pytest.fixture(autouse=True)
def _collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written down is a run that learns, and collapses from a step on at its first rate."""

    def written(self: Trainer, log: Any, tracker: Any, record: dict[str, Any]) -> None:
        bad = self.step >= COLLAPSES_AT and not self.returns
        if "score" in record:
            record["score"] = 0.1 if bad else 0.5
        if self.step:
            record |= {"reward": 0.0, "entropy": 9.0} if bad else {"reward": 0.5, "entropy": 1.0}
            record["reward_std"] = 0.5
        WRITE(self, log, tracker, record)

    monkeypatch.setattr(Trainer, "_write", written)


def recipe_in(folder: Path, guard: str, **changes: Any) -> Any:
    evaluation = {"every": 2, "num_probe_prompts": 1, "kl_policy_initial": False}
    given = {"steps": 9, "guard": guard, "evaluation": evaluation, **changes}
    return tiny_recipe(folder, task=spread_reward(folder.parent), **given)


def trained(folder: Path, guard: str, **changes: Any) -> tuple[str, Silent]:
    progress = Silent()
    return lifecycle.train(recipe_in(folder, guard, **changes), progress), progress


def test_warn_says_so_once_and_changes_nothing(tmp_path: Path) -> None:
    status, progress = trained(tmp_path / "warned", "warn")
    assert status == "finished"
    (note,) = [note for note in progress.notes if "collapsing" in note]
    assert note.startswith(f"step {SEEN_AT}: collapsing: the ")
    assert "the entropy rose from 1 to 9" in note
    status, progress = trained(tmp_path / "off", "off")
    assert (status, [note for note in progress.notes if "collapsing" in note]) == ("finished", [])
    assert_same_records(records(tmp_path / "warned"), records(tmp_path / "off"))


def test_stop_keeps_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    recipe = recipe_in(folder, "stop", logging={"checkpoint_every": 1})
    assert lifecycle.train(recipe, Silent()) == "stopped"
    assert [row["step"] for row in records(folder)] == list(range(SEEN_AT + 1))
    assert checkpoints(folder)[-1].name == "step-000002"
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "stopped"
    assert info["guard"]["step"] == SEEN_AT
    assert info["guard"]["verdict"].startswith("collapsing: ")
    with pytest.raises(ProxstepError, match=r"the guard stopped the run .*step-000002"):
        lifecycle.resume(folder, Silent())
    assert commands.main(["diagnose", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(info["guard"]["verdict"])


def told(patch: pytest.MonkeyPatch, values: Callable[[int], dict[str, float]]) -> None:
    """Let a run write down these values for a step, and no score where it did not evaluate."""

    def write(self: Trainer, log: Any, tracker: Any, record: dict[str, Any]) -> None:
        given = values(self.step)
        if "score" not in record:
            given.pop("score", None)
        record |= given
        WRITE(self, log, tracker, record)

    patch.setattr(Trainer, "_write", write)


def kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def test_what_a_healthy_run_acquires_for_good_does_not_hold_the_good_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A far policy, as of a long run, is no harm; its entropy and its reward are from step 5 on."""

    def values(step: int) -> dict[str, float]:
        bad = {"reward": 0.0, "entropy": 9.0} if step >= 5 else {"reward": 0.5, "entropy": 1.0}
        far = {"kl_initial_policy": 0.8 if step >= 2 else 0.0}
        return {"score": 0.3 + 0.1 * min(step, 4), "reward_std": 0.5, **far, **bad}

    told(monkeypatch, values)
    assert trained(tmp_path / "run", "stop")[0] == "stopped"
    assert kept(tmp_path / "run")[-1] == 4


def test_stop_keeps_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's low reward at the best score, and the collapse two steps later."""

    def values(step: int) -> dict[str, float]:
        low = {"reward": 0.0 if step == 4 or step >= 6 else 0.5, "entropy": 9.0 * (step >= 6) + 1.0}
        return {"score": 0.6 if step == 4 else 0.5, "reward_std": 0.5, **low}

    told(monkeypatch, values)
    changes: dict[str, Any] = {"logging": {"checkpoint_every": 1}}
    changes["evaluation"] = {"every": 2, "num_probe_prompts": 1, "patience": 9}
    assert trained(tmp_path / "run", "stop", **changes)[0] == "stopped"
    assert kept(tmp_path / "run") == [2, 4]


def test_stop_deletes_nothing_where_the_good_checkpoint_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Trainer.keep_last_good

    def without(self: Trainer) -> None:
        (self.folder.path / "checkpoints" / "step-000002" / "model.safetensors").unlink()
        keep(self)

    monkeypatch.setattr(Trainer, "keep_last_good", without)
    status, progress = trained(tmp_path / "run", "stop", logging={"checkpoint_every": 1})
    assert status == "stopped"
    assert kept(tmp_path / "run") == [2, 4, 5]
    assert any("step-000002 was the last good one and is damaged" in n for n in progress.notes)


def test_a_stopped_run_has_a_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "train", lambda *args, **keywords: "stopped")
    words = ["train", "recipes/arithmetic.yaml", "--output_dir", str(tmp_path / "run")]
    assert commands.main(words) == 3
    assert "stopped by the guard" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "isopo"},
        {"model": {"lora": {"rank": 2}}},
        {"optimizer": {"name": "muon", "lr_scheduler_type": "linear"}},
        {"update": {"kl_budget": 0.5}},
    ],
    ids=["isopo", "lora", "muon", "kl budget"],
)
def test_halve_goes_back_with_half_the_rate(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    seen: dict[str, Any] = {}
    go_back = Trainer._go_back

    def watched(self: Trainer, good: int, found: Any) -> None:
        seen["before"] = self.schedule.get_last_lr()
        go_back(self, good, found)
        seen["rates"] = [group["lr"] for group in self.optimizer.param_groups]
        if isinstance(self.optimizer, KlBudget):
            self.optimizer.begin_rollout(1)
            seen["budget"], _ = self.optimizer._budget(torch.ones(4, 1, dtype=torch.bool))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_go_back", watched)
        status, progress = trained(folder, "halve", **changes)
    assert status == "finished"
    assert seen["rates"] == [rate / 2 for rate in seen["before"]]
    if "update" in changes:
        assert seen["budget"] == 0.25
    assert [row["step"] for row in records(folder)] == list(range(10))
    rates = [row["learning_rate"] for row in records(folder)[1:]]
    assert rates[SEEN_AT] < 0.6 * rates[SEEN_AT - 1]
    assert [n for n in progress.notes if "went back to the policy of step 2" in n]
    info = json.loads((folder / "run.json").read_text())
    assert info["guard"]["returns"] == [{"from": SEEN_AT, "to": 2}]
    assert RunFolder(folder).verdict().state != "collapsing"


def test_halving_restores_the_weights_to_the_bit(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found: dict[str, Any] = {}
    go_back = Trainer._go_back

    def watched(self: Trainer, good: int, verdict: Any) -> None:
        worse = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        go_back(self, good, verdict)
        now = dict(self.model.named_parameters())
        found["moved"] = any(not torch.equal(now[n], p) for n, p in worse.items())
        held = weights(self.folder.path) if checkpoints(folder)[-1].name.endswith("2") else {}
        found["same"] = [torch.equal(now[n], p) for n, p in held.items()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_go_back", watched)
        trained(folder, "halve")
    assert found["moved"]
    assert found["same"]
    assert all(found["same"])


@pytest.mark.parametrize("at", [SEEN_AT, SEEN_AT + 2])
def test_resuming_a_halved_run_repeats_it_to_the_bit(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the step that the guard is about to undo, and after that."""
    changes: dict[str, Any] = {"logging": {"checkpoint_every": 3}, "algorithm": "isopo"}
    assert trained(tmp_path / "whole", "halve", **changes)[0] == "finished"
    with monkeypatch.context() as patch:
        kill_at(at, patch)
        patch.setattr(Trainer, "rescue", lambda self: False)
        with pytest.raises(Killed):
            trained(tmp_path / "cut", "halve", **changes)
    assert lifecycle.resume(tmp_path / "cut", Silent()) == "finished"
    assert_same_records(records(tmp_path / "whole"), records(tmp_path / "cut"))
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_collapses_again_and_again_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three returns at most."""

    def hopeless(self: Trainer, log: Any, tracker: Any, record: dict[str, Any]) -> None:
        bad = self.step % 4 != 1 and self.step > 1
        record |= {"reward": 0.0 if bad else 0.5, "entropy": 9.0 if bad else 1.0}
        record["reward_std"] = 0.5
        WRITE(self, log, tracker, record)

    monkeypatch.setattr(Trainer, "_write", hopeless)
    status, _ = trained(tmp_path / "run", "halve", steps=30)
    assert status == "stopped"
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [each["to"] for each in info["guard"]["returns"]] == [0, 0, 0]


def test_engines_that_cannot_go_back_say_so(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", guard="stop", evaluation={"num_probe_prompts": 64})
    with pytest.raises(ProxstepError, match=r"^guard stop is not for --engine verl: "):
        refuse("verl", recipe, REFUSED)
    tables = pytest.importorskip("proxstep.engines.trl.tables")
    with pytest.raises(ProxstepError, match=r"^guard stop is not for --engine trl: "):
        refuse("trl", recipe, tables.REFUSALS, tables.KNOWN)

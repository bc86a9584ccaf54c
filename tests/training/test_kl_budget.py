"""A recipe's KL budget in the local engine."""

from __future__ import annotations

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

from proxstep.budget import CONTROLS
from proxstep.config.recipe import algorithm_names
from proxstep.errors import ProxstepError
from proxstep.training import lifecycle
from proxstep.training.trainer import Trainer

BUDGET: dict[str, Any] = {"kl_budget": 0.01}


def trained(folder: Path, algorithm: str = "reinforce", **changes: Any) -> list[dict[str, Any]]:
    folder.parent.mkdir(exist_ok=True)
    changes = {"task": spread_reward(folder.parent), **changes}
    lifecycle.train(tiny_recipe(folder, algorithm, **changes), Silent())
    return records(folder)


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Whether two runs measured the same, times and the budget's own figures left out."""
    left_out = ("seconds", "elapsed", "kl_budget/")
    kept = [
        [{k: v for k, v in r.items() if not k.startswith(left_out)} for r in run]
        for run in (first, second)
    ]
    return kept[0] == kept[1]


@pytest.mark.parametrize("algorithm", algorithm_names())
def test_every_algorithm_keeps_it(tmp_path: Path, algorithm: str) -> None:
    changes = {"steps": 2, "update": BUDGET, "optimizer": {"learning_rate": 0.03}}
    for record in trained(tmp_path / "run", algorithm, **changes)[1:]:
        predicted, scale = record["kl_budget/predicted"], record["kl_budget/scale"]
        assert predicted * scale**2 <= 0.01 * (1 + 1e-6)
        assert scale < 1


def test_a_budget_that_is_never_reached_changes_nothing(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", "isopo")
    limited = trained(tmp_path / "limited", "isopo", update={"kl_budget": 1e4})
    assert same(plain, limited)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "limited")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "kl_budget/scale" not in plain[-1]


@pytest.mark.parametrize("control", CONTROLS)
def test_resuming_repeats_the_run_to_the_bit(
    tmp_path: Path, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "steps": 4,
        "update": {**BUDGET, "num_minibatches": 2, "kl_control": control},
        "logging": {"checkpoint_every": 2},
        "optimizer": {"learning_rate": 0.01},
        "task": spread_reward(tmp_path),
    }
    whole = trained(tmp_path / "whole", **changes)

    kill_at(4, monkeypatch)
    monkeypatch.setattr(Trainer, "rescue", lambda self: False)
    with pytest.raises(Killed):
        lifecycle.train(tiny_recipe(tmp_path / "cut", **changes), Silent())
    monkeypatch.undo()
    assert lifecycle.resume(tmp_path / "cut", Silent()) == "finished"
    assert_same_records(whole, records(tmp_path / "cut"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"lora": {"rank": 2}}},
        {"model": {"autocast": "bfloat16"}},
        {"model": {"head": "chunked"}},
        {"update": {"num_minibatches": 2, "num_iterations": 2, "microbatch_size": 3}},
        {"optimizer": {"name": "muon", "learning_rate": 0.03}},
        {"optimizer": {"name": "sgd", "learning_rate": 3.0, "momentum": 0.9}},
    ],
    ids=["lora", "autocast", "chunked", "minibatches", "muon", "sgd"],
)
def test_it_goes_with(tmp_path: Path, changes: dict[str, Any]) -> None:
    given = {"steps": 2, "optimizer": {"learning_rate": 0.03}, **changes}
    given["update"] = {**BUDGET, "kl_control": "corrected", **changes.get("update", {})}
    last = trained(tmp_path / "run", "isopo", **given)[-1]
    assert 0 < last["kl_budget/scale"] < 1
    assert last["kl_budget/realized"] > 0


def test_how_many_completions_judge(tmp_path: Path) -> None:
    update = {**BUDGET, "kl_num_sequences": 16, "kl_budget_per": "token"}
    last = trained(tmp_path / "run", update=update, optimizer={"learning_rate": 0.03})[-1]
    share = last["kl_budget/predicted"] * last["kl_budget/scale"] ** 2
    assert share == pytest.approx(0.01, rel=1e-6)


def test_what_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProxstepError, match=r"update\.kl_budget .* bfloat16"):
        tiny_recipe(tmp_path, update=BUDGET, model={"dtype": "bfloat16"})
    with pytest.raises(ProxstepError, match=r"update\.kl_control .* update\.kl_budget"):
        tiny_recipe(tmp_path, update={"kl_control": "corrected"})

"""How the update is cut, and which sequences have no part in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import collected, made_trainer, tiny_recipe, with_reward
from torch import Tensor

from proxstep.algorithms import ALGORITHMS, Aggregation
from proxstep.config.recipe import Recipe
from proxstep.training.batch import Batch
from proxstep.training.rollout import Completions, rows_by_tokens

IDLE = [name for name, algorithm in ALGORITHMS.items() if algorithm.idle_at_zero]


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_signal_of_zero_gives_no_gradient_far_off_policy(name: str, mode: str) -> None:
    torch.manual_seed(0)
    algorithm = ALGORITHMS[name]
    log_prob_BT = (torch.randn(6, 5, dtype=torch.float64) * 3 - 3).requires_grad_()
    old_BT = torch.randn(6, 5, dtype=torch.float64) * 3 - 3
    signal_B = torch.tensor([0.0, 1.0, 0.0, -2.0, -0.0, 0.5], dtype=torch.float64)
    mask_BT = torch.arange(5) < torch.tensor([5, 3, 1, 5, 4, 2])[:, None]
    whole = Aggregation(mode, num_sequences=6, num_tokens=int(mask_BT.sum()))
    options = algorithm.loss_options(algorithm.defaults) | {"aggregation": whole}
    loss, _ = algorithm.loss(log_prob_BT, old_BT, signal_B, mask_BT, **options)
    (grad_BT,) = torch.autograd.grad(loss, log_prob_BT)
    rest = signal_B != 0
    assert (grad_BT[~rest] == 0).all()
    left, _ = algorithm.loss(
        log_prob_BT[rest], old_BT[rest], signal_B[rest], mask_BT[rest], **options
    )
    (grad_left,) = torch.autograd.grad(left, log_prob_BT)
    assert torch.allclose(grad_BT, grad_left, rtol=1e-12, atol=0)


def first_group_equal(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(index >= 4 and index % 3 == 0) for index in range(len(prompts))]


def gradients(folder: Path, changes: dict[str, Any], *, leave_out: bool = True) -> list[Tensor]:
    """The gradient of one optimizer step in which the first of four groups has equal rewards."""
    made = made_trainer(folder, "grpo", **changes)
    batch, _ = collected(with_reward(made, first_group_equal))
    assert batch is not None
    assert (batch.signal_B == 0).any()
    if not leave_out:
        made.recipe.__dict__["leaves_out_idle"] = False
    made.model.train()
    made._accumulate(batch, {}, measure_entropy=False)
    return [p.grad for p in made.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "update", [{}, {"microbatch_size": 3}, {"microbatch_tokens": 20}, {"microbatch_tokens": 1}]
)
def test_neither_cut_nor_leaving_out_changes_the_gradient(
    tmp_path: Path, update: dict[str, int]
) -> None:
    whole = gradients(tmp_path / "whole", {}, leave_out=False)
    found = gradients(tmp_path / "found", {"update": update})
    assert len(found) == len(whole)
    size = torch.stack([grad.norm() for grad in whole]).max()
    assert size > 0
    for left, right in zip(whole, found, strict=True):
        assert (left - right).norm() <= 1e-5 * size


def made_completions() -> Completions:
    prompt, completion = torch.tensor([3, 3, 1, 2, 1, 3]), torch.tensor([4, 1, 6, 2, 6, 4])
    column = torch.arange(9)
    response = (column >= 3) & (column < 3 + completion[:, None])
    attention = response | ((column < 3) & (column >= 3 - prompt[:, None]))
    return Completions(column.expand(6, 9), attention, response, torch.zeros(6, dtype=torch.bool))


def test_microbatches_by_tokens_are_full_and_of_like_length() -> None:
    completions = made_completions()
    parts = rows_by_tokens(completions, 16)
    assert [part.tolist() for part in parts] == [[2, 4], [0, 5], [3, 1]]
    for part in parts:
        assert completions.rows(part).trimmed().token_BT.numel() <= 16
    assert [part.tolist() for part in rows_by_tokens(completions, 1)] == [
        [2],
        [4],
        [0],
        [5],
        [3],
        [1],
    ]
    assert len(rows_by_tokens(completions, 1000)) == 1


def test_a_batch_without_signal_keeps_a_row() -> None:
    completions = made_completions()
    batch = Batch(completions, torch.zeros(6), torch.arange(6), torch.arange(6), None)
    assert batch.with_signal().index_B.tolist() == [0]
    some = dataclasses.replace(batch, signal_B=torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0, 0.0]))
    assert some.with_signal().index_B.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("algorithm", "changes", "left_out"),
    [
        ("grpo", {}, True),
        ("opo", {}, False),
        ("isopo", {}, False),
        ("grpo", {"regularizer": {"entropy_coef": 0.1}}, False),
        ("grpo", {"regularizer": {"kl_coef": 0.1}}, False),
    ],
)
def test_which_recipes_leave_sequences_out(
    tmp_path: Path, algorithm: str, changes: dict[str, Any], left_out: bool
) -> None:
    recipe: Recipe = tiny_recipe(tmp_path, algorithm, **changes)
    assert recipe.leaves_out_idle == left_out


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("grpo", {"update": {"microbatch_size": 4}}, "leave one of them out"),
        ("isopo-natural", {}, "depends on which ones share a microbatch"),
        ("isopo", {"geometry": {"overlap_source": "microbatch"}}, "share a microbatch"),
    ],
)
def test_tokens_are_refused_where_they_would_change_the_gradient(
    tmp_path: Path, algorithm: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    changes = {**changes, "update": {"microbatch_tokens": 64, **changes.get("update", {})}}
    with pytest.raises(Exception, match=message):
        tiny_recipe(tmp_path, algorithm, **changes)
    tiny_recipe(tmp_path, "isopo", update={"microbatch_tokens": 64})

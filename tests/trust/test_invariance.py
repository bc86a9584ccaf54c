"""A gradient is the same however its sequences are padded, ordered, packed and cut.

For every algorithm of the registry and every rule; what depends on something by definition is
listed with what it may not depend on (docs/isopo.md, "What the result depends on").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from proxstep import PRESETS, Isopo
from proxstep.algorithms import ALGORITHMS, Aggregation
from proxstep.isopo import NaturalRule, Rule
from tests.algorithms.loss_cases import make_case
from tests.isopo.grids import Layout, log_probs, make_grid
from tests.models import tiny_qwen3
from tests.oracle import random_sequences

NUM, STEPS = 4, 2
ORDERS = ((3, 1, 0, 2), (1, 0, 3, 2))
GROUPS = (0, 0, 1, 1)
RULES: dict[str, str | Rule] = {
    **{name: name for name in PRESETS},
    "natural-by-group": NaturalRule(interact="group"),
}
CUT = ("reinforce", "isopo", "isopo-npg", "isopo-figure4", "isopo-euclidean", "natural-by-group")
"""The rules that do not depend on how a step is cut into microbatches of whole prompts."""
ALONE = CUT[:-1]
"""Those that do not depend on what shares a microbatch at all."""


def train(
    rule: str | Rule,
    parts: Sequence[Sequence[int]] = ((0, 1, 2, 3),),
    layout: Layout = "right",
    threads: int = 1,
) -> list[Tensor]:
    """The gradients of two steps at a learning rate of 0, in microbatches of some sequences."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, found = tiny_qwen3(), []
    isopo = Isopo(model, rule, num_overlap_positions=12)

    def backward(step: int) -> None:
        sequences = random_sequences(step, NUM)
        advantage = torch.tensor([1.0, -1.0, 0.5, -0.7], dtype=torch.float64) / NUM
        for part in parts:
            rows = list(part)
            grid = make_grid([sequences[b] for b in rows], layout)
            with isopo.microbatch(
                grid.sequence_id,
                advantage[rows],
                grid.completion,
                groups=torch.tensor(GROUPS)[rows],
                sequence_keys=torch.tensor(rows),
            ) as microbatch:
                microbatch.objective(log_probs(model, grid)).backward()

    try:
        for step in range(STEPS):
            while isopo.needs_past:
                with isopo.measuring():
                    backward(step)
            model.zero_grad()
            backward(step)
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            isopo.step()
    finally:
        torch.set_num_threads(before)
    return found


def lost(changed: list[Tensor], whole: list[Tensor], tolerance: float = 1e-9) -> int:
    """Whether two runs differ."""
    pairs = zip(changed, whole, strict=True)
    return int(any((a - b).norm() > tolerance * b.norm() + 1e-13 for a, b in pairs))


def arrangements(name: str) -> dict[str, dict[str, Any]]:
    """What must not matter to a rule, beside the whole step in one padded microbatch."""
    changes: dict[str, dict[str, Any]] = {
        "left": {"layout": "left"},
        "packed": {"layout": "packed"},
        "packed rows": {"layout": "packed-rows"},
        **{f"order {order}": {"parts": (order,)} for order in ORDERS},
    }
    if name in CUT:
        changes["by prompt"] = {"parts": ((0, 1), (2, 3))}
        changes["by prompt, packed"] = {"parts": ((2, 3), (0, 1)), "layout": "packed"}
    if name in ALONE:
        changes["each alone"] = {"parts": ((2,), (0,), (3,), (1,))}
        changes["unequal"] = {"parts": ((3, 0, 1), (2,)), "layout": "left"}
    return changes


FAST = ("isopo",)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RULES]
)
def test_a_rule_does_not_depend_on_the_arrangement(name: str, counted: Callable[..., None]) -> None:
    whole, failed = train(RULES[name]), []
    changes = arrangements(name)
    # Near an eigenvalue of 0 the singular vectors of Intra-PROMA are known to rounding alone.
    tolerance = 1e-7 if name == "proma-intra" else 1e-9
    for what, change in changes.items():
        if lost(train(RULES[name], **change), whole, tolerance):
            failed.append(what)
    counted("invariance of the rules", len(changes), len(failed))
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_depend_on_the_threads(name: str, counted: Callable[..., None]) -> None:
    tolerance = 1e-7 if name == "proma-intra" else 1e-9
    failed = lost(train(RULES[name], threads=2), train(RULES[name]), tolerance)
    counted("invariance of the rules", 1, failed)
    assert not failed


MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def loss_gradient(name: str, tensors: Sequence[Tensor], aggregation: Aggregation) -> Tensor:
    log_prob, old, signal, mask = tensors
    leaf = log_prob.clone().requires_grad_()
    loss, _ = ALGORITHMS[name].loss(leaf, old, signal, mask, aggregation=aggregation)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_does_not_depend_on_the_arrangement(
    name: str, mode: str, counted: Callable[..., None]
) -> None:
    """Padding on either side, the order, and the cut, with the step's counts given."""
    case = make_case(3, drift=0.1)
    mask = case.response_mask
    aggregation = Aggregation(
        mode,
        num_sequences=int(mask.any(1).sum()),
        num_tokens=int(mask.sum()),
        max_length=mask.shape[1],
    )
    whole = loss_gradient(name, case.tensors, aggregation)
    failed, order = [], torch.tensor([4, 2, 0, 5, 1, 3])

    def check(what: str, found: Tensor) -> None:
        if not torch.allclose(found, whole, rtol=1e-12, atol=1e-15):
            failed.append(what)

    for what, left, right in (("left", 3, 0), ("right", 0, 3), ("both", 2, 2)):
        for fill in (0.0, float("nan")):
            padded = [
                x
                if x.dim() == 1
                else nn_pad(x, left, right, False if x.dtype == torch.bool else fill)
                for x in case.tensors
            ]
            found = loss_gradient(name, padded, aggregation)
            check(f"padding {what} {fill}", found[:, left : left + mask.shape[1]])
    inverse = order.argsort()
    shuffled = loss_gradient(name, [x[order] for x in case.tensors], aggregation)
    check("order", shuffled[inverse])
    for cut in ([2, 4], [1, 5], [1, 1, 1, 1, 1, 1]):
        parts = zip(*(x.split(cut) for x in case.tensors), strict=True)
        check(f"cut {cut}", torch.cat([loss_gradient(name, p, aggregation) for p in parts]))
    counted("invariance of the algorithms", 10, len(failed))
    assert not failed


def nn_pad(x: Tensor, left: int, right: int, fill: Any) -> Tensor:
    return torch.nn.functional.pad(x, (left, right), value=fill)

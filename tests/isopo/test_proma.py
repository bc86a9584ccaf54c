"""PROMA against materialized gradients and least squares, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.families import build
from tests.isopo.grids import make_grid, run
from tests.oracle import position_gradients, random_sequences, summed_by_parameter
from tests.selection import square
from torch import Tensor, nn

from proxstep import ProxstepError
from proxstep.isopo import Isopo, ProjectingRule
from proxstep.isopo.plan import Statistics

COEFFICIENTS = [1.0, -0.5, 0.25, 3.0, -1.0, 0.7]
FAMILIES = ["qwen3-tied", "qwen3-untied", "gpt2"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def projected(model: nn.Module, microbatches: list[list[int]]) -> dict[str, Tensor]:
    """M <- (I - P) M + sum_b A_b G_b by `lstsq`, for every parameter use; to minimize."""
    sequences = random_sequences(3, 6)
    total: dict[str, Tensor] = {}
    for members in microbatches:
        found = [position_gradients(model, sequences[b]) for b in members]
        for key in found[0]:
            rows = torch.stack([one[key].sum(0).flatten() for one in found])
            new = torch.tensor([COEFFICIENTS[b] for b in members], dtype=rows.dtype) @ rows
            old = total.get(key, torch.zeros_like(new))
            solution = torch.linalg.lstsq(rows.mT, old[:, None], driver="gelsd").solution
            total[key] = old - (rows.mT @ solution)[:, 0] + new
    shapes = {key: one.sum(0).shape for key, one in found[0].items()}
    shaped = {key: -value.view(shapes[key]) for key, value in total.items()}
    return summed_by_parameter(model, shaped)


def proma(
    model: nn.Module, microbatches: list[list[int]], rule: str = "proma"
) -> dict[str, Tensor]:
    model.zero_grad()
    isopo, sequences = Isopo(model, rule), random_sequences(3, 6)
    for members in microbatches:
        grid = make_grid([sequences[b] for b in members], "right")
        run(model, isopo, grid, [COEFFICIENTS[b] for b in members])
    isopo.step()
    isopo.remove()
    return gradients(model)


def assert_same(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == wanted.keys()
    for name, right in wanted.items():
        assert (ours[name] - right).norm() <= tolerance * right.norm(), name


@pytest.mark.parametrize(
    ("family", "microbatches"),
    square(FAMILIES, [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2], [3], [4, 5]]]),
)
def test_equals_the_projection_of_materialized_gradients(
    family: str, microbatches: list[list[int]]
) -> None:
    model, reference = build(family, 3), build(family, 3)
    assert_same(proma(model, microbatches), projected(reference, microbatches), 1e-8)


def test_one_microbatch_is_reinforce() -> None:
    model, whole = build("qwen3-tied", 3), [[0, 1, 2, 3, 4, 5]]
    assert_same(proma(model, whole), proma(model, whole, "reinforce"), 1e-12)


def test_of_equal_microbatches_the_last_is_left() -> None:
    model = build("qwen3-tied", 3)
    assert_same(proma(model, [[0, 1], [0, 1]]), proma(model, [[0, 1]]), 1e-7)


def test_a_step_begins_anew() -> None:
    model = build("qwen3-tied", 3)
    isopo, found = Isopo(model, "proma"), []
    for _ in range(2):
        model.zero_grad()
        run(model, isopo, make_grid(random_sequences(3, 6)[:2], "right"), COEFFICIENTS[:2])
        isopo.step()
        found.append(gradients(model))
    assert_same(found[1], found[0], 1e-12)


def test_gradients_that_depend_on_each_other_and_zeros() -> None:
    """K is singular: the pseudo-inverse, and no NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    rows = torch.cat([rows, rows.sum(0, keepdim=True), torch.zeros(1, 7, dtype=torch.float64)])
    running = torch.randn(7, generator=generator, dtype=torch.float64)
    coefficient_B = torch.zeros(4, dtype=torch.float64)
    found = Statistics(coefficient_B, ntk_BB=rows @ rows.mT, along_B=rows @ running)
    weight_B, _, _ = ProjectingRule().weigh(found, {})
    left = running + weight_B @ rows
    assert torch.allclose(rows @ left, torch.zeros(4, dtype=torch.float64), atol=1e-10)


def test_a_negative_ridge_is_refused() -> None:
    with pytest.raises(ProxstepError, match="ridge"):
        ProjectingRule(-1.0)

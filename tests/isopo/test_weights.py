"""The two rules as functions: limits, invariances and the paper's bounds on random inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxstep.isopo import IsometricRule, NaturalRule
from proxstep.isopo.plan import Statistics

seeds = st.integers(0, 2**31)


def random_problem(seed: int, batch: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(batch, 20, generator=generator, dtype=torch.float64)
    jacobian = jacobian * torch.rand(batch, 1, generator=generator, dtype=torch.float64) * 10
    coefficient = torch.randn(batch, generator=generator, dtype=torch.float64)
    fisher_sq = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.1
    return jacobian, coefficient, fisher_sq


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_p_of_minus_one_bounds_every_sequences_fisher_length(seed: int) -> None:
    """Section 2.0.1: |weight_b| F_b <= |coefficient_b|, whatever the gradient's scale."""
    _, coefficient, fisher_sq = random_problem(seed)
    for damping in (0.0, 0.5, 10.0):
        rule = IsometricRule(-1.0, damping=damping)
        weight = rule.weigh(Statistics(coefficient, fisher_sq), {})[0]
        assert (weight.abs() * fisher_sq.sqrt() <= coefficient.abs() * (1 + 1e-12)).all()


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_r_of_minus_two_is_the_closest_multiple_to_the_natural_gradient(seed: int) -> None:
    """Section 2.0.3: lambda = |v|^2 / (v . F v) minimizes |lambda v - F^-1 v| in the metric F."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    fisher = root @ root.mT + 0.1 * torch.eye(5, dtype=torch.float64)
    v = torch.randn(5, generator=generator, dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    found = Statistics(ones, (v @ fisher @ v)[None], (v @ v)[None])
    scale = float(IsometricRule(0.0, 0.0, -2.0).weigh(found, {})[0])
    natural = torch.linalg.solve(fisher, v)

    def distance(multiple: float) -> float:
        return float((multiple * v - natural) @ fisher @ (multiple * v - natural))

    assert distance(scale) <= min(distance(scale * 1.01), distance(scale * 0.99)) + 1e-9


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_preserved_scale_keeps_an_average_sequence(seed: int) -> None:
    _, coefficient, fisher_sq = random_problem(seed)
    equal = torch.full_like(fisher_sq, float(fisher_sq.mean()))
    for rule in (
        IsometricRule(-1.0, scale="preserved"),
        IsometricRule(-1.0, damping=2.0, scale="preserved"),
    ):
        weight = rule.weigh(Statistics(coefficient, equal), {})[0]
        assert torch.allclose(weight, coefficient)


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_the_natural_rule_solves_its_equation(seed: int) -> None:
    jacobian, coefficient, _ = random_problem(seed)
    kernel = jacobian @ jacobian.mT
    rule = NaturalRule(0.7)
    weight = rule.weigh(Statistics(coefficient, ntk_BB=kernel), {})[0]
    c = 0.7 * kernel.diagonal().mean()
    left = kernel @ weight + c * weight
    assert torch.allclose(left, coefficient, rtol=1e-8, atol=1e-10)


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_the_natural_rule_maximizes_gain_under_its_penalty(seed: int) -> None:
    """Section 3: u = J^T w maximizes A . J u - (|J u|^2 + c |u|^2) / 2 within the span of J^T."""
    jacobian, coefficient, _ = random_problem(seed)
    kernel = jacobian @ jacobian.mT
    c = kernel.diagonal().mean()
    found = Statistics(coefficient, ntk_BB=kernel)
    best = jacobian.mT @ NaturalRule(1.0).weigh(found, {})[0]

    def value(u: torch.Tensor) -> torch.Tensor:
        change = jacobian @ u
        return coefficient @ change - (change @ change + c * (u @ u)) / 2

    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        direction = jacobian.mT @ torch.randn(6, generator=generator, dtype=torch.float64)
        assert value(best + 1e-3 * direction) <= value(best) + 1e-12


@pytest.mark.parametrize("form", ["additive", "relative"])
def test_a_layer_without_gradient_gives_zeros_not_nan(form: str) -> None:
    coefficient, zeros = torch.ones(3), torch.zeros(3, 3)
    rule = NaturalRule(1.0, damping_form=form)  # type: ignore[arg-type]
    weight, _, _ = rule.weigh(Statistics(coefficient, ntk_BB=zeros), {})
    assert torch.equal(weight, torch.zeros(3, dtype=torch.float64))
    found = Statistics(coefficient, torch.zeros(3), torch.zeros(3))
    scale, _, _ = IsometricRule(-1.0, -1.0, -2.0).weigh(found, {})
    assert scale.isfinite().all()

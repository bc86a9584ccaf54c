"""Edge cases and refusals of tests.theory.maths, beside what the statements check."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxstep.errors import ProxstepError
from tests.theory.cases import OUTCOMES, Case, Model, close, random
from tests.theory.maths import (
    categorical,
    descent,
    escort,
    fisher,
    isopo,
    opo,
    simplex,
    surrogate,
    trust_region,
)

seeds = st.integers(0, 10**6)
scales = st.sampled_from([1e-9, 0.1, 1.0, 30.0, 1e4])
cheap = settings(deadline=None, max_examples=40, derandomize=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_leading_dimensions_are_taken_along(seed: int) -> None:
    left, right = random(seed, 2, 3, 5).softmax(-1), random(seed + 1, 2, 3, 5).softmax(-1)
    for function in (
        *(categorical.expectation, categorical.centered, categorical.deviation, categorical.kl),
        *(categorical.chi_square, categorical.total_variation, categorical.policy_of),
    ):
        looped = [[function(left[i, j], right[i, j]) for j in range(3)] for i in range(2)]
        close(function(left, right), torch.stack([torch.stack(row) for row in looped]))


def test_kl_takes_policies_with_zeros() -> None:
    half_V = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    even_V = torch.full((3,), 1 / 3, dtype=torch.float64)
    close(categorical.kl(half_V, half_V), 0.0)
    close(categorical.kl(half_V, even_V), torch.tensor(1.5).double().log())
    assert categorical.kl(even_V, half_V).isinf()


@given(seeds, scales)
@cheap
def test_the_projection_is_a_policy_and_the_nearest_one(seed: int, scale: float) -> None:
    case = Case(seed)
    f, g = scale * case.function(0), scale * case.function(1)
    f[1] = f[0]  # a tie
    projected, other = (simplex.project(x, case.anchor_V) for x in (f, g))
    size = max(scale, 1.0)
    close((case.anchor_V * projected).sum(), 0.0, atol=1e-12 * size)
    assert projected.min() >= -1
    close(simplex.project(projected, case.anchor_V), projected, atol=1e-11 * size)
    assert case.norm(projected - other) <= case.norm(f - g) * (1 + 1e-9)
    corners_VV = torch.diag(1 / case.anchor_V) - 1
    uphill_V = (corners_VV - projected) @ (case.anchor_V * (f - projected))
    assert uphill_V.max() <= 1e-10 * size**2


def test_the_projection_of_a_policy_is_itself() -> None:
    case = Case(3)
    v = categorical.deviation(case.policy_V, case.anchor_V)
    close(simplex.project(v, case.anchor_V), v)
    close(simplex.project(v + 5, case.anchor_V), v)
    one = torch.ones(1, dtype=torch.float64)
    close(simplex.project(7 * one, one), 0 * one)


@given(seeds, scales)
@cheap
def test_the_surrogates_optimum_solves_its_equations(seed: int, scale: float) -> None:
    case = Case(seed)
    spread_V = scale * case.mean_zero()
    for drive_V in (spread_V, spread_V + scale):
        delta_V = surrogate.optimum(drive_V, case.anchor_V, case.mu)
        close((case.anchor_V * delta_V.exp()).sum(), 1.0, rtol=1e-7)
        # Stationarity within the policies: the residual is a multiple of the ratio.
        residual_V = drive_V - case.mu * delta_V
        multiplier = (case.anchor_V * residual_V).sum()
        close(residual_V, multiplier * delta_V.exp(), atol=1e-8 * max(scale, 1.0))


def test_no_drive_no_step() -> None:
    case = Case(0)
    none_V = torch.zeros(OUTCOMES, dtype=torch.float64)
    close(surrogate.optimum(none_V, case.anchor_V, case.mu), none_V)
    assert (trust_region.optimum(none_V, case.anchor_V, 0.3) == 0).all()
    assert trust_region.multiplier(none_V, case.anchor_V, 0.3) == 0
    close(simplex.constrained_optimum(none_V + 1, case.anchor_V, case.mu), none_V)


@pytest.mark.parametrize("seed", [0, 3, 5, 7])
def test_a_singular_fisher_matrix_leaves_idle_directions_alone(seed: int) -> None:
    case = Case(seed)
    score_VP = fisher.scores(lambda logit_V: logit_V.log_softmax(-1), case.anchor_V.log())
    context = (score_VP, case.anchor_V, case.advantage_V)
    natural_P = fisher.natural_gradient(*context)
    close(natural_P.sum(), 0.0)
    gradient_P = fisher.policy_gradient(*context)
    close(fisher.fisher_matrix(score_VP, case.anchor_V) @ natural_P, gradient_P)
    close(natural_P, case.advantage_V - case.advantage_V.mean())
    close(fisher.natural_gradient(*context, 1e-9), natural_P, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("anchor", [[0.5, 0.5, 0.0], [0.5, 0.6, 0.1], [-0.1, 0.6, 0.5]])
def test_what_is_no_anchor_is_refused(anchor: list[float]) -> None:
    anchor_V = torch.tensor(anchor, dtype=torch.float64)
    weight_V = torch.ones(3, dtype=torch.float64)
    third_V = weight_V / 3
    for call in (
        lambda: escort.escort(anchor_V, third_V, 0.4),
        lambda: escort.tilted_oracle(weight_V, anchor_V),
        lambda: opo.lagrange(weight_V, anchor_V, 1.0),
        lambda: opo.hilbert_projection(weight_V, anchor_V),
        lambda: simplex.project(weight_V, anchor_V),
        lambda: surrogate.optimum(weight_V, anchor_V, 1.0),
    ):
        with pytest.raises(ProxstepError, match="anchor_V must"):
            call()
    with pytest.raises(ProxstepError, match="target_V must"):
        escort.escort(third_V, anchor_V, 0.4)


def test_numbers_out_of_range_are_refused() -> None:
    case, model = Case(0), Model(0)
    weight_V, anchor_V = case.weight_V, case.anchor_V
    context = (model.score_VP, model.prob_V, model.advantage_V)
    refused = {
        "mu is 0": lambda: opo.closed_form(weight_V, anchor_V, 0.0),
        "mu is -1": lambda: opo.lagrange(weight_V, anchor_V, -1.0),
        "mu is nan": lambda: opo.mirror_step(weight_V, weight_V, anchor_V, float("nan")),
        "mu is inf": lambda: simplex.constrained_optimum(weight_V, anchor_V, float("inf")),
        "mu is -2": lambda: surrogate.optimum(weight_V, anchor_V, -2.0),
        "mu is -3": lambda: descent.path(weight_V, weight_V, -3.0, 0.1, 1),
        "mu is -4": lambda: trust_region.radius_of(weight_V, anchor_V, -4.0),
        "step_size is 0": lambda: descent.path(weight_V, weight_V, 1.0, 0.0, 1),
        "radius is 0": lambda: trust_region.optimum(weight_V, anchor_V, 0.0),
        "alpha is 1.1": lambda: escort.escort(anchor_V, case.target_V, 1.1),
        "alpha is nan": lambda: escort.escort(anchor_V, case.target_V, float("nan")),
        "negative mean": lambda: surrogate.optimum(-weight_V, anchor_V, 1.0),
        "damping is -1": lambda: fisher.natural_gradient(*context, -1.0),
        "damping is 0": lambda: isopo.minsr(model.score_VP, model.advantage_V, 0.0),
    }
    for message, call in refused.items():
        with pytest.raises(ProxstepError, match=message):
            call()

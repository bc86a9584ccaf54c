"""GOPO's targets: the projection's conditions, its closed form, and the loss that goes to them."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.loss_cases import SEEDS, Case, assert_close, loss_and_gradient, make_case

from proxstep.algorithms import ALGORITHMS, SignalInputs
from proxstep.algorithms.gopo import bounded_target
from proxstep.errors import ProxstepError

GROUPS = torch.tensor([5, -2, 5, 9, -2, 5, 9, -2, -2])  # sizes 3, 4, 2 in no order


def centered(seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    advantage = scale * torch.randn(len(GROUPS), generator=generator, dtype=torch.float64)
    for label in GROUPS.unique():
        advantage[label == GROUPS] -= advantage[label == GROUPS].mean()
    return advantage


def bisected(advantages: list[float], mu: float) -> list[float]:
    """Equation 20, as the paper solves it."""
    low, high = min(advantages) - mu, max(advantages) + mu
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(max(-1.0, (a - middle) / mu) for a in advantages)
        low, high = (middle, high) if total > 0 else (low, middle)
    return [max(-1.0, (a - low) / mu) for a in advantages]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mu", [0.05, 0.5, 3.0])
def test_equals_the_bisection_of_each_group(seed, mu):
    advantage = centered(seed)
    target = bounded_target(advantage, GROUPS, mu=mu)
    for label in GROUPS.unique():
        member = label == GROUPS
        expected = bisected(advantage[member].tolist(), mu)
        assert_close(target[member], torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    mu=st.floats(1e-3, 10),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    weighted=st.booleans(),
)
def test_the_target_is_the_projection(seed, mu, scale, weighted):
    """The conditions of Karush, Kuhn and Tucker for min sum_i w_i (v_i - A_i / mu)^2 under
    sum_i w_i v_i = 0 and v_i >= -1: a multiplier for the sum, one of at least 0 for each bound.
    """
    advantage, generator = centered(seed, scale), torch.Generator().manual_seed(seed + 1)
    weight = 0.1 + torch.rand(len(GROUPS), generator=generator, dtype=torch.float64)
    if not weighted:
        weight = torch.ones_like(weight)
    target = bounded_target(advantage, GROUPS, mu=mu, importance=weight if weighted else None)
    assert (target >= -1).all()
    for label in GROUPS.unique():
        member = label == GROUPS
        v, a, w = target[member], advantage[member], weight[member]
        size = 1 + v.abs().max().item()
        assert (w * v).sum().abs().item() <= 1e-11 * size
        free = v > -1
        multiplier = a - mu * v  # lambda where free, at most lambda at the bound
        level = multiplier[free].mean()
        assert_close(multiplier[free], level.expand(int(free.sum())), tolerance=1e-10)
        assert (multiplier[~free] <= level + 1e-10).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_where_no_advantage_is_below_minus_mu_the_target_is_the_advantage_over_mu(seed):
    advantage = centered(seed)
    mu = -advantage.min().item()
    assert_close(bounded_target(advantage, GROUPS, mu=mu), advantage / mu)
    assert bounded_target(advantage, GROUPS, mu=mu).min().item() == pytest.approx(-1)
    below = bounded_target(advantage, GROUPS, mu=0.9 * mu)
    assert not torch.allclose(below, advantage / (0.9 * mu))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_constant_added_to_a_groups_advantages_changes_nothing(seed):
    advantage = centered(seed)
    shift = torch.where(GROUPS == 5, 3.0, -7.0)
    assert_close(bounded_target(advantage + shift, GROUPS), bounded_target(advantage, GROUPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e4])
def test_equal_advantages_give_exactly_no_target(dtype, value):
    target = bounded_target(torch.full((9,), value, dtype=dtype), GROUPS)
    assert target.dtype == dtype
    assert (target == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_advantages_take_all_there_is_to_take(dtype):
    advantage = torch.tensor([1e6, -1e6, 0.0, 0.0], dtype=dtype)
    target = bounded_target(advantage, torch.zeros(4, dtype=torch.int64), mu=1e-3)
    assert target.tolist() == [3.0, -1.0, -1.0, -1.0]


def test_the_common_case_of_a_prompt_that_mostly_succeeds():
    """Rewards 1, 1, 1, 0 at the paper's mu: the failure is at its bound."""
    advantage = torch.tensor([0.25, 0.25, 0.25, -0.75], dtype=torch.float64)
    target = bounded_target(advantage, torch.zeros(4, dtype=torch.int64))
    assert_close(target, [1 / 3, 1 / 3, 1 / 3, -1.0])
    rare = -advantage
    assert_close(bounded_target(rare, torch.zeros(4, dtype=torch.int64)), rare / 0.5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mu", [0.2, 0.5, 4.0])
def test_where_no_target_is_at_its_bound_the_loss_is_opos_with_the_advantage_as_drive(seed, mu):
    """Equation 21, up to its constant."""
    case = make_case(seed)
    given = Case(*case.tensors[:2], case.advantages / mu, case.response_mask)
    gopo = loss_and_gradient("gopo", given, mu=mu)
    opo = loss_and_gradient("opo", case, mu=mu, surrogate="ratio")
    assert_close(gopo[1], opo[1])
    kept = case.response_mask.any(dim=1)
    assert_close(gopo[0] - opo[0], (case.advantages[kept].square() / (2 * mu)).mean())
    for name, value in gopo[2].items():
        assert_close(value, opo[2][name])


@pytest.mark.parametrize("seed", SEEDS)
def test_at_the_old_policy_the_gradient_is_minus_mu_times_the_target(seed):
    case = make_case(seed).on_policy()
    _, gradient, _ = loss_and_gradient("gopo", case, mu=0.7)
    num_sequences = case.response_mask.any(dim=1).sum()
    assert_close(gradient, -0.7 * case.advantages[:, None] * case.response_mask / num_sequences)


def test_the_signal_is_the_target_and_says_how_often_it_is_bounded():
    advantage = torch.tensor([0.25, 0.25, 0.25, -0.75])
    importance = torch.tensor([1.0, 0.5, 1.0, 2.0])
    group = torch.zeros(4, dtype=torch.int64)
    signal = ALGORITHMS["gopo"].signal(
        SignalInputs(advantage, group, None, importance), {"mu": 0.5}
    )
    expected = bounded_target(advantage, group, mu=0.5, importance=importance)
    assert torch.equal(signal.value_B, expected)
    assert signal.importance_B is importance
    assert signal.metrics == {"frac_target_at_bound": 0.25}


def test_wrong_inputs_are_refused():
    group = torch.tensor([0, 0])
    unchecked = inspect.unwrap(bounded_target)  # past the shape checks of the test suite
    with pytest.raises(ProxstepError, match="mu is 0"):
        unchecked(torch.ones(2), group, mu=0.0)
    with pytest.raises(ProxstepError, match=r"advantages\[1\] is inf"):
        unchecked(torch.tensor([0.0, float("inf")]), group)
    for weight in (0.0, -1.0, float("inf")):
        with pytest.raises(ProxstepError, match="importance"):
            unchecked(torch.ones(2), group, importance=torch.tensor([1.0, weight]))
    with pytest.raises(ProxstepError, match="mu is"):
        ALGORITHMS["gopo"].loss(*make_case(0).tensors, mu=-1.0)

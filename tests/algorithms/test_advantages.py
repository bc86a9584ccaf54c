import inspect
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxstep.algorithms.advantages import (
    ADVANTAGES,
    batch_normalized,
    group_centered,
    group_zscore,
)
from proxstep.errors import ProxstepError

EPS = 1e-6
GROUPS = torch.tensor([41, -3, 41, 7, -3, 41, 7, -3, -3])  # sizes 3, 4, 2 in no order


NONNEGATIVE = ("maxrl",)
"""Kinds that refuse a reward below 0."""


def random_rewards(seed: int, dtype: torch.dtype = torch.float64, name: str = "") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    reward = (5 * torch.randn(len(GROUPS), generator=generator, dtype=torch.float64)).to(dtype)
    return reward.abs() if name in NONNEGATIVE else reward


def loop(name: str, reward: list[float], group: list[int]) -> list[float]:
    """The formulas, one sequence at a time."""
    advantages = []
    of_group = {g: [r for r, h in zip(reward, group, strict=True) if h == g] for g in group}
    centered = [r - statistics.mean(of_group[g]) for r, g in zip(reward, group, strict=True)]
    for b, own in enumerate(reward):
        members = of_group[group[b]]
        others = [r for c, r in enumerate(reward) if group[c] == group[b] and c != b]
        if name == "group-zscore":
            advantage = (own - statistics.mean(members)) / (statistics.stdev(members) + EPS)
        elif name == "group-centered":
            advantage = own - statistics.mean(members)
        elif name == "leave-one-out":
            advantage = own - statistics.mean(others)
        elif name == "batch-normalized":
            advantage = (own - statistics.mean(reward)) / (statistics.stdev(reward) + EPS)
        elif name == "group-centered-batch-scaled":
            advantage = centered[b] / (statistics.stdev(centered) + EPS)
        else:
            mean = statistics.mean(members)
            advantage = (own - mean) / mean if mean > 0 else 0.0
        advantages.append(advantage)
    return advantages


LOOPS = (
    "group-zscore",
    "group-centered",
    "leave-one-out",
    "batch-normalized",
    "group-centered-batch-scaled",
    "maxrl",
)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_loop(name, seed):
    reward = random_rewards(seed, name=name)
    advantage, _ = ADVANTAGES[name](reward, GROUPS)
    expected = loop(name, reward.tolist(), GROUPS.tolist())
    torch.testing.assert_close(advantage, torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), name=st.sampled_from(LOOPS))
def test_equals_the_loop_on_any_groups(data, name):
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    count = len(sizes)
    labels = data.draw(st.lists(st.integers(-99, 99), min_size=count, max_size=count, unique=True))
    group = [g for g, size in zip(labels, sizes, strict=True) for _ in range(size)]
    group = data.draw(st.permutations(group))
    lowest = 0 if name in NONNEGATIVE else -100
    values = st.floats(lowest, 100).map(lambda value: round(value, 3))
    reward = data.draw(st.lists(values, min_size=len(group), max_size=len(group)))
    advantage, metrics = ADVANTAGES[name](
        torch.tensor(reward, dtype=torch.float64), torch.tensor(group)
    )
    expected = torch.tensor(loop(name, reward, group), dtype=torch.float64)
    torch.testing.assert_close(advantage, expected, rtol=1e-9, atol=1e-9)

    spreads = [[r for r, g in zip(reward, group, strict=True) if g == label] for label in labels]
    assert metrics["num_groups"] == len(sizes)
    flat = sum(max(members) == min(members) for members in spreads)
    assert metrics["frac_reward_zero_std"] == pytest.approx(flat / len(spreads))
    std = statistics.mean(statistics.stdev(members) for members in spreads)
    assert metrics["reward_std"] == pytest.approx(std, abs=1e-9)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 49])
def test_equal_rewards_give_exact_zeros(name, dtype, value, size):
    value = abs(value) if name in NONNEGATIVE else value
    reward = torch.full((2 * size,), value, dtype=dtype)
    advantage, metrics = ADVANTAGES[name](reward, torch.arange(2 * size) % 2)
    assert (advantage == 0).all()
    assert advantage.dtype == dtype
    assert metrics == {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "num_groups": 2.0}


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "batch-normalized"])
def test_only_the_group_without_spread_is_zero(name):
    reward, group = torch.tensor([0.1, 0.0, 0.1, 1.0, 0.1]), torch.tensor([5, 2, 5, 2, 5])
    advantage, metrics = ADVANTAGES[name](reward, group)
    assert (advantage == 0).tolist() == [True, False, True, False, True]
    assert metrics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype_and_permutes_with_the_batch(name, dtype):
    reward = random_rewards(3, dtype, name)
    advantage, metrics = ADVANTAGES[name](reward, GROUPS)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    permuted, permuted_metrics = ADVANTAGES[name](reward[order], GROUPS[order])
    assert advantage.dtype == dtype
    torch.testing.assert_close(permuted, advantage[order])
    assert permuted_metrics == pytest.approx(metrics)
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("name", ["group-zscore", "batch-normalized"])
def test_zscore_has_unit_unbiased_standard_deviation(name):
    reward, group = random_rewards(4), torch.zeros(len(GROUPS), dtype=torch.int64)
    advantage, _ = ADVANTAGES[name](reward, group)
    assert advantage.std(correction=1).item() == pytest.approx(1, abs=1e-5)
    assert advantage.mean().item() == pytest.approx(0, abs=1e-12)


def test_eps_is_in_reward_units():
    reward, group = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([0, 0])
    advantage, _ = group_zscore(reward, group, eps=2**0.5)
    assert advantage.tolist() == pytest.approx([-1 / 8**0.5, 1 / 8**0.5])
    assert torch.equal(advantage, batch_normalized(reward, group, eps=2**0.5)[0])


def test_a_constant_added_to_the_rewards_does_not_matter():
    reward = random_rewards(5, torch.float32).round()
    plain, _ = group_zscore(reward, GROUPS)
    shifted, _ = group_zscore(reward + 4096.0, GROUPS)
    assert torch.equal(plain, shifted)


@pytest.mark.parametrize(
    "name", ["group-zscore", "leave-one-out", "group-centered-batch-scaled", "maxrl"]
)
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ProxstepError, match=r"1 of 2 groups have only one.*num_generations"):
        ADVANTAGES[name](torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))


def test_a_group_of_one_has_centered_advantage_zero_and_counts_as_flat():
    reward = torch.tensor([1.0, 0.0, 0.7])
    advantage, metrics = group_centered(reward, torch.tensor([0, 0, 1]))
    assert advantage.tolist() == [0.5, -0.5, 0.0]
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward_std"] == pytest.approx(0.5**0.5 / 2)


def test_a_batch_of_one_is_refused_by_batch_normalized():
    with pytest.raises(ProxstepError, match="at least two sequences"):
        batch_normalized(torch.tensor([1.0]), torch.tensor([0]))


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_named(name, bad):
    with pytest.raises(ProxstepError, match=r"reward_B\[2\] is -?(nan|inf)"):
        ADVANTAGES[name](torch.tensor([1.0, 0.0, bad, 0.0]), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_wrong_inputs_are_refused(name):
    function = inspect.unwrap(ADVANTAGES[name])  # past the shape checks of the test suite
    with pytest.raises(ProxstepError, match="empty"):
        function(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ProxstepError, match="one entry per sequence"):
        function(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ProxstepError, match=r"reward_B\.float"):
        function(torch.tensor([0, 1]), torch.tensor([0, 0]))

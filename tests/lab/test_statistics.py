"""Estimates over seeds, against closed forms and data with known answers."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
from scipy import stats

from proxstep.lab import statistics as ours


def test_an_interquartile_mean_is_of_the_middle_half_of_all_tasks() -> None:
    first, second = np.array([0.0, 0.4, 0.5, 9.0]), np.array([-7.0, 0.6, 0.7, 0.3])
    assert ours.interquartile_mean(first, second) == pytest.approx((0.3 + 0.4 + 0.5 + 0.6) / 4)


def test_the_probability_of_improvement_counts_pairs_and_half_the_ties() -> None:
    first, second = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    wins = np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in second] for a in first])
    assert ours.improvement(1)(first, second) == pytest.approx(wins)
    assert ours.improvement(2)(first, second, second, first) == pytest.approx(0.5)


def test_the_saving_is_a_share_of_the_seconds() -> None:
    one, other = np.array([1.0, 1.0]), np.array([4.0, 4.0])
    for samples, share in (((one, other), 0.75), ((other, one), -3.0)):
        found = ours.share_saved(ours.Estimate(ours.log_ratio(1)(*samples)))
        assert found.value == pytest.approx(share)


def test_a_saving_is_as_sure_whichever_of_the_two_is_named_first() -> None:
    """Shares were not: 1 - a/b is at most 1, and its inverse goes far below -1."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        one, other = np.exp(rng.normal(0.0, 0.6, 5)), np.exp(rng.normal(1.0, 0.6, 5))
        found = ours.estimate(ours.log_ratio(1), [one, other])
        turned = ours.estimate(ours.log_ratio(1), [other, one])
        assert found.value == pytest.approx(-turned.value)
        assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low), abs=0.1)
        assert ours.share_saved(found).is_certain == found.is_certain
        assert ours.share_saved(found).high < 1


def test_estimates_repeat_to_the_bit_and_one_run_has_no_interval() -> None:
    sample = [np.random.default_rng(0).normal(size=6)]
    assert ours.estimate(ours.interquartile_mean, sample) == ours.estimate(
        ours.interquartile_mean, sample
    )
    alone = ours.estimate(ours.interquartile_mean, [np.array([0.5])])
    assert alone.value == 0.5
    assert isnan(alone.low)
    assert alone.text() == "0.500"
    assert not alone.is_certain


def test_limits_hold_and_equal_runs_have_no_spread() -> None:
    apart = [np.array([1.0, 2.0, 3.0]), np.array([-1.0, -2.0, -3.0])]
    assert ours.estimate(ours.improvement(1), apart, limits=(0, 1)).high == 1.0
    better = ours.improvement_estimate(apart[:1], apart[1:])
    assert (better.value, better.low, better.high) == (1.0, pytest.approx(0.025 ** (1 / 3)), 1.0)
    worse = ours.improvement_estimate(apart[1:], apart[:1])
    assert (worse.low, worse.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 3)))
    same = ours.estimate(ours.difference(1), [np.ones(4), np.ones(4)])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("runs", [3, 5])
def test_few_runs_are_covered(runs: int) -> None:
    """All of it, with 1,000 draws: scripts/check_statistics.py."""
    rng = np.random.default_rng(runs)
    found = [
        ours.estimate(ours.interquartile_mean, [rng.normal(0.6, 0.05, runs)]) for _ in range(200)
    ]
    share = np.mean([estimate.low <= 0.6 <= estimate.high for estimate in found])
    assert 0.9 <= share <= 0.985


def test_pairs_are_resampled_together_in_every_task() -> None:
    """Where the second is the first and a constant, no resample has another difference."""
    rng = np.random.default_rng(1)
    tasks = [rng.normal(size=5), rng.normal(3, 2, size=8)]
    other = [own - 0.25 for own in tasks]
    found = ours.estimate(ours.difference(2), [*tasks, *other], paired=True)
    assert (found.low, found.high) == (pytest.approx(0.25), pytest.approx(0.25))
    assert ours.estimate(ours.difference(2), [*tasks, *other]).low < 0


def test_an_interval_of_pairs_is_that_of_the_differences_for_a_mean() -> None:
    """The bootstrap's spread of a mean is known: the differences', over sqrt(n)."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=40), rng.normal(size=40)
    mean = lambda one, other, axis=-1: one.mean(axis=axis) - other.mean(axis=axis)  # noqa: E731
    found = ours.estimate(mean, [first, second], paired=True)
    assert found.error == pytest.approx(np.std(first - second) / 40**0.5, rel=0.05)
    critical = stats.t.ppf(0.975, 39)
    assert found.high - found.low == pytest.approx(2 * critical * found.error, rel=0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_pairs_are_covered(correlation: float) -> None:
    """All of it, with 1,000 draws: scripts/check_statistics.py."""
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(200):
        luck = correlation**0.5 * rng.normal(size=5)
        own = [luck + (1 - correlation) ** 0.5 * rng.normal(size=5) for _ in range(2)]
        found = ours.estimate(ours.difference(1), own, paired=True)
        hits.append(found.low <= 0 <= found.high)
    assert 0.9 <= np.mean(hits) <= 0.985


def test_pairs_need_more_seeds_for_the_same_error() -> None:
    """A t test of one sample has half the degrees of freedom of one of two."""
    assert ours.seeds_needed(0.75, 5**-0.5, 5, paired=True) == 16
    assert ours.seeds_needed(0.75, 5**-0.5, 5) == 15


@pytest.mark.parametrize(("effect", "textbook"), [(0.5, 64), (0.8, 26), (1.0, 17), (1.5, 9)])
def test_the_power_is_the_textbooks(effect: float, textbook: int) -> None:
    """Cohen 1988, table 2.4.1: runs of each of two groups for a power of 0.8 at 5 %."""
    assert ours.seeds_needed(effect, np.sqrt(2 / 5), 5) == textbook


@pytest.mark.parametrize("effect", [0.0, nan, 1e-9])
def test_no_difference_needs_more_seeds_than_anybody_has(effect: float) -> None:
    assert ours.seeds_needed(effect, 0.1, 5) == ours.MOST_SEEDS


def test_a_difference_without_spread_needs_two_seeds() -> None:
    assert ours.seeds_needed(0.1, 0.0, 5) == 2


def test_a_value_is_taken_when_the_budget_is_first_spent() -> None:
    assert ours.value_at([0.0, 0.2], [0.0, 1.0], 0.05) == pytest.approx(0.25)
    assert ours.value_at([0.0, 0.2], [0.1, 1.0], 0.0) == 0.1
    assert ours.value_at([0.0, 0.2, 0.1, 0.2], [0.0, 0.5, 0.9, 1.0], 0.2) == 0.5
    assert isnan(ours.value_at([0.0, 0.2], [0.0, 1.0], 0.3))
    assert isnan(ours.value_at([0.1, 0.2], [0.0, 1.0], 0.05))
    assert isnan(ours.value_at([], [], 0.1))
    assert isnan(ours.value_at([0.0, nan], [0.0, 1.0], 0.1))

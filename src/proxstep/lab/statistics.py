"""What can be said of a few runs: estimates with intervals, and how many runs would say more.

`Samples` are one array of runs for each task: runs are resampled within their task (a stratified
bootstrap). Intervals are the bootstrap's, widened for few runs: plain percentiles of five runs
cover the truth in 90 of 100 cases, of three in 76, where they promise 95
(`scripts/check_statistics.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf, isnan, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from proxstep.runs.reading import MISSING

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Samples = Sequence[Array]
Statistic = Callable[..., Any]
Redraw = Callable[..., list[Array]]
"""From the places of resampled runs, an array for each of the samples, to their values."""

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1000
_NUM_RESAMPLES = 4000
_FEWEST_TRIMMED = 4  # of fewer runs an interquartile mean is the mean
FEWEST_PAIRED = 4
"""Runs from which on pairs by seed make intervals shorter, with the correlations seen here."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, NaN at both ends where one run alone was measured.

    Attributes:
        value: The value.
        low: The interval's lower end.
        high: Its upper end.
        error: The standard error.
    """

    value: float
    low: float = nan
    high: float = nan
    error: float = nan

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def text(self, sign: str = "") -> str:
        """Return the value with its interval.

        >>> Estimate(0.2, 0.05, 0.35).text("+"), Estimate(0.2).text()
        ('+0.200 [+0.050, +0.350]', '0.200')
        """
        if isnan(self.value):
            return MISSING
        ends = "" if isnan(self.low) else f" [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"
        return f"{self.value:{sign}.3f}{ends}"

    def percent(self) -> str:
        """Return a share in percent.

        >>> Estimate(0.18, 0.11, 0.25).percent()
        '18 % [11, 25]'
        """
        if isnan(self.value):
            return MISSING
        ends = "" if isnan(self.low) else f" [{100 * self.low:.0f}, {100 * self.high:.0f}]"
        return f"{100 * self.value:.0f} %{ends}"


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return a mean with its 95 % interval by Student's t.

    >>> mean_interval([1.0, 2.0, 3.0])
    Estimate(value=2.0, low=-0.484..., high=4.484..., error=0.577...)
    """
    middle = float(np.mean(values))
    if len(values) == 1:
        return Estimate(middle)
    error = float(np.std(values, ddof=1)) / sqrt(len(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Estimate(middle, middle - half, middle + half, error)


def interquartile_mean(*samples: Array, axis: int = -1) -> Any:
    """Return the mean of the middle half of all runs of all tasks, a quarter cut off at each end.

    >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 30.0])))
    1.5
    """
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def difference(num_first: int) -> Statistic:
    """Return the statistic of two algorithms' samples: difference of interquartile means.

    Args:
        num_first: How many of the samples are the first algorithm's.
    """

    def statistic(*samples: Array, axis: int = -1) -> Any:
        first = interquartile_mean(*samples[:num_first], axis=axis)
        return first - interquartile_mean(*samples[num_first:], axis=axis)

    return statistic


def log_ratio(num_first: int) -> Statistic:
    """Return the statistic of two algorithms' samples, which are positive: how much more one has.

    It is log(interquartile mean of the second) - log(that of the first). Exchanged, they are as far
    apart: a ratio and its inverse are not, so that one could be told from 1 and the other not.
    """

    def statistic(*samples: Array, axis: int = -1) -> Any:
        first = interquartile_mean(*samples[:num_first], axis=axis)
        return np.log(interquartile_mean(*samples[num_first:], axis=axis)) - np.log(first)

    return statistic


def share_saved(found: Estimate) -> Estimate:
    """Return the share that the first spends less, from a `log_ratio`; its error stays.

    >>> share_saved(Estimate(0.0, -0.5, 0.5)).percent()
    '0 % [-65, 39]'
    """
    value, low, high = (1 - exp(-x) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.error)


def improvement(num_first: int) -> Statistic:
    """Return the statistic: probability that a run of the first is above one of the second.

    Ties count one half; tasks are averaged.
    """

    def statistic(*samples: Array, axis: int = -1) -> Any:
        tasks = [
            stats.mannwhitneyu(first, second, axis=axis, method="asymptotic").statistic
            / (first.shape[axis] * second.shape[axis])
            for first, second in zip(samples[:num_first], samples[num_first:], strict=True)
        ]
        return np.mean(tasks, axis=0)

    return statistic


def estimate(
    statistic: Statistic,
    samples: Samples,
    *,
    confidence: float = CONFIDENCE,
    limits: tuple[float, float] = (-inf, inf),
    widened: bool = True,
    redraw: Redraw | None = None,
    paired: bool = False,
) -> Estimate:
    """Return a statistic with its interval by a stratified bootstrap.

    The ends of the percentile interval are moved away from the value by the factor by which
    Student's t exceeds the normal distribution, and for fewer than four runs also by
    sqrt(n / (n - 1)). The resamples are the same in every call.

    Args:
        statistic: A function of the samples and `axis`, such as `interquartile_mean`.
        samples: One array of runs for each task, and algorithm where there are two.
        confidence: The share of intervals that are to hold the truth.
        limits: What the value cannot exceed.
        widened: False for the bare percentiles.
        redraw: What resampled runs are, where that depends on which others were drawn
            (choosing.py). The interval is then as wide to both sides, by the resamples' standard
            deviation: their percentiles hold the truth too often.
        paired: The second half of the samples is another algorithm's on the same tasks, whose runs
            have the seeds of the first one's, in order: both are resampled together.
    """
    value = float(statistic(*samples, axis=-1))
    fewest = min(len(sample) for sample in samples)
    if fewest < 2 or isnan(value):
        return Estimate(value)
    drawn_apart = samples[: len(samples) // 2] if paired else samples
    drawn = _resampled(statistic, samples, drawn_apart, redraw)
    small = sqrt(fewest / (fewest - 1)) if fewest < _FEWEST_TRIMMED else 1.0
    error = small * float(np.std(drawn))
    level = (1 + CONFIDENCE) / 2 if widened else (1 + confidence) / 2
    critical = float(stats.t.ppf((1 + confidence) / 2, sum(len(one) - 1 for one in drawn_apart)))
    if redraw is not None:
        low, high = -critical * error, critical * error
    else:
        factor = small * critical / float(stats.norm.ppf(level)) if widened else 1.0
        low, high = factor * (np.quantile(drawn, [1 - level, level]) - value)
    ends = max(value + float(low), limits[0]), min(value + float(high), limits[1])
    return Estimate(value, *ends, error)


def _resampled(
    statistic: Statistic, samples: Samples, drawn_apart: Samples, redraw: Redraw | None
) -> Array:
    """Return the statistic of each resample.

    Args:
        statistic: As in `estimate`.
        samples: As in `estimate`.
        drawn_apart: All of the samples, or their first half where the second is drawn with it.
        redraw: As in `estimate`.
    """

    def of_places(*places: Indices, axis: int) -> Any:
        if len(drawn_apart) < len(samples):
            places = (*places, *places)
        if redraw is not None:
            return statistic(*redraw(*places), axis=axis)
        return statistic(*(one[i] for one, i in zip(samples, places, strict=True)), axis=axis)

    return stats.bootstrap(
        [np.arange(len(sample)) for sample in drawn_apart],
        of_places,
        n_resamples=_NUM_RESAMPLES,
        method="percentile",
        vectorized=True,
        axis=-1,
        rng=np.random.default_rng(0),
    ).bootstrap_distribution


def improvement_estimate(first: Samples, second: Samples, redraw: Redraw | None = None) -> Estimate:
    """Return the probability that a run of the first is above one of the second, with its interval.

    Where every run of one is above every run of the other no resample differs. The interval is then
    that of as many pairs of runs, none in common, all of them won (Clopper and Pearson).
    """
    samples, limits = [*first, *second], (0.0, 1.0)
    found = estimate(improvement(len(first)), samples, limits=limits, redraw=redraw)
    if isnan(found.low) or 0 < found.value < 1:
        return found
    pairs = sum(min(len(one), len(other)) for one, other in zip(first, second, strict=True))
    bound = ((1 - CONFIDENCE) / 2) ** (1 / pairs)
    ends = (bound, 1.0) if found.value == 1 else (0.0, 1 - bound)
    return Estimate(found.value, *ends, found.error)


def seeds_needed(
    effect: float,
    error: float,
    seeds: int,
    *,
    confidence: float = CONFIDENCE,
    paired: bool = False,
) -> int:
    """Return how many seeds each would tell a difference as large as the observed one.

    That many let a two-sided t test find it in four of five comparisons, if the true difference and
    spread are the observed ones, which few seeds know only roughly.

    Args:
        effect: The difference.
        error: Its standard error with the seeds that there are.
        seeds: How many there are of each algorithm.
        confidence: One minus the rate of false alarms.
        paired: Whether the runs of a seed are compared with each other.

    Returns:
        The number; `MOST_SEEDS` stands for that many and more.
    """
    if not abs(effect) > 0 or isnan(error):
        return MOST_SEEDS

    def tells(number: int) -> bool:
        shift = abs(effect) / (error * sqrt(seeds / number)) if error else inf
        if shift > 30:  # beyond what scipy computes, and certain
            return True
        freedom = number - 1 if paired else 2 * number - 2
        critical = stats.t.ppf((1 + confidence) / 2, freedom)
        return bool(stats.nct.sf(critical, freedom, shift) >= POWER)

    fewest = FEWEST_PAIRED if paired else 2
    return bisect_left(range(MOST_SEEDS), True, lo=fewest, key=tells)


def area_under_curve(steps: Sequence[float], values: Sequence[float]) -> float:
    """Return a curve's mean height over its steps, by trapezoids.

    >>> area_under_curve([0, 10, 20], [0.0, 1.0, 1.0])
    0.75
    """
    if len(steps) < 2:
        return nan
    return float(np.trapezoid(values, steps)) / (steps[-1] - steps[0])


def value_at(spent: Sequence[float], values: Sequence[float], budget: float) -> float:
    """Return what a run had when it had first spent a budget, interpolated; NaN if it never did.

    What is spent is taken at its running maximum: a policy that comes back has been there.
    NaN in it was not measured.

    >>> value_at([0.0, 0.1, 0.05, 0.3], [0.2, 0.4, 0.5, 0.7], 0.2)
    0.6
    """
    most = np.fmax.accumulate(np.asarray(spent, dtype=float))
    if not len(most) or not most[0] <= budget <= most[-1]:
        return nan
    after = int(np.searchsorted(most, budget))
    if after == 0 or most[after] == budget:
        return float(values[after])
    share = (budget - most[after - 1]) / (most[after] - most[after - 1])
    return float(values[after - 1] + share * (values[after] - values[after - 1]))

"""A comparison's figures: each algorithm's, and those of each pair, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan, nan

import numpy as np

from proxstep.lab import statistics
from proxstep.lab.halving import read_note
from proxstep.lab.outcomes import (
    Chosen,
    Outcome,
    choose,
    outcomes_by_algorithm,
    plans_of,
    varied_keys,
)
from proxstep.lab.plan import is_of_task
from proxstep.lab.statistics import (
    CONFIDENCE,
    Array,
    Estimate,
    estimate,
    improvement_estimate,
    interquartile_mean,
)
from proxstep.runs.reading import Run

BEST = "best of the grid"
Measure = Callable[[Outcome], float]


@dataclass(frozen=True)
class Standing:
    """One algorithm's scores: interquartile means over tasks and seeds.

    Attributes:
        algorithm: Its name.
        seeds: Number of runs that were measured, of the task with the fewest.
        final: At the last evaluation.
        best: At the best evaluation of each run.
        area: Mean over the steps.
        at_kl: When the setting's KL was spent.
        after: After the setting's seconds.
    """

    algorithm: str
    seeds: int
    final: Estimate
    best: Estimate
    area: Estimate
    at_kl: Estimate
    after: Estimate


@dataclass(frozen=True)
class Pair:
    """Two algorithms against each other, the one with the higher final score first.

    Attributes:
        first: Its name.
        second: The other's.
        seeds: Number of runs of the one with fewer.
        final: Difference of the final scores.
        better: Probability that a run of the first ends higher than one of the second.
        area: Difference of the mean scores over the steps.
        at_kl: Difference of the scores when the setting's KL was spent.
        after: Difference of the scores after the setting's seconds.
        kl_saved: Share of the KL that the first spends less at equal score.
        kl_saved_by_second: The same of the second.
        adjusted: Whether the difference is told from chance when all pairs are looked at.
        kl_adjusted: The same of the KL.
        seeds_needed: Seeds that would tell a final difference as large as this.
    """

    first: str
    second: str
    seeds: int
    final: Estimate
    better: Estimate
    area: Estimate
    at_kl: Estimate
    after: Estimate
    kl_saved: Estimate
    kl_saved_by_second: Estimate
    adjusted: bool
    kl_adjusted: bool
    seeds_needed: int


@dataclass(frozen=True)
class Setting:
    """All algorithms at equal values, or each at its best.

    Attributes:
        name: The values, `BEST`, or nothing where nothing is tuned.
        standings: One for each algorithm.
        pairs: Each two of them.
        kl: The largest KL that every run spent, in nats per token.
        seconds: The longest time that every run took.
    """

    name: str
    standings: list[Standing]
    pairs: list[Pair]
    kl: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        settings: The first is what the verdict is about: each algorithm at its best, where values
            were tuned; then all algorithms at each of the values.
        chosen: Each algorithm's runs in that first setting.
        tuned: The tuned keys, as text, such as "learning_rate".
        varied: All varied keys.
        halving: What is to be told of a halving, where there was one.
    """

    settings: list[Setting]
    chosen: dict[str, Chosen]
    tuned: str
    varied: list[str]
    halving: list[str]

    @property
    def runs(self) -> list[Run]:
        """The runs of the first setting."""
        return [outcome.run for chosen in self.chosen.values() for outcome in chosen.outcomes]


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Return the figures of all runs, tuned values read from the plans beside them."""
    groups = outcomes_by_algorithm(runs)
    varied = varied_keys(runs)
    chosen = {algorithm: choose(outcomes) for algorithm, outcomes in groups.items()}
    values = list(dict.fromkeys(o.tuned for outcomes in groups.values() for o in outcomes))
    best = {algorithm: choice.outcomes for algorithm, choice in chosen.items()}
    tuned = [key.rpartition(".")[2] for key in varied if not is_of_task(key)]
    settings = [_setting(BEST if tuned else "", best)]
    for value in values if len(values) > 1 else ():
        alike = {name: [o for o in group if o.tuned == value] for name, group in groups.items()}
        settings.append(_setting(value, {name: group for name, group in alike.items() if group}))
    halving = [text for folder in plans_of(runs) for text in read_note(folder)]
    return Comparison(settings, chosen, " and ".join(tuned), varied, halving)


def _setting(name: str, groups: dict[str, list[Outcome]]) -> Setting:
    everyone = [outcome for outcomes in groups.values() for outcome in outcomes]
    kl = _shared(max(o.kl, default=nan) for o in everyone)
    seconds = _shared(max(o.seconds, default=nan) for o in everyone)
    standings = [
        Standing(
            algorithm,
            min(map(len, _samples(outcomes, lambda o: o.final)), default=0),
            _of(outcomes, lambda o: o.final),
            _of(outcomes, lambda o: o.best),
            _of(outcomes, lambda o: o.area),
            _of(outcomes, lambda o: o.score_at_kl(kl)),
            _of(outcomes, lambda o: o.score_after(seconds)),
        )
        for algorithm, outcomes in groups.items()
    ]
    measured = [standing for standing in standings if not isnan(standing.final.value)]
    ranked = sorted(measured, key=lambda standing: -standing.final.value)
    couples = list(combinations([standing.algorithm for standing in ranked], 2))
    pairs = [
        _pair(a, b, groups[a], groups[b], kl, seconds, num_pairs=len(couples)) for a, b in couples
    ]
    return Setting(name, standings, pairs, kl, seconds)


def _of(outcomes: Sequence[Outcome], measure: Measure) -> Estimate:
    samples = _samples(outcomes, measure)
    return estimate(interquartile_mean, samples) if samples else Estimate(nan)


def _samples(outcomes: Sequence[Outcome], measure: Measure) -> list[Array]:
    """Return a measure of the runs of each task, in order of their seeds, without NaN."""
    tasks: dict[str, list[float]] = {}
    for outcome in sorted(outcomes, key=lambda o: (o.task, o.run.seed)):
        if not isnan(value := measure(outcome)):
            tasks.setdefault(outcome.task, []).append(value)
    return [np.array(values) for values in tasks.values()]


def _pair(
    first: str,
    second: str,
    ours: Sequence[Outcome],
    theirs: Sequence[Outcome],
    kl: float,
    seconds: float,
    *,
    num_pairs: int,
) -> Pair:
    strict = 1 - (1 - CONFIDENCE) / num_pairs  # Bonferroni: no pair is picked for being extreme

    def against(
        statistic: Callable[[int], statistics.Statistic],
        measure: Measure,
        *,
        flipped: bool = False,
        confidence: float = CONFIDENCE,
    ) -> Estimate:
        one, other = _samples(ours, measure), _samples(theirs, measure)
        if not one or len(one) != len(other):
            return Estimate(nan)
        samples = [*other, *one] if flipped else [*one, *other]
        return estimate(statistic(len(one)), samples, confidence=confidence)

    target = _shared_score([*ours, *theirs])
    kl_at_target: Measure = lambda o: o.kl_at_score(target)  # noqa: E731
    final = against(statistics.difference, lambda o: o.final)
    seeds = min(
        min(map(len, _samples(group, lambda o: o.final)), default=0) for group in (ours, theirs)
    )
    return Pair(
        first,
        second,
        seeds,
        final,
        _better(ours, theirs),
        against(statistics.difference, lambda o: o.area),
        against(statistics.difference, lambda o: o.score_at_kl(kl)),
        against(statistics.difference, lambda o: o.score_after(seconds)),
        against(statistics.saving, kl_at_target),
        against(statistics.saving, kl_at_target, flipped=True),
        against(statistics.difference, lambda o: o.final, confidence=strict).is_certain,
        against(statistics.saving, kl_at_target, confidence=strict).is_certain,
        statistics.seeds_needed(final.value, final.error, seeds, confidence=strict),
    )


def _shared(reached: Iterable[float]) -> float:
    """Return what every run reached, NaN where it was not measured in all of them."""
    values = list(reached)
    return nan if not values or any(map(isnan, values)) else min(values)


def _better(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Estimate:
    one, other = (_samples(group, lambda o: o.final) for group in (ours, theirs))
    return improvement_estimate(one, other) if len(one) == len(other) else Estimate(nan)


def _shared_score(outcomes: Sequence[Outcome]) -> float:
    """Return the highest score that every run reached, NaN where one of them never rose to it."""
    highest = _shared(max(o.scores, default=nan) for o in outcomes)
    lowest = max((o.scores[0] for o in outcomes if o.scores), default=nan)
    return highest if highest > lowest else nan

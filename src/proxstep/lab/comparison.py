"""A comparison's figures: each algorithm's, and those of each pair, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import exp, isnan, log, nan
from statistics import fmean

from proxstep.lab import statistics
from proxstep.lab.choosing import Chosen, Measure
from proxstep.lab.halving import read_note
from proxstep.lab.outcomes import (
    Outcome,
    outcomes_by_algorithm,
    plans_of,
    reference_of,
    varied_keys,
)
from proxstep.lab.plan import is_of_task
from proxstep.lab.statistics import (
    CONFIDENCE,
    FEWEST_PAIRED,
    Array,
    Estimate,
    Indices,
    Redraw,
    estimate,
    improvement_estimate,
    interquartile_mean,
)
from proxstep.runs.reading import Run, fairness_notes

BEST = "best of the grid"


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
    """Two algorithms against each other.

    The one with the higher final score is the first; where all are compared with one, that one is
    the second.

    Attributes:
        first: Its name.
        second: The other's.
        seeds: Number of runs of the one with fewer.
        final: Difference of the final scores.
        better: Probability that a run of the first ends higher than one of the second.
        area: Difference of the mean scores over the steps.
        at_kl: Difference of the scores when the setting's KL was spent.
        after: Difference of the scores after the setting's seconds.
        kl_saved: Share of the KL that the first spends less at equal score, both at the same
            values.
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
    adjusted: bool
    kl_adjusted: bool
    seeds_needed: int

    @property
    def kl_saved_by_second(self) -> Estimate:
        """The share of the KL that the second spends less at equal score."""
        saved = self.kl_saved
        value, high, low = (1 - 1 / (1 - x) for x in (saved.value, saved.low, saved.high))
        return Estimate(value, low, high, saved.error)


@dataclass(frozen=True)
class Setting:
    """All algorithms at equal values, or each at its best.

    Attributes:
        name: The values, `BEST`, or nothing where nothing is tuned.
        standings: One for each algorithm.
        pairs: Each two of them, or those with the one that the others are compared with.
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
        against: The algorithm that every other one is compared with; None for all pairs.
    """

    settings: list[Setting]
    chosen: dict[str, Chosen]
    tuned: str
    varied: list[str]
    halving: list[str]
    against: str | None = None

    @property
    def runs(self) -> list[Run]:
        """The runs of the first setting."""
        return [outcome.run for chosen in self.chosen.values() for outcome in chosen.outcomes]

    @property
    def repeated(self) -> list[str]:
        """Algorithms with several runs of one task, seed and value, of which one is reported."""
        return [algorithm for algorithm, chosen in self.chosen.items() if chosen.repeats]

    @property
    def notes(self) -> list[str]:
        """What makes the runs less comparable than they look, one sentence for each thing."""
        runs = self.runs
        if self.repeated:
            runs = [outcome.run for chosen in self.chosen.values() for outcome in chosen.pool]
        unmeasured = [
            f"{algorithm}, seed {seed}: no score at {value}, which the other seeds chose."
            for algorithm, chosen in self.chosen.items()
            for seed, value in chosen.unmeasured
        ]
        return [*fairness_notes(runs, self.varied), *unmeasured]


def compare_runs(runs: Sequence[Run], against: str | None = None) -> Comparison:
    """Return the figures of all runs, tuned values read from the plans beside them.

    Args:
        runs: Of any number of algorithms.
        against: The algorithm that all others are compared with; by default the plan's, if any.
    """
    groups = outcomes_by_algorithm(runs)
    varied = varied_keys(runs)
    chosen = {algorithm: Chosen(outcomes) for algorithm, outcomes in groups.items()}
    values = list(dict.fromkeys(o.tuned for outcomes in groups.values() for o in outcomes))
    tuned = [key.rpartition(".")[2] for key in varied if not is_of_task(key)]
    against = against or reference_of(runs)
    settings = [_setting(BEST if tuned else "", chosen, against)]
    for value in values if len(values) > 1 else ():
        alike = {name: [o for o in group if o.tuned == value] for name, group in groups.items()}
        own = {name: Chosen(group) for name, group in alike.items() if group}
        settings.append(_setting(value, own, against))
    halving = [text for folder in plans_of(runs) for text in read_note(folder)]
    return Comparison(settings, chosen, " and ".join(tuned), varied, halving, against)


def _setting(name: str, groups: dict[str, Chosen], against: str | None) -> Setting:
    everyone = [outcome for chosen in groups.values() for outcome in chosen.outcomes]
    kl = _shared(max(o.kl, default=nan) for o in everyone)
    seconds = _shared(max(o.seconds, default=nan) for o in everyone)
    standings = [
        Standing(
            algorithm,
            _num_seeds(chosen),
            _of(chosen, lambda o: o.final),
            _of(chosen, lambda o: o.best),
            _of(chosen, lambda o: o.area),
            _of(chosen, lambda o: o.score_at_kl(kl)),
            _of(chosen, lambda o: o.score_after(seconds)),
        )
        for algorithm, chosen in groups.items()
    ]
    measured = [standing for standing in standings if not isnan(standing.final.value)]
    ranked = sorted(measured, key=lambda standing: -standing.final.value)
    names = [standing.algorithm for standing in ranked]
    couples = list(combinations(names, 2))
    if against is not None:
        couples = [(name, against) for name in names if name != against and against in names]
    pairs = [
        _pair(a, b, groups[a], groups[b], kl, seconds, num_pairs=len(couples)) for a, b in couples
    ]
    return Setting(name, standings, pairs, kl, seconds)


def _num_seeds(chosen: Chosen) -> int:
    return min(map(len, chosen.samples(lambda o: o.final)), default=0)


def _of(chosen: Chosen, measure: Measure) -> Estimate:
    samples = chosen.samples(measure)
    if not samples:
        return Estimate(nan)
    return estimate(interquartile_mean, samples, redraw=chosen.redraw(measure))


def redraw_both(first: Chosen, second: Chosen, measure: Measure) -> Redraw | None:
    """Return how two algorithms' samples come out where resampled runs choose again."""
    one, other = first.redraw(measure), second.redraw(measure)
    if one is None and other is None:
        return None
    ours, theirs = first.samples(measure), second.samples(measure)

    def drawn(*places: Indices) -> list[Array]:
        parts = []
        for again, samples, own in (
            (one, ours, places[: len(ours)]),
            (other, theirs, places[len(ours) :]),
        ):
            parts += again(*own) if again else [s[i] for s, i in zip(samples, own, strict=True)]
        return parts

    return drawn


def _pair(
    first: str,
    second: str,
    ours: Chosen,
    theirs: Chosen,
    kl: float,
    seconds: float,
    *,
    num_pairs: int,
) -> Pair:
    strict = 1 - (1 - CONFIDENCE) / num_pairs  # Bonferroni: no pair is picked for being extreme

    def against(
        statistic: Callable[[int], statistics.Statistic], measure: Measure, **options: float
    ) -> Estimate:
        return contrast(statistic, ours, theirs, measure, **options)

    spent = _spent_at_equal_score(ours, theirs)

    def more_spent(**options: float) -> Estimate:
        return contrast(statistics.log_ratio, *spent, lambda o: o.final, **options)

    final = against(statistics.difference, lambda o: o.final)
    seeds = min(map(_num_seeds, (ours, theirs)))
    return Pair(
        first,
        second,
        seeds,
        final,
        _better(ours, theirs),
        against(statistics.difference, lambda o: o.area),
        against(statistics.difference, lambda o: o.score_at_kl(kl)),
        against(statistics.difference, lambda o: o.score_after(seconds)),
        statistics.share_saved(more_spent()),
        against(statistics.difference, lambda o: o.final, confidence=strict).is_certain,
        more_spent(confidence=strict).is_certain,
        statistics.seeds_needed(
            *(final.value, final.error, seeds),
            confidence=strict,
            paired=are_paired(*(each.seeds(lambda o: o.final) for each in (ours, theirs))),
        ),
    )


def _spent_at_equal_score(ours: Chosen, theirs: Chosen) -> tuple[Chosen, Chosen]:
    """Return one outcome for each task and seed, its `final` the KL spent for an equal score.

    Tuned algorithms are held against each other at the same values, since a smaller step spends
    less KL whoever makes it. The geometric mean is taken over the values at which both have the
    same seeds and rise to a score that all their runs reach.
    """
    logs: tuple[dict[tuple[str, int], tuple[Outcome, list[float]]], ...] = ({}, {})
    values = [v for v in ours.values if v in theirs.values]
    for value in values:
        both = [
            {(o.task, o.run.seed): o for o in each.pool if o.tuned == value}
            for each in (ours, theirs)
        ]
        target = _shared_score([o for runs in both for o in runs.values()])
        if isnan(target) or (len(values) > 1 and both[0].keys() != both[1].keys()):
            continue
        for found, runs in zip(logs, both, strict=True):
            for place, outcome in runs.items():
                kl = outcome.kl_at_score(target)
                # 0, as computed, where the policy has not moved
                found.setdefault(place, (outcome, []))[1].append(log(kl) if kl > 0 else nan)
    first, second = (
        Chosen([replace(o, tuned="", final=exp(fmean(own))) for o, own in found.values()])
        for found in logs
    )
    return first, second


def contrast(
    statistic: Callable[[int], statistics.Statistic],
    ours: Chosen,
    theirs: Chosen,
    measure: Measure,
    *,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return a statistic of two algorithms' reported runs, NaN where one lacks a task.

    Args:
        statistic: Of both algorithms' samples, such as `statistics.difference`.
        ours: The first algorithm's runs.
        theirs: The second's.
        measure: What is taken of a run.
        confidence: The share of intervals that are to hold the truth.
    """
    one, other = (chosen.samples(measure) for chosen in (ours, theirs))
    seeds, their_seeds = ours.seeds(measure), theirs.seeds(measure)
    if not seeds or seeds.keys() != their_seeds.keys():
        return Estimate(nan)
    return estimate(
        statistic(len(one)),
        [*one, *other],
        confidence=confidence,
        redraw=redraw_both(ours, theirs, measure),
        paired=are_paired(seeds, their_seeds),
    )


def are_paired(seeds: dict[str, list[int]], their_seeds: dict[str, list[int]]) -> bool:
    """Return whether runs of one seed are compared with each other, from each task's seeds.

    They have the same prompts in the same order and the same random numbers, so that what one seed
    has of luck both algorithms have.
    """
    fewest = min(map(len, seeds.values()), default=0)
    return seeds == their_seeds and fewest >= FEWEST_PAIRED


def _shared(reached: Iterable[float]) -> float:
    """Return what every run reached, NaN where it was not measured in all of them."""
    values = list(reached)
    return nan if not values or any(map(isnan, values)) else min(values)


def _better(ours: Chosen, theirs: Chosen) -> Estimate:
    final: Measure = lambda o: o.final  # noqa: E731
    one, other = (chosen.samples(final) for chosen in (ours, theirs))
    if ours.seeds(final).keys() != theirs.seeds(final).keys():
        return Estimate(nan)
    return improvement_estimate(one, other, redraw_both(ours, theirs, final))


def _shared_score(outcomes: Sequence[Outcome]) -> float:
    """Return the highest score that every run reached, NaN where one of them never rose to it."""
    measured = [[score for score in o.scores if not isnan(score)] for o in outcomes]
    highest = _shared(max(scores, default=nan) for scores in measured)
    lowest = max((scores[0] for scores in measured if scores), default=nan)
    return highest if highest > lowest else nan

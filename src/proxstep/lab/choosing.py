"""Which runs stand for an algorithm whose values were tuned, and how sure that choice is.

A tuned value is chosen for each seed by the *other* seeds: no run has a say in whether it is
reported, so the mean over seeds is unbiased for "tune on n - 1 seeds, run on a new one", and no
seed is given away to the choice, as a split in two halves would.

But the seeds' choices hang together. Where values are about as good as each other the mean varies
by up to 1.8 times what the spread of the reported runs says. So a resample chooses again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan

import numpy as np
from numpy.typing import NDArray

from proxstep.lab.outcomes import Outcome
from proxstep.lab.statistics import Array, Indices, Redraw

Measure = Callable[[Outcome], float]


@dataclass(frozen=True)
class Chosen:
    """An algorithm's runs, and which of them are reported.

    Shapes: T tasks, N seeds, V values.

    Attributes:
        pool: All its runs.
    """

    pool: Sequence[Outcome]

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """One for each task and seed, at the values that the other seeds chose."""
        found = (self._runs[task].get((n, v)) for n, v in self._choice for task in self._tasks)
        return [outcome for outcome in found if outcome is not None]

    @cached_property
    def votes(self) -> dict[str, int]:
        """Each choice of values, with the number of seeds that are reported at it."""
        return dict(Counter(self.values[v] for _, v in self._choice).most_common())

    @property
    def is_tuned(self) -> bool:
        """Whether there was a choice."""
        return len(self.values) > 1

    @cached_property
    def values(self) -> list[str]:
        """The values that its runs have, in their order."""
        return list(dict.fromkeys(outcome.tuned for outcome in self.pool))

    @property
    def repeats(self) -> bool:
        """Whether there are several runs of one task, seed and value; the last one counts."""
        return len(self.pool) > sum(map(len, self._runs.values()))

    @property
    def unmeasured(self) -> list[tuple[int, str]]:
        """Seeds without a score at the value that was chosen for them, with that value."""
        if not self.is_tuned:
            return []
        final = [self._at_choice(task, lambda o: o.final) for task in self._tasks]
        return [
            (self._seeds[n], self.values[v])
            for own_N in final
            for (n, v), score in zip(self._choice, own_N, strict=True)
            if np.isnan(score)
        ]

    def samples(self, measure: Measure) -> list[Array]:
        """Return a measure of the reported runs of each task, in order of seeds, without NaN."""
        return [table_N[~np.isnan(table_N)] for table_N in self._reported(measure).values()]

    def seeds(self, measure: Measure) -> dict[str, list[int]]:
        """Return the seeds of `samples` by task, in order."""
        return {
            task: [self._seeds[n] for n in np.flatnonzero(~np.isnan(own_N))]
            for task, own_N in self._reported(measure).items()
        }

    def redraw(self, measure: Measure) -> Redraw | None:
        """Return how `samples` come out where resampled runs choose again; None for one value.

        A run that nobody is left to choose for, or whose choice was not measured, stays as it is.
        """
        if not self.is_tuned:
            return None
        reported = self._reported(measure)
        final = {task: self._table(task, lambda o: o.final) for task in reported}
        found = {task: self._table(task, measure) for task in reported}
        seeds = {task: np.flatnonzero(~np.isnan(own_N)) for task, own_N in reported.items()}

        def drawn(*indices: Indices) -> list[Array]:
            rows = {task: seeds[task][index] for task, index in zip(reported, indices, strict=True)}
            best_N = others_choice([final[task] for task in reported], list(rows.values()))
            values = []
            for task, row in rows.items():
                best = np.take_along_axis(best_N, row, axis=-1)
                again = np.where(best < 0, nan, found[task][row, best])
                values.append(np.where(np.isnan(again), reported[task][row], again))
            return values

        return drawn

    @cached_property
    def _seeds(self) -> list[int]:
        return sorted({outcome.run.seed for outcome in self.pool})

    @cached_property
    def _tasks(self) -> list[str]:
        return sorted({outcome.task for outcome in self.pool})

    @cached_property
    def _runs(self) -> dict[str, dict[tuple[int, int], Outcome]]:
        """By task, then by the places of seed and value."""
        runs: dict[str, dict[tuple[int, int], Outcome]] = {task: {} for task in self._tasks}
        for outcome in self.pool:
            place = self._seeds.index(outcome.run.seed), self.values.index(outcome.tuned)
            runs[outcome.task][place] = outcome
        return runs

    @cached_property
    def _choice(self) -> list[tuple[int, int]]:
        """The place of each seed, and of the value that it is reported at."""
        final = [self._table(task, lambda o: o.final) for task in self._tasks]
        everyone = np.arange(len(self._seeds))
        best_N = others_choice(final, [everyone] * len(final))
        if len(everyone) == 1:  # it chooses for itself
            best_N = _best(np.stack(final))
        return [(n, max(int(v), 0)) for n, v in enumerate(best_N)]

    def _table(self, task: str, measure: Measure) -> Array:
        """Return a measure of a task's runs, of shape NV, NaN where there is none."""
        table_NV = np.full((len(self._seeds), len(self.values)), nan)
        for place, outcome in self._runs[task].items():
            table_NV[place] = measure(outcome)
        return table_NV

    def _at_choice(self, task: str, measure: Measure) -> Array:
        """Return a measure of a task's reported runs, of shape N, NaN where there is none."""
        rows, columns = np.array(self._choice).T
        return self._table(task, measure)[rows, columns]

    def _reported(self, measure: Measure) -> dict[str, Array]:
        """Return a measure of the reported runs, of shape N, by task; no task without any."""
        found = {task: self._at_choice(task, measure) for task in self._tasks}
        return {task: own_N for task, own_N in found.items() if not np.isnan(own_N).all()}


def others_choice(final: Sequence[Array], drawn: Sequence[Indices]) -> NDArray[np.intp]:
    """Return, for each seed, the value with the highest mean final score over the other seeds.

    Args:
        final: Each task's scores, of shape NV; NaN where there is none.
        drawn: Each task's runs that count, as places of seeds, of shape (..., number of runs). All
            that are the seed's own are left out, in every task; tasks weigh alike.

    Returns:
        The places of the values, of shape (..., N); -1 where no other seed has a score.
    """
    means = []
    for final_NV, index in zip(final, drawn, strict=True):
        count_N1 = (index[..., None] == np.arange(len(final_NV))).sum(axis=-2)[..., None]
        known_NV = ~np.isnan(final_NV)
        score_NV = np.where(known_NV, final_NV, 0.0)
        sum_NV, number_NV = (
            (count_N1 * table_NV).sum(axis=-2, keepdims=True) - count_N1 * table_NV
            for table_NV in (score_NV, known_NV)
        )
        means.append(np.where(number_NV > 0, sum_NV / np.maximum(number_NV, 1), nan))
    return _best(np.stack(means))


def _best(mean_TNV: Array) -> NDArray[np.intp]:
    """Return the place of the best value by the mean over tasks, of shape (..., N); -1 for none."""
    known = ~np.isnan(mean_TNV)
    number_NV = known.sum(axis=0)
    sum_NV = np.where(known, mean_TNV, 0.0).sum(axis=0)
    mean_NV = np.where(number_NV > 0, sum_NV / np.maximum(number_NV, 1), -np.inf)
    return np.where(np.isneginf(mean_NV).all(axis=-1), -1, mean_NV.argmax(axis=-1))

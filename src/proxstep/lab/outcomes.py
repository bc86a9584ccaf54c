"""What became of each run of a comparison, and which runs stand for which algorithm.

Varied keys of the sections `task` and `model` make different tasks, over which results are
averaged; all others are tuned. A tuned value is chosen for each seed by the *other* seeds: no run
has a say in whether it is reported, so the mean over seeds is unbiased for "tune on n - 1 seeds,
run on a new one", and no seed is given away to the choice, as a split in two halves would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from proxstep.config.yamlfile import read_yaml
from proxstep.lab.plan import PLAN, describe, short_keys
from proxstep.lab.statistics import area_under_curve, value_at
from proxstep.runs.reading import Run, by_algorithm, flatten

_TASK_SECTIONS = ("task.", "model.")


@dataclass(frozen=True)
class Outcome:
    """One run's result; NaN for what was not measured.

    Attributes:
        run: The run.
        tuned: Its values of the tuned keys, as text; empty where none is tuned.
        task: Its values of the varied keys of task and model, as text.
        final: The last score after step 0.
        best: The highest of them, which is an optimist's figure: it is chosen by its own score.
        area: The mean score over all steps.
        kl: KL(policy || initial) at the evaluations that measured it, in nats per token.
        seconds: Seconds since the beginning at the evaluations.
        scores: The scores at the evaluations.
    """

    run: Run
    tuned: str
    task: str
    final: float
    best: float
    area: float
    kl: list[float]
    seconds: list[float]
    scores: list[float]

    @classmethod
    def of(cls, run: Run, varied: Sequence[str]) -> Outcome:
        """Return a run's outcome."""
        measured = [record for record in run.records if record.get("score") is not None]
        scores = [float(record["score"]) for record in measured]
        steps = [record["step"] for record in measured]
        trained = [score for step, score in zip(steps, scores, strict=True) if step > 0]
        own = dict(flatten(run.recipe))
        values = {key: own.get(key) for key in varied}
        return cls(
            run,
            _as_label(values, is_task=False),
            _as_label(values, is_task=True),
            trained[-1] if trained else nan,
            max(trained, default=nan),
            area_under_curve(steps, scores),
            [_number(record, "kl_policy_initial", 0.0) for record in measured],
            [_number(record, "elapsed_seconds", nan) for record in measured],
            scores,
        )

    def score_at_kl(self, kl: float) -> float:
        """Return the score when the KL was first spent."""
        return value_at(self.kl, self.scores, kl)

    def score_after(self, seconds: float) -> float:
        """Return the score after so many seconds."""
        return value_at(self.seconds, self.scores, seconds)

    def kl_at_score(self, score: float) -> float:
        """Return the KL spent when the score was first reached."""
        return value_at(self.scores, [float(kl) for kl in np.maximum.accumulate(self.kl)], score)


def _number(record: dict[str, Any], name: str, at_start: float) -> float:
    """Return a field of a record; at step 0, where little is measured, what it is by definition."""
    value = record.get(name)
    if value is None:
        return at_start if record["step"] == 0 else nan
    return float(value)


def _as_label(values: dict[str, Any], *, is_task: bool) -> str:
    own = {k: v for k, v in values.items() if k.startswith(_TASK_SECTIONS) == is_task}
    return ", ".join(describe(*pair) for pair in short_keys(own).items())


def varied_keys(runs: Sequence[Run]) -> list[str]:
    """Return what the plans beside the runs vary, in order."""
    plans = dict.fromkeys(path for run in runs if (path := _plan_of(run)).is_file())
    return list(dict.fromkeys(key for path in plans for key in read_yaml(path).get("vary", {})))


def _plan_of(run: Run) -> Path:
    return run.path.parent / PLAN


@dataclass(frozen=True)
class Chosen:
    """The runs that stand for an algorithm at its best of the grid.

    Attributes:
        outcomes: One for each task and seed, at the values that the other seeds chose.
        votes: Each choice of values, with the number of seeds that are reported at it.
    """

    outcomes: list[Outcome]
    votes: dict[str, int]


def choose(outcomes: Sequence[Outcome]) -> Chosen:
    """Return an algorithm's runs at its best tuned values, chosen for each seed by the others.

    Where there is one seed alone, it chooses for itself.
    """
    seeds = sorted({outcome.run.seed for outcome in outcomes})
    kept: list[Outcome] = []
    votes: Counter[str] = Counter()
    for seed in seeds:
        others = [o for o in outcomes if o.run.seed != seed] or list(outcomes)
        best = max(dict.fromkeys(o.tuned for o in outcomes), key=lambda v: _mean_final(others, v))
        kept += [o for o in outcomes if o.run.seed == seed and o.tuned == best]
        votes[best] += 1
    return Chosen(kept, dict(votes.most_common()))


def _mean_final(outcomes: Sequence[Outcome], tuned: str) -> float:
    """Return the mean final score over seeds, tasks weighing alike; -inf where there is none."""
    tasks: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.tuned == tuned and not isnan(outcome.final):
            tasks.setdefault(outcome.task, []).append(outcome.final)
    return float(np.mean([np.mean(finals) for finals in tasks.values()])) if tasks else -np.inf


def outcomes_by_algorithm(runs: Sequence[Run]) -> dict[str, list[Outcome]]:
    """Return every run's outcome, by its algorithm in order of first appearance."""
    varied = varied_keys(runs)
    return {
        algorithm: [Outcome.of(run, varied) for run in members]
        for algorithm, members in by_algorithm(runs).items()
    }

"""What became of each run of a comparison.

Varied keys of the sections `task` and `model` make different tasks, over which results are
averaged; all others are tuned (choosing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from proxstep.config.yamlfile import read_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.plan import CHOOSING, PLAN, label
from proxstep.lab.statistics import area_under_curve, value_at
from proxstep.runs.reading import Run, by_algorithm, flatten


@dataclass(frozen=True)
class Outcome:
    """One run's result; NaN for what was not measured.

    Attributes:
        run: The run.
        tuned: Its values of the tuned keys, as text; empty where none is tuned.
        task: Its values of the varied keys of task and model, as text.
        final: The score of the last evaluation after step 0.
        best: The highest of them, which is an optimist's figure: it is chosen by its own score.
        area: The mean score over all steps; NaN where an evaluation gave no score.
        kl: KL(policy || initial) at the evaluations, in nats per token; empty where one of them did
            not measure it.
        seconds: Seconds since the beginning at the evaluations, likewise.
        scores: The scores at the evaluations, NaN where one gave none.
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
        measured = run.evaluations
        scores = [nan if (score := row.get("score")) is None else float(score) for row in measured]
        steps = [record["step"] for record in measured]
        trained = [score for step, score in zip(steps, scores, strict=True) if step > 0]
        own = dict(flatten(run.recipe))
        values = {key: own.get(key) for key in varied}
        return cls(
            run,
            label(values, of_task=False),
            label(values, of_task=True),
            trained[-1] if trained else nan,
            max((score for score in trained if not isnan(score)), default=nan),
            area_under_curve(steps, scores),
            _series(measured, "kl_policy_initial", at_start=0.0),
            _series(measured, "elapsed_seconds"),
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
        if not self.kl:
            return nan
        return value_at(self.scores, [float(kl) for kl in np.maximum.accumulate(self.kl)], score)


def _series(
    records: Sequence[dict[str, Any]], name: str, at_start: float | None = None
) -> list[float]:
    """Return a field of every record, empty if one lacks it.

    Args:
        records: The records.
        name: The field.
        at_start: What it is by definition at step 0, where it need not be measured.
    """
    values = [record.get(name) for record in records]
    if records and records[0]["step"] == 0 and values[0] is None:
        values[0] = at_start
    return [] if None in values else [float(value) for value in values if value is not None]


def plans_of(runs: Sequence[Run]) -> dict[Path, dict[str, Any]]:
    """Return the plans beside the runs, by their folder.

    Raises:
        ProxstepError: If one does not say what it varies.
    """
    folders = dict.fromkeys(run.path.parent for run in runs)
    plans = {f: read_yaml(f / PLAN) for f in folders if (f / PLAN).is_file()}
    for folder, plan in plans.items():
        if not isinstance(plan.get("vary"), dict):
            raise ProxstepError(
                f"{folder / PLAN}: lacks `vary`; restore it as proxstep compare wrote it, or move "
                "it away to report its runs without it."
            )
    return plans


def varied_keys(runs: Sequence[Run]) -> list[str]:
    """Return what the plans beside the runs vary, in order."""
    return list(dict.fromkeys(key for plan in plans_of(runs).values() for key in plan["vary"]))


def reference_of(runs: Sequence[Run]) -> str | None:
    """Return the algorithm that the plans beside the runs compare every other one with."""
    found = {plan.get("against") for plan in plans_of(runs).values()}
    return found.pop() if len(found) == 1 else None


def outcomes_by_algorithm(runs: Sequence[Run]) -> dict[str, list[Outcome]]:
    """Return every run's outcome, by its algorithm in order of first appearance.

    The runs that only chose values in a halving are left out.
    """
    varied = varied_keys(runs)
    halved = {folder for folder, plan in plans_of(runs).items() if plan.get("halving")}
    runs = [run for run in runs if run.path.parent not in halved or run.seed < CHOOSING]
    return {
        algorithm: [Outcome.of(run, varied) for run in members]
        for algorithm, members in by_algorithm(runs).items()
    }

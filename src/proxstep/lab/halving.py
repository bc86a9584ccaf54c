"""Successive halving over the tuned values of a plan with a time budget.

Every algorithm begins with all its values. In each round the values that are left run with new
seeds, twice as many as before, and the better half by mean score goes on, until one is left:
each round takes about as long as the one before, and the time goes to the values that may win. The
seeds that choose (from 1000 on) are never reported. Choosing takes half of the budget at
most; the rest goes to the chosen values with the seeds that are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, isnan, nan
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

from proxstep.config.yamlfile import dump_yaml, read_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.plan import CHOOSING, Cell, Plan
from proxstep.runs.durable import write_file

NOTE = "halving.yaml"
CLOCK = "clock.json"
_SAVE_SECONDS = 5.0

Scores = Mapping[str, float]
"""The final score of each finished run by the name of its folder, NaN where it has none."""


@dataclass(frozen=True)
class Round:
    """What one round left of one algorithm.

    Attributes:
        algorithm: Its name.
        seeds: Number of seeds so far, those of the rounds before included.
        scores: Mean score of each value that took part, best first; those that did not run, or
            have no score, are not in it.
        kept: The values that went on.
    """

    algorithm: str
    seeds: int
    scores: dict[str, float]
    kept: list[str]


def num_rounds(plan: Plan) -> int:
    """Return how many rounds leave one value of each algorithm."""
    return max((len(values) - 1).bit_length() for values in plan.tuned().values())


def choosing_seeds(num_rounds: int) -> list[int]:
    """Return the seeds of the first rounds.

    >>> choosing_seeds(2)
    [1000, 1001, 1002]
    """
    return [CHOOSING + seed for seed in range(2**num_rounds - 1)]


def choosing_cells(plan: Plan, number: int, scores: Scores) -> list[Cell]:
    """Return the runs of a round, counted from 0; those of the rounds before must be done."""
    new = choosing_seeds(number + 1)[len(choosing_seeds(number)) :]
    kept = survivors(plan, number, scores)
    return [
        Cell(variant, seed)
        for seed in new
        for variant in plan.variants
        if len(kept[variant.algorithm]) > 1 and variant.tuned in kept[variant.algorithm]
    ]


def reported_cells(plan: Plan, scores: Scores) -> list[Cell]:
    """Return the runs that are reported: each algorithm at its chosen values, every seed."""
    kept = survivors(plan, num_rounds(plan), scores)
    return [cell for cell in plan.cells() if cell.variant.tuned == kept[cell.variant.algorithm][0]]


def survivors(plan: Plan, number: int, scores: Scores) -> dict[str, list[str]]:
    """Return what the first rounds leave of each algorithm, best first."""
    kept = plan.tuned()
    for found in rounds(plan, number, scores):
        kept[found.algorithm] = found.kept
    return kept


def rounds(plan: Plan, number: int, scores: Scores) -> list[Round]:
    """Return what came out of the first rounds, as far as they have run."""
    found: list[Round] = []
    for algorithm, values in plan.tuned().items():
        left = values
        for done in range(1, number + 1):
            if len(left) == 1:
                break
            seeds = choosing_seeds(done)
            means = {value: _mean(plan, algorithm, value, seeds, scores) for value in left}
            measured = {value: score for value, score in means.items() if score is not None}
            ranked = sorted(measured, key=lambda value: -measured[value])
            ranked += [value for value in left if value not in measured]
            left = ranked[: ceil(len(left) / 2)]
            best_first = {value: measured[value] for value in ranked if value in measured}
            found.append(Round(algorithm, len(seeds), best_first, left))
    return found


def _mean(plan: Plan, algorithm: str, tuned: str, seeds: list[int], scores: Scores) -> float | None:
    variants = [v for v in plan.variants if (v.algorithm, v.tuned) == (algorithm, tuned)]
    names = [Cell(variant, seed).name for variant in variants for seed in seeds]
    measured = [score for name in names if not isnan(score := scores.get(name, nan))]
    return mean(measured) if measured else None


def write_note(folder: Path, plan: Plan, budget: float, spent: float, scores: Scores) -> None:
    """Write beside the plan what is to be told of the halving."""
    left_out = [cell.name for cell in reported_cells(plan, scores) if cell.name not in scores]
    content: dict[str, Any] = {
        "budget_seconds": budget,
        "spent_seconds": round(spent, 1),
        "without_time": left_out,
        "rounds": [vars(found) for found in rounds(plan, num_rounds(plan), scores)],
    }
    write_file(folder / NOTE, dump_yaml(content).encode())


def read_note(folder: Path) -> list[str]:
    """Return what a report tells of the halving in a folder; nothing where there was none.

    Raises:
        ProxstepError: If it is not as it was written.
    """
    if not (folder / NOTE).is_file():
        return []
    try:
        return _told(read_yaml(folder / NOTE))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ProxstepError(
            f"{folder / NOTE}: damaged; restore it as proxstep compare wrote it, or move it away."
        ) from None


def _told(held: dict[str, Any]) -> list[str]:
    told = [
        f"Budget of {held['budget_seconds'] / 60:.1f} minutes, {held['spent_seconds'] / 60:.1f} "
        "spent: successive halving, at most half of it for choosing; the seeds that chose "
        f"({CHOOSING} and up) are not reported."
    ]
    for found in held["rounds"]:
        scores = ", ".join(f"{value} {score:.3f}" for value, score in found["scores"].items())
        told.append(
            f"{found['algorithm']} after {found['seeds']} choosing seeds: {scores or 'no run'}; "
            f"kept {' and '.join(found['kept'])}."
        )
    if held["without_time"]:
        told.append(f"No time was left for {', '.join(held['without_time'])}.")
    return told


class Clock:
    """The seconds that a comparison has run, over all its processes.

    Args:
        folder: Where they are kept.
        budget: How many it may take.
    """

    def __init__(self, folder: Path, budget: float) -> None:
        self._path, self.budget = folder / CLOCK, budget
        self._before = 0.0
        if self._path.exists():
            self._before = float(json.loads(self._path.read_text())["seconds"])
        self._begun = self._saved = monotonic()

    @property
    def spent(self) -> float:
        """The seconds so far."""
        return self._before + monotonic() - self._begun

    def within(self, share: float, expected: Callable[[], float]) -> Callable[[], bool]:
        """Return whether one more run, of the expected seconds, ends in a share of the budget."""

        def allowed() -> bool:
            if monotonic() - self._saved > _SAVE_SECONDS:
                self.save()
            return self.spent + expected() <= share * self.budget

        return allowed

    def save(self) -> None:
        """Write the seconds down."""
        self._saved = monotonic()
        write_file(self._path, json.dumps({"seconds": round(self.spent, 1)}).encode())

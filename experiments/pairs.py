"""Which pairs of methods do the committed runs tell apart? Welch's t-test, from the result files.

    python experiments/pairs.py worked_tasks   # each method at its best learning rate, by task
    python experiments/pairs.py objectives     # the five-seed table of docs/algorithms.md

Prints mean differences with their 95 % intervals, p for one pair at a time, and p times the number
of pairs (Bonferroni).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import objectives, worked_tasks  # noqa: E402


class Pair(NamedTuple):
    """The first method's mean less the second's, with its 95 % interval."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float


def pairs(values: Mapping[str, Sequence[float]]) -> list[Pair]:
    """Compare each two methods, the higher mean first.

    >>> [found] = pairs({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 5.0]})
    >>> f"{found.first} is {found.difference:.2f} above, p = {found.p:.2f}"
    'b is 1.33 above, p = 0.28'
    """
    ordered = sorted(values, key=lambda name: -statistics.mean(values[name]))
    found = []
    for first, second in itertools.combinations(ordered, 2):
        test = stats.ttest_ind(values[first], values[second], equal_var=False)
        ends = test.confidence_interval()
        means = [statistics.mean(values[name]) for name in (first, second)]
        difference = means[0] - means[1]
        found.append(Pair(first, second, difference, ends.low, ends.high, test.pvalue))
    return found


def worked_task(task: str) -> dict[str, dict[str, list[float]]]:
    """Return scores and KL divergences at a task's end, by method; empty if a method is missing."""
    rows = json.loads(worked_tasks.ROWS.read_text())["rows"]
    found: dict[str, dict[str, list[float]]] = {"score": {}, "KL": {}}
    for method in worked_tasks.METHODS:
        own = [r for r in rows if (r["task"], r["method"]) == (task, method)]
        if not any(r["seed"] in worked_tasks.SEEDS for r in own):
            return {}
        rate = worked_tasks.best_rate(rows, task, method)
        own = [r for r in own if r["rate"] == rate and r["seed"] in worked_tasks.SEEDS]
        found["score"][method] = [worked_tasks.end(r) for r in own]
        found["KL"][method] = [r["kl"][0] for r in own if r["kl"]]
    return found


def objective_scores() -> dict[str, list[float]]:
    """Return the final scores of each row of the five-seed table."""
    scores: dict[str, list[float]] = {}
    for row in json.loads(objectives.ROWS.read_text())["rows"]:
        scores.setdefault(row["row"], []).append(row["score"])
    return scores


def lines(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Return a line for each pair."""
    found = pairs(values)
    return [
        f"{p.first} - {p.second}: {p.difference:.4f} [{p.low:.4f}, {p.high:.4f}], p = {p.p:.4f}, "
        f"corrected {min(1.0, p.p * len(found)):.3f}"
        for p in found
    ]


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["worked_tasks", "objectives"])
    console = Console(width=120)
    if parser.parse_args().experiment == "objectives":
        console.out("\n".join(lines(objective_scores())))
        return
    tasks = {row["task"] for row in json.loads(worked_tasks.ROWS.read_text())["rows"]}
    for task in sorted(tasks):
        for name, values in worked_task(task).items():
            console.out("\n".join([f"{task}, {name}", *lines(values)]))


if __name__ == "__main__":
    main()

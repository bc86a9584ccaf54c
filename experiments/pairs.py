"""Which pairs of methods do the committed runs tell apart? Paired t-tests, from the result files.

    python experiments/pairs.py worked_tasks   # each method at its best learning rate, by task
    python experiments/pairs.py objectives     # the five-seed table of docs/algorithms.md
    python experiments/pairs.py luck           # how alike the seeds' luck is with two methods

Prints mean differences with their 95 % intervals, p for one pair at a time, and p times the number
of pairs (Bonferroni). Runs of one seed are a pair: they have the same prompts and random numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import objectives, worked_tasks  # noqa: E402

from proxstep.lab.statistics import seeds_needed  # noqa: E402
from proxstep.runs.reading import read_rows  # noqa: E402


class Pair(NamedTuple):
    """The first method's mean less the second's, with its 95 % interval."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float


BySeed = Mapping[int, float]


def pairs(values: Mapping[str, BySeed]) -> list[Pair]:
    """Compare each two methods over the seeds that both have, the higher mean first.

    >>> [found] = pairs({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 2.0, 1: 3.0, 2: 5.0}})
    >>> f"{found.first} is {found.difference:.2f} above, p = {found.p:.2f}"
    'b is 1.33 above, p = 0.06'
    """
    ordered = sorted(values, key=lambda name: -statistics.mean(values[name].values()))
    found = []
    for first, second in itertools.combinations(ordered, 2):
        seeds = sorted(values[first].keys() & values[second].keys())
        one, other = ([values[name][seed] for seed in seeds] for name in (first, second))
        test = stats.ttest_rel(one, other)
        ends = test.confidence_interval()
        difference = statistics.mean(one) - statistics.mean(other)
        found.append(Pair(first, second, difference, ends.low, ends.high, test.pvalue))
    return found


def worked_task(task: str) -> dict[str, dict[str, BySeed]]:
    """Return scores and KL divergences at a task's end, by method; empty if a method is missing."""
    rows = json.loads(worked_tasks.ROWS.read_text())["rows"]
    found: dict[str, dict[str, BySeed]] = {"score": {}, "KL": {}}
    for method in worked_tasks.METHODS:
        own = [r for r in rows if (r["task"], r["method"]) == (task, method)]
        if not any(r["seed"] in worked_tasks.SEEDS for r in own):
            return {}
        rate = worked_tasks.best_rate(rows, task, method)
        own = [r for r in own if r["rate"] == rate and r["seed"] in worked_tasks.SEEDS]
        found["score"][method] = {r["seed"]: worked_tasks.end(r) for r in own}
        found["KL"][method] = {r["seed"]: r["kl"][0] for r in own if r["kl"]}
    return found


def objective_scores() -> dict[str, dict[int, float]]:
    """Return the final scores of each row of the five-seed table."""
    scores: dict[str, dict[int, float]] = {}
    for row in json.loads(objectives.ROWS.read_text())["rows"]:
        scores.setdefault(row["row"], {})[row["seed"]] = row["score"]
    return scores


def correlation(values: Mapping[str, BySeed]) -> float:
    """Return the mean correlation, over seeds, of each two methods' scores; NaN without two.

    >>> correlation({"a": {0: 1.0, 1: 2.0}, "b": {0: 3.0, 1: 5.0}, "constant": {0: 1.0, 1: 1.0}})
    1.0
    """
    found = []
    for first, second in itertools.combinations(values.values(), 2):
        seeds = sorted(first.keys() & second.keys())
        both = [[one[seed] for seed in seeds] for one in (first, second)]
        if len(seeds) > 1 and all(len(set(one)) > 1 for one in both):
            found.append(statistics.correlation(*both))
    return statistics.mean(found) if found else math.nan


def visible(values: Mapping[str, BySeed], number: int) -> float:
    """Return the least difference of two methods that so many seeds tell with a power of 0.8.

    By the spread of all pairs' differences over the seeds that there are, to 0.001.

    >>> visible({"a": {0: 0.1, 1: 0.2, 2: 0.3}, "b": {0: 0.1, 1: 0.22, 2: 0.28}}, 3)
    0.066
    """
    variances = []
    for first, second in itertools.combinations(values.values(), 2):
        seeds = first.keys() & second.keys()
        variances.append(statistics.variance([first[seed] - second[seed] for seed in seeds]))
    error = math.sqrt(statistics.mean(variances) / number)
    effects = (thousandth / 1000 for thousandth in itertools.count(1))
    return next(x for x in effects if seeds_needed(x, error, number, paired=True) <= number)


def luck() -> Iterator[str]:
    """Yield the correlations of all experiments, plans at each of their values."""
    tables: dict[str, dict[str, dict[int, float]]] = {"objectives": objective_scores()}
    for task in ("sums", "products", "maxima", "countdown"):
        tables[f"worked_tasks, {task}"] = worked_task(task).get("score", {})
    for path in sorted((ROOT / "experiments" / "truth").glob("*/rows.jsonl")):
        for row in read_rows(path):
            arm, value, seed = re.fullmatch(r"(.*?)(?:-(\w+=.*))?-seed(\d+)", row["run"]).groups()
            table = tables.setdefault(f"{path.parent.name}, {value}", {})
            table.setdefault(arm, {})[int(seed)] = row["series"]["score"][1][-1]
    for name, values in tables.items():
        if not math.isnan(found := correlation(values)):
            yield f"{name}: {len(values)} methods, correlation {found:.2f}"


def lines(values: Mapping[str, BySeed]) -> list[str]:
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
    parser.add_argument("experiment", choices=["worked_tasks", "objectives", "luck"])
    console = Console(width=120)
    experiment = parser.parse_args().experiment
    if experiment == "luck":
        console.out("\n".join(luck()))
        return
    if experiment == "objectives":
        console.out("\n".join(lines(objective_scores())))
        return
    tasks = {row["task"] for row in json.loads(worked_tasks.ROWS.read_text())["rows"]}
    for task in sorted(tasks):
        for name, values in worked_task(task).items():
            console.out("\n".join([f"{task}, {name}", *lines(values)]))
        score = worked_task(task)["score"]
        console.out(f"five seeds tell {visible(score, 5)}, ten {visible(score, 10)}")


if __name__ == "__main__":
    main()

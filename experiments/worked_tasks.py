"""Which of four methods can be told apart on the tasks with worked steps, and with how many seeds?

    python experiments/worked_tasks.py                      # goes on where it was stopped
    python experiments/worked_tasks.py --minutes 9          # a piece of it
    python experiments/worked_tasks.py --table              # the tables, from the rows

recipes/worked.yaml with 20 steps. First each method with three learning rates on two seeds, and
with the next larger one for as long as a method's best is the largest; then, with the best of
these, five other seeds. The row of each run is kept in worked_tasks/rows.json as it ends. The
tables need scipy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from scipy import optimize, stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import Quiet, stamp

from proxstep.config.loading import load_recipe
from proxstep.runs.reading import load_run
from proxstep.training import lifecycle

RECIPE = Path(__file__).parents[1] / "recipes" / "worked.yaml"
ROWS = Path(__file__).with_suffix("") / "rows.json"
METHODS = ("reinforce", "grpo", "isopo", "opo")
RATES = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")
FIRST_RATES = 3
SHARED = {"steps": "20", "evaluation.every": "20"}
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
POWER, LEVEL = 0.8, 0.05


def run(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one cell and return its row."""
    began, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        keys = {
            **SHARED,
            "task.name": cell["task"],
            "algorithm": cell["method"],
            "optimizer.learning_rate": cell["rate"],
            "seed": str(cell["seed"]),
            "output_dir": f"{folder}/run",
        }
        status = lifecycle.train(load_recipe(RECIPE, list(keys.items())), Quiet())
        if status != "finished":
            raise SystemExit(f"{cell}: {status}, and no row is kept of it")
        found = load_run(Path(folder) / "run")
    steps, scores = found.series("score")
    rewards = found.series("reward")[1]
    lengths = found.series("completions_mean_length")[1]
    return {
        **cell,
        "score": dict(zip(map(str, steps), scores, strict=True)),
        "reward": [round(value, 4) for value in rewards],
        "length": [round(value, 2) for value in lengths],
        "kl": found.series("kl_policy_initial")[1][-1:],
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        **stamp(),
    }


def end(row: Mapping[str, Any]) -> float:
    """Return a row's last greedy score."""
    return list(row["score"].values())[-1]


def tuned_rates(rows: list[dict[str, Any]], task: str) -> list[str]:
    """Return the learning rates that every method has on every tuning seed."""
    done = {(r["method"], r["rate"], r["seed"]) for r in rows if r["task"] == task}
    return [
        rate
        for rate in RATES
        if done.issuperset((method, rate, seed) for method in METHODS for seed in TUNING_SEEDS)
    ]


def best_rate(rows: list[dict[str, Any]], task: str, method: str) -> str:
    """Return the learning rate with the best end on the tuning seeds."""
    own = [r for r in rows if (r["task"], r["method"]) == (task, method)]
    means = {
        rate: statistics.mean(
            end(r) for r in own if r["rate"] == rate and r["seed"] in TUNING_SEEDS
        )
        for rate in tuned_rates(rows, task)
    }
    return max(means, key=lambda rate: means[rate])


def next_cell(rows: list[dict[str, Any]], task: str) -> dict[str, Any] | None:
    """Return the first cell without a row: seed by seed, so that what is there is balanced."""
    done = {(r["task"], r["method"], r["rate"], r["seed"]) for r in rows}
    tuned = tuned_rates(rows, task)
    rates = RATES[:FIRST_RATES]
    if len(tuned) >= FIRST_RATES and tuned[-1] in {best_rate(rows, task, m) for m in METHODS}:
        rates = RATES[: len(tuned) + 1]
    cells = [(task, m, rate, seed) for seed in TUNING_SEEDS for rate in rates for m in METHODS]
    if done.issuperset(cells):
        cells = [(task, m, best_rate(rows, task, m), seed) for seed in SEEDS for m in METHODS]
    for cell in cells:
        if cell not in done:
            return dict(zip(("task", "method", "rate", "seed"), cell, strict=True))
    return None


def visible(deviation: float, seeds: int) -> float:
    """Return the difference of two means that a t-test sees with probability `POWER`.

    Args:
        deviation: Standard deviation between seeds, the same of both.
        seeds: Of each.

    >>> round(visible(1.0, 17), 2)  # Cohen's table: 17 a group for d = 1
    0.99
    """
    degrees, scale = 2 * seeds - 2, (seeds / 2) ** 0.5
    limit = stats.t.ppf(1 - LEVEL / 2, degrees)

    def missing(effect: float) -> float:
        return float(stats.nct.sf(limit, degrees, effect * scale)) - POWER

    return deviation * float(optimize.brentq(missing, 0.01, 10))


def tables(rows: list[dict[str, Any]], task: str, console: Console) -> None:
    """Print the tuning's means, and the methods at their best learning rates."""
    tuning = [r for r in rows if r["task"] == task and r["seed"] in TUNING_SEEDS]
    rates = sorted({r["rate"] for r in tuning}, key=float)
    console.out(f"| {task}: end, two seeds | {' | '.join(rates)} |\n|{'---|' * (len(rates) + 1)}")
    for method in METHODS:
        cells = []
        for rate in rates:
            ends = [end(r) for r in tuning if (r["method"], r["rate"]) == (method, rate)]
            cells.append(", ".join(f"{value:.3f}" for value in ends))
        console.out(f"| {method} | {' | '.join(cells)} |")
    heading = ["", "rate", "seeds", "start", "end", "std over seeds", "end - start", "KL", "length"]
    console.out(f"\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    deviations = []
    for method in METHODS if tuned_rates(rows, task) else ():
        own = [r for r in rows if r["task"] == task and r["seed"] in SEEDS]
        best = best_rate(rows, task, method)
        own = [r for r in own if (r["method"], r["rate"]) == (method, best)]
        if len(own) < 2:
            continue
        ends, starts = [end(r) for r in own], [r["score"]["0"] for r in own]
        deviations.append(statistics.stdev(ends))
        figures = [
            statistics.mean(starts),
            statistics.mean(ends),
            deviations[-1],
            statistics.mean(ends) - statistics.mean(starts),
            statistics.mean(r["kl"][0] for r in own if r["kl"]),
        ]
        cells = [method, own[0]["rate"], str(len(own)), *(f"{value:.3f}" for value in figures)]
        lengths = [statistics.mean(r["length"][i] for r in own) for i in (0, -1)]
        console.out(f"| {' | '.join(cells)} | {lengths[0]:.0f} to {lengths[1]:.0f} |")
    if deviations:
        pooled = statistics.mean(d**2 for d in deviations) ** 0.5
        console.out(
            f"\npooled standard deviation {pooled:.3f}: 5 seeds see a difference of "
            f"{visible(pooled, 5):.3f}, 10 of {visible(pooled, 10):.3f}, 20 of "
            f"{visible(pooled, 20):.3f} ({POWER:.0%} power, two-sided t-test at {LEVEL:.0%})"
        )


def main() -> None:
    """Measure for a while, keep, print."""
    parser = argparse.ArgumentParser(description="Four methods on the tasks with worked steps.")
    parser.add_argument("--task", default="sums")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    arguments, console = parser.parse_args(), Console(width=170)
    kept = json.loads(ROWS.read_text()) if ROWS.exists() else {"rows": []}
    began, longest = time.perf_counter(), 0.0
    while not arguments.table and (cell := next_cell(kept["rows"], arguments.task)):
        spent = time.perf_counter() - began
        if spent + longest > 60 * arguments.minutes:
            break
        row = run(cell)
        longest = max(longest, row["seconds"])
        rows = kept["rows"]
        kept = {"shared": SHARED, "rows": [*rows, row]}
        ROWS.parent.mkdir(exist_ok=True)
        ROWS.write_text(json.dumps(kept, indent=1) + "\n")
        console.out(f"{cell}: {row['score']['0']:.3f} to {end(row):.3f}, {row['seconds']} s")
    tables(kept["rows"], arguments.task, console)


if __name__ == "__main__":
    main()

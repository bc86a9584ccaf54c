"""What experiments/kl_budget.py found: what was hoped for (docs/kl-budget.md), tables, plots.

    python experiments/kl_budget_figures.py

Means over seeds with 95 % intervals by Student's t.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments import kl_budget
from experiments.shared import write_between

from proxstep.lab.statistics import mean_interval, value_at

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = kl_budget.ROOT / "docs" / "kl-budget.md"
BEGIN, END = "<!-- {task}: made by experiments/kl_budget_figures.py -->", "<!-- end -->"
NUM_RATES = 5
"""Rates of each optimizer that the goals are about: the first so many of `kl_budget.RATES`."""

LENGTHS = {"arithmetic": "3", "sums": "22 to 88"}
Row = dict[str, Any]
ARMS = (
    *(f"`{control}`" for control in kl_budget.CONTROLS),
    *("`predicted`, 0.015 nats", "`predicted`, 4 judges", "`predicted`, 16 judges"),
)


def cells(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, float, str], list[Row]]]:
    """Yield optimizer, rate and arm with the runs, in order."""

    def key(row: Row) -> tuple[str, float, int]:
        return row["optimizer"], row["learning_rate"], ARMS.index(arm(row))

    for (optimizer, rate, place), group in itertools.groupby(sorted(rows, key=key), key=key):
        yield (optimizer, rate, ARMS[place]), list(group)


def arm(row: Row) -> str:
    """Return a run's control, with its budget and its judges where those are not the grid's.

    >>> arm({"control": "predicted", "budget": 0.01})
    '`predicted`, 0.01 nats'
    """
    other = row["control"] != "none" and row["budget"] != kl_budget.BUDGET
    judges = f", {row['judges']} judges" if "judges" in row else ""
    return f"`{row['control']}`" + (f", {row['budget']:g} nats" if other else "") + judges


def table(rows: Sequence[Row]) -> str:
    """Return the runs by optimizer, rate and control."""
    lines = [
        "| optimizer | rate | control | seeds | score | worst | KL of a step: median, 90 % | scale "
        "| passes | processor s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (optimizer, rate, control), runs in cells(rows):
        kl = sorted(k for r in runs for k in r["kl_of_the_step"])
        scales = [s for r in runs for s in r["scale"] if s is not None]
        forwards = [f for r in runs for f in r["forwards"] if f is not None]
        words = [
            *(optimizer, f"{rate:g}", control, str(len(runs))),
            mean_interval([r["score"] for r in runs]).text(),
            f"{min(r['score'] for r in runs):.3f}",
            f"{statistics.median(kl):.4f}, {kl[int(0.9 * len(kl))]:.4f}",
            f"{statistics.median(scales):.2f}" if scales else "",
            f"{statistics.mean(forwards):.1f}" if forwards else "",
            f"{statistics.median(r['processor_seconds'] for r in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def goals(rows: Sequence[Row], task: str) -> str:
    """Return, for each optimizer and control, what its worst rate and its worst seed lose.

    Against `none` at the rate that is best for it, and the smallest rate left out: a budget cannot
    make a step longer.
    """
    lines = [
        "| optimizer | control | worst rate | its score less that of `none` at its best rate, by "
        "seed | worst seed of all rates | below that best mean "
        "| reward at equal KL, less that of `none` |",
        "|---|---|---|---|---|---|---|",
    ]
    for optimizer in sorted({r["optimizer"] for r in rows}):
        chosen = kl_budget.RATES[task][optimizer][:NUM_RATES]
        own = [r for r in rows if r["optimizer"] == optimizer and r["learning_rate"] in chosen]
        tuned = max(
            (group for (*_, control), group in cells(own) if control == ARMS[0]), key=mean_score
        )
        by_seed = {r["seed"]: r["score"] for r in tuned}
        for control in ARMS:
            runs = [r for r in own if arm(r) == control and r["learning_rate"] > min(chosen)]
            if not runs:
                continue
            at_rate = min((group for _, group in cells(runs)), key=mean_score)
            less = [r["score"] - by_seed[r["seed"]] for r in at_rate if r["seed"] in by_seed]
            worst = min(r["score"] for r in runs)
            words = [
                *(optimizer, control, f"{at_rate[0]['learning_rate']:g}"),
                mean_interval(less).text("+"),
                f"{worst:.3f}",
                f"{1 - worst / mean_score(tuned):.0%} of {mean_score(tuned):.3f}",
                "" if control == ARMS[0] else at_equal_kl(own, control),
            ]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def mean_score(runs: Sequence[Row]) -> float:
    """Return the mean of the final scores."""
    return statistics.mean(run["score"] for run in runs)


def at_equal_kl(rows: Sequence[Row], control: str) -> str:
    """Return the difference of mean rewards at equal KL spent, over rates where `none` learns.

    A pair is two runs with one rate and seed; the KL is what the one that moved less spent over all
    of its steps, and the reward is the training batch's that was sampled then. Where `none` ends
    below its start there is nothing to hold against it.
    """
    by_key = {(r["learning_rate"], r["seed"], arm(r)): r for r in rows}
    found = []
    for (rate, seed, name), run in by_key.items():
        plain = by_key.get((rate, seed, ARMS[0]))
        if name != control or plain is None or plain["score"] < plain["first_score"]:
            continue
        paths = []
        for one in (run, plain):
            spent = np.cumsum([0.0, *one["kl_of_the_step"]])[:-1]  # before each batch
            paths.append((spent.tolist(), one["reward"]))
        shared = min(spent[-1] for spent, _ in paths)
        with_budget, without = (value_at(spent, reward, shared) for spent, reward in paths)
        found.append(with_budget - without)
    return f"{mean_interval(found).text('+')}, {len(found)} pairs" if found else ""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw scores against learning rates, and what steps were predicted and found to be."""
    optimizers = sorted({r["optimizer"] for r in rows})
    figure, axes = plt.subplots(
        1, len(optimizers) + 1, figsize=(4.5 * (len(optimizers) + 1), 3.6), squeeze=False
    )
    for axis, optimizer in zip(axes[0], optimizers, strict=False):
        for place, control in enumerate(ARMS):
            runs = [r for r in rows if (r["optimizer"], arm(r)) == (optimizer, control)]
            if not runs:
                continue
            color = f"C{place}"
            axis.plot(*_by_rate(runs), color=color, label=control.replace("`", ""))
            rest = {"s": 10, "color": color, "alpha": 0.6}
            axis.scatter([r["learning_rate"] for r in runs], [r["score"] for r in runs], **rest)
        axis.set(xscale="log", xlabel="learning rate", ylabel="greedy score", title=optimizer)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    axis = axes[0][-1]
    for control in ("predicted", "corrected"):
        pairs = [
            (p * s**2, k)
            for r in rows
            if arm(r) == f"`{control}`"
            for p, s, k in zip(r["predicted"], r["scale"], r["kl_of_the_step"], strict=True)
            if p
        ]
        if pairs:
            axis.scatter(*zip(*pairs, strict=True), s=6, alpha=0.5, label=control)
    axis.axline((kl_budget.BUDGET, kl_budget.BUDGET), slope=1, color="black", linewidth=0.7)
    axis.set(xscale="log", yscale="log", xlabel="predicted KL of the step, nats", title="all steps")
    axis.set(ylabel="KL of the step on a quarter of its batch")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_rates(rows_of: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw each task's final score against AdamW's learning rate, with a budget and without."""
    figure, axes = plt.subplots(1, len(rows_of), figsize=(8.4, 3.2), sharey=True, squeeze=False)
    looks = {
        "none": ("no budget", "#d55e00", "o", "--"),
        "predicted": (f"at most {kl_budget.BUDGET} nats per completion", "#0072b2", "s", "-"),
    }
    for axis, (task, rows) in zip(axes[0], rows_of.items(), strict=True):
        of_adamw = [r for r in rows if r["optimizer"] == "adamw"]
        for control, (label, color, marker, line) in looks.items():
            runs = [r for r in of_adamw if arm(r) == f"`{control}`"]
            rates, means = _by_rate(runs)
            axis.plot(rates, means, line, color=color, label=label)
            points = [(r["learning_rate"], r["score"]) for r in runs]
            axis.scatter(*zip(*points, strict=True), s=14, color=color, marker=marker, alpha=0.6)
        start = statistics.mean(r["first_score"] for r in of_adamw)
        axis.axhline(start, color="#666666", linewidth=0.8, linestyle=":")
        place = {"xytext": (0, 3), "textcoords": "offset points"}
        axis.annotate("before training", (rates[0], start), **place)
        axis.set(xscale="log", xlabel="learning rate of AdamW", ylim=(-0.02, 0.85))
        axis.set(title=f"{task}, answers of {LENGTHS[task]} characters")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set(ylabel="greedy score")
    axes[0][-1].legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _by_rate(runs: Sequence[Row]) -> tuple[list[float], list[float]]:
    rates = sorted({r["learning_rate"] for r in runs})
    scores = ([r["score"] for r in runs if r["learning_rate"] == rate] for rate in rates)
    return rates, [statistics.mean(found) for found in scores]


def main() -> None:
    """Print the tables, write them into the page, draw."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows_of = {task: kl_budget.written(task) for task in kl_budget.TASKS}
    tables = []
    for task, rows in rows_of.items():
        made = goals(rows, task)
        write_between(PAGE, BEGIN.format(task=task), END, made)
        tables.append(f"## {task}\n\n{table(rows)}\n")
        Console().out(f"{task}\n\n{made}\n", highlight=False)
        plot(rows, kl_budget.FOLDER / f"{task}.png")
    (kl_budget.FOLDER / "table.md").write_text("\n".join(tables), encoding="utf-8")
    plot_rates(rows_of, kl_budget.ROOT / "docs" / "figures" / "kl-budget.png")


if __name__ == "__main__":
    main()

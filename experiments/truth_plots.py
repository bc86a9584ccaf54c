"""The figure of an experiment's page; see truth.py."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan
from typing import Any

import numpy as np
from experiments.truth_tables import reference
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.spatial import ConvexHull, QhullError

from proxstep.lab.choosing import Chosen
from proxstep.lab.comparison import Comparison
from proxstep.lab.outcomes import Outcome
from proxstep.lab.statistics import Estimate
from proxstep.lab.strokes import COLORS, Stroke, strokes

Looks = dict[str, Any]
NUM_BINS = 5
"""Of the rewards against which gradient norms are drawn: each holds as many steps."""


def draw(comparison: Comparison, parts: list[Comparison]) -> Figure:
    """Return the arms' results above, and what their runs were like below.

    Args:
        comparison: Of all arms.
        parts: Those that the differences are of: see `parts_of`.
    """
    names = [[row.algorithm for row in part.settings[0].standings] for part in parts]
    looks, chosen = _looks(names), comparison.chosen
    figure = Figure(figsize=(12, 4.6 + 0.26 * len(looks)), layout="constrained")
    panels = figure.subplots(2, 3)
    _results(panels[0, 0], panels[0, 1], parts, looks)
    _hulls(panels[0, 2], chosen, looks)
    _curves(panels[1, 0], chosen, looks, "score")
    panels[1, 0].set_title("Greedy score by step")
    _curves(panels[1, 1], chosen, looks, "evaluation_entropy")
    panels[1, 1].set_title("Entropy by step, nats a token")
    panels[1, 1].set_visible(panels[1, 1].has_data())
    _gradients(panels[1, 2], chosen, looks)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(parts) if len(parts) > 1 else min(len(looks), 7),
    )
    return figure


DASHES: tuple[tuple[float, ...], ...] = ((), (3.6, 1.7), (1.0, 1.3), (6.0, 1.5, 1.0, 1.5))


def _looks(parts: list[list[str]]) -> Looks:
    """Return each arm's color and dash.

    Algorithms have their own color; arms that would share one are colored in their order. Of
    several parts, each has a dash, and the arms of one place in them a color.
    """
    own = strokes(parts[0])
    if len(parts) == 1 and len({look.color for look in own.values()}) == len(parts[0]):
        return own
    rows = [
        part[start : start + len(COLORS)]
        for part in parts
        for start in range(0, len(part), len(COLORS))
    ]
    return {
        name: Stroke(place, DASHES[number % len(DASHES)])
        for number, row in enumerate(rows)
        for place, name in enumerate(row)
    }


def _results(left: Any, right: Any, parts: list[Comparison], looks: Looks) -> None:
    """What each arm ends above the one it is compared with, and the KL saved at equal score."""
    whose = reference(parts)
    pairs = {
        pair.first: pair
        for part in parts
        for pair in part.settings[0].pairs
        if pair.second == part.against
    }
    rows = [row for part in parts for row in part.settings[0].standings]
    for place, row in enumerate(rows):
        color = looks[row.algorithm].color
        if row.algorithm in pairs:
            _interval(left, place, pairs[row.algorithm].final, 1.0, color)
            _interval(right, place, pairs[row.algorithm].kl_saved, 100.0, color)
        elif not whose:
            _interval(left, place, row.final, 1.0, color)
    for axes in (left, right):
        axes.set_yticks(range(len(rows)), [row.algorithm for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    right.set_yticklabels([])
    left.set_title("Final score" + (f" - {whose}" if whose else ""))
    if whose:
        left.axvline(0, color="#9aa1ab", linewidth=1)
    right.set_title("Less KL at equal score, %")
    right.axvline(0, color="#9aa1ab", linewidth=1)
    right.set_xlim(max(right.get_xlim()[0], -150), min(right.get_xlim()[1], 100))


def _interval(axes: Any, place: int, found: Estimate, unit: float, color: str) -> None:
    if isnan(found.value):
        return
    axes.plot([found.value * unit], [place], "o", color=color)
    if not isnan(found.low):
        axes.plot([found.low * unit, found.high * unit], [place, place], color=color)


def _hulls(axes: Any, chosen: dict[str, Chosen], looks: Looks) -> None:
    """Where each run ended, of every value that was tried, with the hull of each arm's runs."""
    for name, own in chosen.items():
        ends = np.array([(1000 * o.kl[-1], o.final) for o in own.pool if o.kl])
        if not len(ends):
            continue
        axes.plot(*ends.T, "o", color=looks[name].color, markersize=2.5)
        for corners in _hull(ends):
            axes.fill(*corners.T, color=looks[name].color, alpha=0.08)
            axes.plot(*np.vstack([corners, corners[:1]]).T, linewidth=0.7, **looks[name].matplotlib)
    axes.set_title("Score against KL, mnat a token")


def _hull(points: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the corners of the points' convex hull, if they have an area."""
    if len(points) > 2:
        try:
            yield points[ConvexHull(points).vertices]
        except QhullError:  # all on one line
            return


def _curves(axes: Any, chosen: dict[str, Chosen], looks: Looks, field: str) -> None:
    """The mean of a field over an arm's reported runs."""
    for name, own in chosen.items():
        series = [outcome.run.series(field) for outcome in own.outcomes]
        found = [(steps, values) for steps, values in series if steps]
        steps = min((s for s, _ in found), key=len, default=[])
        if steps:
            mean = np.mean([values[: len(steps)] for _, values in found], axis=0)
            axes.plot(steps, mean, label=name, **looks[name].matplotlib)


def _gradients(axes: Any, chosen: dict[str, Chosen], looks: Looks) -> None:
    """Gradient norms against the reward of the same step, means of steps with like rewards."""
    for name, own in chosen.items():
        pairs = [pair for o in own.outcomes for pair in _same_steps(o, "reward", "grad_norm")]
        parts = np.array_split(np.array(sorted(pairs)), NUM_BINS) if len(pairs) >= NUM_BINS else []
        means = np.array([part.mean(axis=0) for part in parts])
        if len(means):
            axes.plot(*means.T, marker="o", **looks[name].matplotlib)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Gradient norm against reward")


def _same_steps(outcome: Outcome, *fields: str) -> Iterator[tuple[float, ...]]:
    known = [dict(zip(*outcome.run.series(field), strict=True)) for field in fields]
    for step in known[0]:
        if all(step in values for values in known):
            yield tuple(values[step] for values in known)

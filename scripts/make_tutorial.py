"""Run docs/tutorial.md: write below each snippet what it prints, and draw the page's figures.

python scripts/make_tutorial.py
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from proxstep.lab.plots import STYLE

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
FIGURES = PAGE.parent / "figures"
ACTIONS = ("a", "b", "c", "d")
COLORS = {"reinforce": "#c2542d", "grpo": "#7a6fb0", "opo": "#1f7a8c", "isopo": "#1f7a8c"}
COLORS |= {"wanted": "#9aa1ab", "natural": "#2f6d3a"}
_SNIPPET = re.compile(
    r"(```python\n(?P<code>.*?)```\n)(\n```text\n(?P<output>.*?)```\n)?", re.DOTALL
)


def run(page: str, names: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Run a page's snippets in one namespace; yield what stands below each and what it printed."""
    for snippet in _SNIPPET.finditer(page):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(snippet["code"], names)
        yield snippet["output"] or "", printed.getvalue()


def with_outputs(page: str, outputs: list[str]) -> str:
    """Return the page with each snippet's output below it."""
    waiting = iter(outputs)

    def block(snippet: re.Match[str]) -> str:
        output = next(waiting)
        return snippet[1] + (f"\n```text\n{output}```\n" if output else "")

    return _SNIPPET.sub(block, page)


def lengths_figure(names: dict[str, Any]) -> Figure:
    """Return the four actions' lengths, and what steps of equal length do."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    series = {
        "probability": (names["probs"], "#9aa1ab"),
        "|G|, in the parameters": (names["norms"], COLORS["reinforce"]),
        "Fisher length": (names["fisher_lengths"], COLORS["isopo"]),
    }
    _bars(left, series)
    left.set_title("How long each action's gradient is")
    steps = {
        "0.3 G": (names["plain"], COLORS["reinforce"]),
        "0.2 G / Fisher length": (names["isometric"], COLORS["isopo"]),
    }
    _bars(right, steps)
    right.set_title("How far a step along it moves the policy")
    right.set_ylabel("KL, nats")
    right.set_ylim(top=0.031)  # room for the legend
    return figure


def effects_figure(names: dict[str, Any]) -> Figure:
    """Return what one step does to four completions."""
    figure = _figure(width=6.5)
    axes = figure.subplots()
    series = {name: (change, COLORS[name]) for name, change in names["effects"].items()}
    _bars(axes, series, ("first", "second", "third", "fourth"))
    axes.set_title("Change of each completion's log-probability")
    axes.set_ylabel("scaled to equal mean size")
    return figure


def updates_figure(names: dict[str, Any]) -> Figure:
    """Return the ratios of the two rewarded actions, and the divergence, over the updates."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    probs = names["probs"]
    for name, path in names["ratios"].items():
        left.plot(path[:, 1], color=COLORS[name], label=f"{name}, b")
        left.plot(path[:, 3], color=COLORS[name], linestyle="--", label=f"{name}, d (rare)")
        divergence = torch.special.xlogy(probs * path, path).sum(1)
        right.plot(divergence, color=COLORS[name], label=name)
    left.set_title("Ratio of the two rewarded actions")
    right.set_title("KL(policy || where it began), nats")
    left.legend(fontsize=8, ncols=2, loc="center right", bbox_to_anchor=(1.0, 0.72))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("update on the same samples")
    return figure


def budget_figure(names: dict[str, Any]) -> Figure:
    """Return the divergence of one step by the learning rate."""
    figure = _figure(width=5.5)
    axes = figure.subplots()
    axes.loglog(names["rates"], names["free"], "o-", color=COLORS["reinforce"], label="AdamW")
    label = "KlBudget(AdamW, nats=0.03)"
    axes.loglog(names["rates"], names["budgeted"], "o-", color=COLORS["isopo"], label=label)
    axes.set_xlabel("learning rate")
    axes.set_title("Nats that one step moves the policy")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)
    return figure


DRAWN = {
    "lengths": lengths_figure,
    "effects": effects_figure,
    "updates": updates_figure,
    "budget": budget_figure,
}


def _figure(width: float = 9.0) -> Figure:
    return Figure(figsize=(width, 3.0), layout="constrained")


def _bars(
    axes: Axes, series: dict[str, tuple[Any, str]], groups: tuple[str, ...] = ACTIONS
) -> None:
    width = 0.8 / len(series)
    for number, (label, (values, color)) in enumerate(series.items()):
        places = [group + width * (number - (len(series) - 1) / 2) for group in range(len(groups))]
        axes.bar(places, [float(value) for value in values], width, label=label, color=color)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=8)


def main() -> None:
    """Write the page and the figures."""
    names: dict[str, Any] = {}
    page = PAGE.read_text(encoding="utf-8")
    outputs = [printed for _, printed in run(page, names)]
    PAGE.write_text(with_outputs(page, outputs), encoding="utf-8")
    with mpl.rc_context(STYLE):
        for name, draw in DRAWN.items():
            path = FIGURES / f"tutorial-{name}.png"
            draw(names).savefig(path, dpi=130)
            sys.stdout.write(f"{path.name}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()

"""The curves of a comparison as one figure for a README.

Figures are made with matplotlib's object-oriented interface, so no state outlives a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from proxstep.lab.panels import LARGEST, Panel, band_note, charts_of, step_panel
from proxstep.lab.strokes import strokes
from proxstep.runs.reading import Run, by_algorithm

_MOST_POINTS_WITH_MARKERS = 15
_INK, _GRID = "#33383f", "#e3e6ea"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.title_fontsize": 8.5,
    "svg.fonttype": "none",
}


def overview_figure(runs: Sequence[Run]) -> Figure:
    """Return the six charts as one figure, two rows of three, for the caller to save.

    At `dpi=160` the text is still read easily where a README shows the picture at half its size.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(10.5, 6.2), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.04)
        )
        for axes, chart in zip(figure.subplots(2, 3).flat, charts_of(runs), strict=True):
            _draw(axes, step_panel(runs, chart))
        _add_legend(figure, runs)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    looks = strokes(curve.algorithm for curve in panel.curves)
    for curve in panel.curves:
        look: dict[str, Any] = looks[curve.algorithm].matplotlib
        if curve.low:
            band = _drawn(curve.low), _drawn(curve.high)
            axes.fill_between(curve.x, *band, color=look["color"], alpha=0.16, linewidth=0)
        marker = "o" if len(curve.x) <= _MOST_POINTS_WITH_MARKERS else None
        axes.plot(curve.x, _drawn(curve.y), marker=marker, **look)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.from_zero and all(value >= 0 for c in panel.curves for value in (*c.low, *c.y)):
        axes.set_ylim(bottom=0)
    if not panel.curves:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        axes.set_yticks([])


def _drawn(values: Sequence[float]) -> list[float]:
    return [value if abs(value) < LARGEST else nan for value in values]


def _add_legend(figure: Figure, runs: Sequence[Run]) -> None:
    looks = strokes(by_algorithm(runs))
    handles = [Line2D([], [], label=name, **look.matplotlib) for name, look in looks.items()]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=_legend_columns(list(looks), figure.get_figwidth()),
        title=band_note(runs),
        handlelength=1.8,
        columnspacing=1.2,
    )


def _legend_columns(names: Sequence[str], inches: float) -> int:
    """Return how many legend columns fit, at about 0.6 em a letter and 4 em a line and its gaps.

    >>> _legend_columns(["reinforce", "grpo", "isopo", "opo"], inches=4.2)
    4
    >>> _legend_columns(["isopo-euclidean", "isopo-natural", "isopo-npg", "isopo"], inches=4.2)
    3
    """
    ems = inches * 72 / STYLE["font.size"]
    for num_columns in range(len(names), 1, -1):
        columns = np.array_split(names, num_columns)
        if sum(4 + 0.6 * max(map(len, column)) for column in columns) <= ems:
            return num_columns
    return 1

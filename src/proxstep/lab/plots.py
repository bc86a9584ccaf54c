"""Learning curves by algorithm: inline SVGs for the report page, or one figure for a README.

Figures are made with matplotlib's object-oriented interface, so no state outlives a call.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from matplotlib.typing import LineStyleType

from proxstep.config.recipe import algorithm_names
from proxstep.runs.reading import Run, by_algorithm, seed_spread

# The color-blind-safe palette of Okabe and Ito, without the yellow that vanishes on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
# What is compared most often has colors of its own and solid lines.
_FIRST = ("reinforce", "grpo", "isopo", "opo", "isopo+opo", "dapo", "gspo")
_DASHES: tuple[LineStyleType, ...] = ("-", "--", ":")
_MOST_POINTS_WITH_MARKERS = 15
_LOG_SCALE_ABOVE_RATIO = 30.0
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

_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that no XML holds, which a name may."""


@dataclass(frozen=True)
class Chart:
    """One quantity to draw.

    Attributes:
        field: The field of `metrics.jsonl`.
        title: The chart's title.
        unit: The label of the vertical axis.
        teaching: One sentence for the reader: what it is, and what to look for.
        from_zero: Whether zero is on the axis.
        may_be_log: Whether the axis turns logarithmic for values that span a factor of 30.
    """

    field: str
    title: str
    unit: str
    teaching: str
    from_zero: bool = False
    may_be_log: bool = False


CHARTS = (
    Chart(
        "reward",
        "Reward",
        "reward units",
        "Mean reward of the completions sampled in each step, in reward units; new prompts every "
        "step make it noisy, so look at the trend and not at single peaks.",
    ),
    Chart(
        "score",
        "Greedy score",
        "reward units",
        "Mean reward of greedy completions on the validation prompts, in reward units; this is the "
        "result, so look at where a curve ends and whether its band is clear of the others.",
    ),
    Chart(
        "kl_policy_initial",
        "KL(policy ‖ initial)",
        "nats per token",
        "Divergence from the initial policy on the current policy's own samples, in nats per "
        "token; it grows when the policy writes what the initial one would not, so look for score "
        "gained at little drift.",
        from_zero=True,
    ),
    Chart(
        "kl_initial_policy",
        "KL(initial ‖ policy)",
        "nats per token",
        "Divergence from the initial policy on a frozen set of its samples, in nats per token; it "
        "grows when the policy gives up what the initial one would write, so look for a curve "
        "that climbs while the score does not.",
        from_zero=True,
    ),
    Chart(
        "entropy",
        "Entropy",
        "nats per token",
        "Mean entropy of the next token at the sampled positions, in nats per token; near zero "
        "the samples of a group are all alike and nothing is left to learn from, so look for a "
        "fall that outruns the gain in score.",
        from_zero=True,
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        "norm",
        "Norm of the gradient before clipping and after any change of geometry, which changes its "
        "unit too; look for spikes and decay within a curve, and not at its height against "
        "another's.",
        from_zero=True,
        may_be_log=True,
    ),
)


class Stroke(NamedTuple):
    """How an algorithm is drawn, in every chart alike."""

    color: str
    dash: LineStyleType


def strokes(algorithms: Iterable[str]) -> dict[str, Stroke]:
    """Return each algorithm's stroke: the same in every chart and, by its name, on every page.

    Only where two names have one stroke, or nobody knows the name, does it get the next free one.

    >>> strokes(["grpo"]), strokes(["opo", "grpo"])["grpo"]
    ({'grpo': Stroke(color='#d55e00', dash='-')}, Stroke(color='#d55e00', dash='-'))
    """
    everything = [Stroke(color, dash) for dash in _DASHES for color in _COLORS]
    places = {name: i for i, name in enumerate(dict.fromkeys((*_FIRST, *algorithm_names())))}
    found: dict[str, Stroke] = {}
    for algorithm in algorithms:
        if algorithm not in found:
            start = places.get(algorithm, 0)
            order = [everything[(start + i) % len(everything)] for i in range(len(everything))]
            free = (stroke for stroke in order if stroke not in found.values())
            found[algorithm] = next(free, order[0])
    return found


def band_note(runs: Sequence[Run]) -> str:
    """Return what line and band stand for."""
    if all(len(members) == 1 for members in by_algorithm(runs).values()):
        return "one seed each, so no band"
    return "line: mean over seeds; band: min to max"


def curve_svg(runs: Sequence[Run], chart: Chart) -> str:
    """Return one chart as an SVG element to be put into an HTML page.

    The element scales with its container, has text as text and says in its label how each curve
    ends. Its identifiers are salted with the field, so that charts of one page do not clash.
    """
    label = _describe(runs, chart)
    return _as_svg(lambda axes: _draw(axes, runs, chart), runs, chart.field, label, band_note(runs))


Track = tuple[Sequence[float], Sequence[float]]
"""A run's KL and score at its evaluations."""


def frontier_svg(runs: Sequence[Run], tracks: Mapping[str, Sequence[Track]]) -> str:
    """Return the scores against the KL spent, each run a thin line and a dot at its end.

    Args:
        runs: The runs, for the legend.
        tracks: Each algorithm's runs.
    """

    def draw(axes: Axes) -> None:
        for algorithm, stroke in strokes(tracks).items():
            look: dict[str, Any] = {"color": stroke.color, "linestyle": stroke.dash}
            for kl, score in tracks[algorithm]:
                axes.plot(kl, score, linewidth=1.0, alpha=0.6, **look)
                axes.plot(kl[-1:], score[-1:], marker="o", color=stroke.color)
        axes.set_xlabel("KL(policy ‖ initial), nats per token")
        axes.set_ylabel("greedy score")

    ends = [
        f"{algorithm} ends at {np.mean([score[-1] for _, score in members]):.3g} for "
        f"{np.mean([kl[-1] for kl, _ in members]):.3g} nats"
        for algorithm, members in tracks.items()
    ]
    label = f"Greedy score against KL(policy ‖ initial), per token: {', '.join(ends)}."
    return _as_svg(draw, runs, "frontier", label, "each run a line; dot: its end")


def _as_svg(
    draw: Callable[[Axes], None], runs: Sequence[Run], salt: str, label: str, note: str
) -> str:
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        width, names = 4.2, list(by_algorithm(runs))
        num_rows = ceil(len(names) / _legend_columns(names, width))
        figure = Figure(figsize=(width, 2.9 + 0.2 * num_rows), layout="constrained")
        draw(figure.subplots())
        _add_legend(figure, runs, "outside upper left", note).set_alignment("left")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return _inline(svg.getvalue(), label)


def overview_figure(runs: Sequence[Run]) -> Figure:
    """Return the six charts as one figure, two rows of three, for the caller to save.

    At `dpi=160` the text is still read easily where a README shows the picture at half its size.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(10.5, 6.2), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.04)
        )
        for axes, chart in zip(figure.subplots(2, 3).flat, CHARTS, strict=True):
            _draw(axes, runs, chart)
            axes.set_title(chart.title)
        _add_legend(figure, runs, "outside upper center", band_note(runs))
    return figure


def _draw(axes: Axes, runs: Sequence[Run], chart: Chart) -> None:
    groups = by_algorithm(runs)
    drawn: list[float] = []
    for algorithm, stroke in strokes(groups).items():
        spreads = seed_spread(groups[algorithm], chart.field)
        steps = list(spreads)
        means = [spread.mean for spread in spreads.values()]
        lows = [spread.low for spread in spreads.values()]
        highs = [spread.high for spread in spreads.values()]
        if len(groups[algorithm]) > 1:
            axes.fill_between(steps, lows, highs, color=stroke.color, alpha=0.16, linewidth=0)
        marker = "o" if len(steps) <= _MOST_POINTS_WITH_MARKERS else None
        axes.plot(steps, means, color=stroke.color, linestyle=stroke.dash, marker=marker)
        drawn += lows + highs
    axes.set_xlabel("step")
    axes.set_ylabel(chart.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if drawn:
        _scale(axes, chart, drawn)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        axes.set_yticks([])


def _scale(axes: Axes, chart: Chart, drawn: Sequence[float]) -> None:
    if chart.may_be_log and 0 < _LOG_SCALE_ABOVE_RATIO * min(drawn) < max(drawn):
        axes.set_yscale("log")
        axes.set_ylabel(f"{chart.unit} (log scale)")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif chart.from_zero and min(drawn) >= 0:
        axes.set_ylim(bottom=0)


def _add_legend(figure: Figure, runs: Sequence[Run], place: Any, title: str) -> Legend:
    handles = [
        Line2D([], [], color=stroke.color, linestyle=stroke.dash, label=algorithm)
        for algorithm, stroke in strokes(by_algorithm(runs)).items()
    ]
    return figure.legend(
        handles=handles,
        loc=place,
        ncols=_legend_columns(list(by_algorithm(runs)), figure.get_figwidth()),
        title=title,
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


def _describe(runs: Sequence[Run], chart: Chart) -> str:
    ends = []
    for algorithm, members in by_algorithm(runs).items():
        spreads = list(seed_spread(members, chart.field).values())
        end = f"ends at {spreads[-1].mean:.3g}" if spreads else "not measured"
        ends.append(f"{algorithm} {end}")
    return f"{chart.title} by step, {chart.unit}: {', '.join(ends)}."


def _inline(document: str, label: str) -> str:
    """Return an SVG document as an element, without metadata, fixed size and page-wide style."""
    name = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(_NOT_XML.sub("\ufffd", document))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{name}metadata", f"{name}style"}:
                parent.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', document))
    for element in root.iter():
        _clean(element, used)
        element.tag = element.tag.removeprefix(name)
    del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"xmlns": name[1:-1], "role": "img", "aria-label": label}
    root.attrib |= {"font-family": "system-ui, sans-serif", "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, used: set[str]) -> None:
    attributes: dict[str, Any] = element.attrib
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if "style" in attributes:
        attributes["style"] = re.sub(r"font-family: [^;]*;? ?", "", attributes["style"])
    target = attributes.pop("{http://www.w3.org/1999/xlink}href", None)
    if target:
        attributes["href"] = target

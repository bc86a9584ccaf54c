"""The figures of the toys, in the style of the comparison's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from proxstep.lab.bandit import (
    UPDATES_PER_ROLLOUT,
    Trace,
    kl_per_gain,
    quartiles,
    reward_at_kl,
)
from proxstep.lab.plots import STYLE
from proxstep.lab.saturation import Curve
from proxstep.lab.strokes import Stroke, strokes

_TICKS = (0.5, 0.9, 0.99, 0.999, 0.9999)
_MAGNITUDES = ("0.00001", "0.0001", "0.001", "0.01", "0.1", "1", "10", "100")
_BELOW_THE_AXIS = 1e-30
_TOP = 2.4
_NUM_LEVELS = 100
_IN_BOTH_ROWS = ("reinforce", "natural gradient")  # what the others are seen against


def saturation_figure(curves: Sequence[Curve], columns: Mapping[str, Sequence[float]]) -> Figure:
    """Return the gradient's magnitude against confidence, whole and near 1, and for OPO by v.

    The columns are what `proxstep.lab.saturation.trace` returned for the curves. ISOPO and OPO have
    the lower row, all others the upper one, so that no panel has more than eight curves.
    """
    looks = strokes(curve.name for curve in curves)
    ours = [curve for curve in curves if curve.name.startswith(("isopo", "opo"))]
    rows = [[curve for curve in curves if curve not in ours], ours]
    in_v = [curve for curve in curves if curve.coordinate == "v"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 7.4), layout=ConstrainedLayoutEngine(wspace=0.05))
        axes_RC = figure.subplots(2, 3)
        panels = zip("ab", ("others", "ISOPO and OPO"), rows, axes_RC, strict=True)
        for letter, whose, members, (whole, confident, _) in panels:
            in_z = [curve for curve in members if curve.coordinate == "z"]
            _draw_whole(whole, in_z, columns, looks)
            whole.set_title(f"({letter}) |dL/dz|, {whose}")
            _draw_confident(confident, in_z, columns, looks)
            confident.set_title(f"({letter}) |dL/dz|, log scale")
        axes_RC[0, 1].text(0.2, 30, "vertical drop: exactly 0 from there on", fontsize=8)
        in_ratio_space = axes_RC[1, 2]
        _draw_whole(in_ratio_space, in_v, columns, looks)
        in_ratio_space.set_title("(c) |dL/dv|, OPO")
        labels = {
            curve.name: f"{curve.name}: {curve.settings}" if curve.settings else curve.name
            for curve in curves
        }
        axes_RC[0, 2].axis("off")
        axes_RC[0, 2].legend(
            handles=_handles(looks, labels),
            loc="center left",
            title="advantage 1, old and reference policy at p = 0.5",
            fontsize=8.5,
            handlelength=3.2,
        )
    return figure


def _draw_whole(
    axes: Axes,
    curves: Sequence[Curve],
    columns: Mapping[str, Sequence[float]],
    looks: Mapping[str, Stroke],
) -> None:
    for curve in curves:
        _line(axes, *_drawn(columns["p"], columns[curve.name]), looks[curve.name])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, _TOP)
    axes.set_xlabel("confidence p")


def _draw_confident(
    axes: Axes,
    curves: Sequence[Curve],
    columns: Mapping[str, Sequence[float]],
    looks: Mapping[str, Stroke],
) -> None:
    """Draw p >= 0.5 spaced by z, in which an exponential decay is a straight line."""
    for curve in curves:
        value_N = [max(value, _BELOW_THE_AXIS) for value in columns[curve.name]]
        _line(axes, columns["z"], value_N, looks[curve.name])
    axes.set_yscale("log")
    axes.set_xlim(-0.2, _logit(_TICKS[-1]))
    axes.set_ylim(1e-5, 100)
    axes.set_yticks([float(text) for text in _MAGNITUDES], _MAGNITUDES)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([_logit(p) for p in _TICKS], [f"{p:g}" for p in _TICKS])
    axes.set_xlabel("confidence p, spaced by z")


def bandit_figure(traces: Mapping[str, Sequence[Trace]]) -> Figure:
    """Return reward against KL, KL per reward gained, and the distance to the natural gradient.

    Each method has one trace per seed, all equally long. ISOPO and OPO have the upper row, the
    other objectives the lower one, so that no panel has more than eight curves.
    """
    looks = strokes(traces)
    furthest = max(max(t.kl_policy_initial) for of_seeds in traces.values() for t in of_seeds)
    levels = [furthest * i / _NUM_LEVELS for i in range(_NUM_LEVELS + 1)]
    ours = [name for name in traces if name.startswith(("isopo", "opo"))]
    both = [name for name in traces if name in _IN_BOTH_ROWS]
    others = [name for name in traces if name not in (*ours, *both)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 7.4), layout=ConstrainedLayoutEngine(wspace=0.05))
        axes_RC = figure.subplots(2, 3, sharex="col", sharey="col")
        for names, (path, price, distance) in zip((ours, others), axes_RC, strict=True):
            for name in (*names, *both):
                of_seeds = traces[name]
                rewards = [[reward_at_kl(t, kl) for kl in levels] for t in of_seeds]
                reached = _bands(rewards, min_share=0.75)
                _band(path, {levels[place]: band for place, band in reached.items()}, looks[name])
                of_step = _bands([kl_per_gain(t) for t in of_seeds])
                _band(price, {step + 1: band for step, band in of_step.items()}, looks[name])
                blocks = _bands([_distances(t) for t in of_seeds])
                centers = {(i + 0.5) * UPDATES_PER_ROLLOUT: band for i, band in blocks.items()}
                _band(distance, centers, looks[name])
            path.set(title="(a) Reward by KL spent", ylabel="expected reward")
            price.set(title="(b) KL per reward gained", ylabel="nats per reward unit (log scale)")
            price.set_yscale("log")
            price.yaxis.set_major_formatter("{x:g}")
            price.yaxis.set_minor_formatter(NullFormatter())
            distance.set(
                title="(c) Distance to natural gradient", ylabel="1 - cosine, Fisher metric"
            )
        distance.set_ylim(bottom=-0.02)
        path.set_xlabel("KL(π ‖ π₀) when first reached, nats")
        for axes in (price, distance):
            axes.set_xlabel("update")
        figure.legend(
            handles=_handles(looks, {name: name for name in looks}),
            loc="outside lower center",
            ncols=6,
            title="median and interquartile range over seeds; every update spends the same KL",
            fontsize=8.5,
            handlelength=2.2,
            columnspacing=1.4,
        )
    return figure


def _distances(trace: Trace) -> list[float | None]:
    """Return 1 - cosine averaged over the updates of each rollout; None where there were none."""
    blocks = []
    for start in range(0, len(trace.cosine_fisher), UPDATES_PER_ROLLOUT):
        block = trace.cosine_fisher[start : start + UPDATES_PER_ROLLOUT]
        given = [1 - cosine for cosine in block if cosine is not None]
        blocks.append(sum(given) / len(given) if given else None)
    return blocks


def _bands(
    rows: Sequence[Sequence[float | None]], *, min_share: float = 0.5
) -> dict[int, tuple[float, float, float]]:
    """Return the quartiles over seeds by place, where a share of the seeds has a value."""
    bands = {}
    for place, values in enumerate(zip(*rows, strict=True)):
        band = quartiles(values)
        share = sum(value is not None for value in values) / len(values)
        if band is not None and share >= min_share:
            bands[place] = band
    return bands


def _band(axes: Axes, bands: Mapping[float, tuple[float, float, float]], stroke: Stroke) -> None:
    lows, middles, highs = zip(*bands.values(), strict=True) if bands else ((), (), ())
    axes.fill_between(list(bands), lows, highs, color=stroke.color, alpha=0.07, linewidth=0)
    _line(axes, list(bands), middles, stroke)


def _drawn(x_N: Sequence[float], y_N: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return a curve up to p = 0.999: what happens beyond fits into no linear axis."""
    kept = [(x, y) for x, y in zip(x_N, y_N, strict=True) if x <= 0.999]
    return [x for x, _ in kept], [y for _, y in kept]


def _line(axes: Axes, x_N: Sequence[float], y_N: Sequence[float], stroke: Stroke) -> None:
    axes.plot(x_N, y_N, **stroke.matplotlib)


def _handles(looks: Mapping[str, Stroke], labels: Mapping[str, str]) -> list[Line2D]:
    return [Line2D([], [], label=labels[name], **look.matplotlib) for name, look in looks.items()]


def _logit(p: float) -> float:
    return math.log(p / (1 - p))

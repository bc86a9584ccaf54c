"""A panel as an SVG element for an HTML page, which is seen without any script.

Paths hold the values themselves, base 10 logarithms where the axis is logarithmic, and a transform
maps them to the plot. So the script of the page reads its numbers from the paths, and to zoom it
changes the transforms and draws the ticks again by the rules of this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

from markupsafe import Markup, escape

from proxstep.lab.panels import LARGEST, Curve, Panel
from proxstep.lab.strokes import Stroke

WIDTH, HEIGHT = 400, 270
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 48, 24, 346, 206
MOST_POINTS = 250
"""Of a curve; of more, every n-th."""
_MOST_POINTS_WITH_DOTS = 15
_NUM_TICKS = 6

Point = tuple[float, ...]


class Limits(NamedTuple):
    """What an axis spans."""

    low: float
    high: float


def panel_svg(panel: Panel, looks: Mapping[str, Stroke]) -> Markup:
    """Return a panel as an SVG element, which says in its label how each curve ends.

    Args:
        panel: What is drawn.
        looks: Each algorithm's stroke.
    """
    paths = [_Paths.of(curve, panel) for curve in panel.curves]
    paths = [path for path in paths if path.line]
    label = escape(_describe(panel))
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"'
    if not paths:
        middle = f'x="{LEFT + PLOT_WIDTH / 2:g}" y="{TOP + PLOT_HEIGHT / 2:g}"'
        return Markup(f'{head}><text {middle} text-anchor="middle">not measured</text></svg>')
    x = limits([point[0] for path in paths for point in path.line], pad=0.02)
    y = limits(
        [value for path in paths for point in (*path.line, *path.band) for value in point[1:]],
        from_zero=panel.from_zero and not panel.log,
    )
    scale_x, scale_y = PLOT_WIDTH / (x.high - x.low), -PLOT_HEIGHT / (y.high - y.low)
    numbers = (scale_x, 0, 0, scale_y, -x.low * scale_x, -y.high * scale_y)
    matrix = f"matrix({' '.join(f'{number:.7g}' for number in numbers)})"
    parts = [
        head,
        f' data-kind="{_kind(panel)}" data-names="{escape(json.dumps(panel.x_names))}">',
        f'<text x="0" y="12">{escape(panel.y_label)}</text>',
        f'<text x="{LEFT + PLOT_WIDTH}" y="{HEIGHT - 4}" text-anchor="end">'
        f"{escape(panel.x_label)}</text>",
        f'<g class="ticks">{"".join(_tick_marks(panel, x, y))}</g>',
        f'<svg class="plot" x="{LEFT}" y="{TOP}" width="{PLOT_WIDTH}" height="{PLOT_HEIGHT}">',
        *(path.element(looks[path.curve.algorithm], matrix) for path in paths),
        "</svg></svg>",
    ]
    return Markup("".join(parts))


def limits(values: Iterable[float], *, pad: float = 0.05, from_zero: bool = False) -> Limits:
    """Return what an axis spans: the values, and a little room.

    >>> limits([0.0, 1.0]), limits([0.0, 1.0], from_zero=True), limits([2.0])
    (Limits(low=-0.05, high=1.05), Limits(low=0.0, high=1.05), Limits(low=1.8, high=2.2))
    """
    values = list(values)
    low, high = min(values), max(values)
    room = (high - low) * pad if high > low else abs(low) * 0.1 or 0.5
    if from_zero and low >= 0:
        return Limits(0.0, high + room)
    return Limits(low - room, high + room)


def ticks(axis: Limits, *, whole: bool = False) -> list[float]:
    """Return about six round numbers on an axis.

    >>> ticks(Limits(-0.05, 1.05)), ticks(Limits(0, 3), whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 1.0, 2.0, 3.0])
    """
    rough = (axis.high - axis.low) / _NUM_TICKS
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = ceil(axis.low / step - 1e-9), floor(axis.high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(axis: Limits) -> list[float]:
    """Return the logarithms of powers of ten on an axis of logarithms, and 2 and 5 between if few.

    >>> [round(10**tick, 6) for tick in log_ticks(Limits(-0.1, 1.4))]
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    powers = range(floor(axis.low), ceil(axis.high) + 1)
    factors = (1, 2, 5) if axis.high - axis.low < 2.5 else (1,)
    every = ceil((axis.high - axis.low) / 6) if len(factors) == 1 else 1
    found = [k + log10(factor) for k in powers if k % every == 0 for factor in factors]
    return [tick for tick in found if axis.low <= tick <= axis.high]


def _kind(panel: Panel) -> str:
    kinds = {"log": panel.log, "zero": panel.from_zero and not panel.log, "runs": panel.by_run}
    return " ".join(kind for kind, holds in kinds.items() if holds)


def _tick_marks(panel: Panel, x: Limits, y: Limits) -> Iterator[str]:
    for tick in log_ticks(y) if panel.log else ticks(y):
        at = TOP + PLOT_HEIGHT * (y.high - tick) / (y.high - y.low)
        text = f"{10**tick if panel.log else tick:.6g}"
        yield f'<path d="M{LEFT} {at:.1f}h{PLOT_WIDTH}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    for tick in ticks(x, whole=not panel.by_run):
        at = LEFT + PLOT_WIDTH * (tick - x.low) / (x.high - x.low)
        place = f'x="{at:.1f}" y="{TOP + PLOT_HEIGHT + 18}"'
        yield f'<text {place} text-anchor="middle">{tick:.6g}</text>'


class _Paths(NamedTuple):
    """A curve's points as they are drawn."""

    curve: Curve
    segments: list[list[Point]]
    dots: bool

    @classmethod
    def of(cls, curve: Curve, panel: Panel) -> _Paths:
        columns = (curve.x, curve.y, curve.low, curve.high) if curve.low else (curve.x, curve.y)
        points = [tuple(map(float, point)) for point in zip(*columns, strict=True)]
        segments: list[list[Point]] = [[]]
        for point in _thinned(points):
            if not all(isfinite(v) and abs(v) < LARGEST for v in point):
                segments.append([])
            elif not panel.log:
                segments[-1].append(point)
            elif min(point[1:]) > 0:
                segments[-1].append((point[0], *map(log10, point[1:])))
        segments = [segment for segment in segments if segment]
        return cls(curve, segments, len(points) <= _MOST_POINTS_WITH_DOTS and not panel.by_run)

    @property
    def line(self) -> list[Point]:
        return [point[:2] for segment in self.segments for point in segment]

    @property
    def band(self) -> list[Point]:
        return [(point[0], *point[2:]) for segment in self.segments for point in segment]

    def element(self, stroke: Stroke, matrix: str) -> str:
        curve, width = self.curve, 1.1 if self.curve.faint else 1.9
        parts = [
            f'<g class="curve{" faint" if curve.faint else ""}" style="{color(stroke)}" '
            f'data-algorithm="{escape(curve.algorithm)}" data-label="{escape(curve.label)}">'
        ]
        if curve.low:
            edges = (
                _path([(p[0], p[2]) for p in segment] + [(p[0], p[3]) for p in segment[::-1]])
                for segment in self.segments
            )
            parts.append(f'<path class="band" transform="{matrix}" d="{"Z".join(edges)}Z"/>')
        dash = " ".join(f"{length * width:.3g}" for length in stroke.dash)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        line = "".join(_path([point[:2] for point in segment]) for segment in self.segments)
        parts.append(f'<path class="line" transform="{matrix}"{dashes} d="{line}"/>')
        dots = self.line if self.dots else self.line[-1:]
        marks = "".join(f"M{x:.5g} {y:.5g}h0" for x, y in dots)
        parts.append(f'<path class="dots" transform="{matrix}" d="{marks}"/></g>')
        return "".join(parts)


def color(stroke: Stroke) -> str:
    """Return the style that gives an element a stroke's color, which the page's theme decides."""
    return f"--c: var(--color-{stroke.place})"


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return every n-th point and the last, few enough."""
    every = ceil(len(points) / MOST_POINTS)
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.6g} {y:.5g}" for x, y in points)


def _describe(panel: Panel) -> str:
    ends: dict[str, list[Point]] = {}
    for curve in panel.curves:
        name = curve.algorithm if panel.by_run else f"{curve.algorithm} {curve.label}".strip()
        ends.setdefault(name, []).append((curve.x[-1], curve.y[-1]))
    told = []
    for name, points in ends.items():
        x, y = (sum(values) / len(values) for values in zip(*points, strict=True))
        at = f"at {y:.3g}" if isfinite(y) else "without a value"
        told.append(f"{name} ends {at}" + (f" for {x:.3g} nats" if panel.by_run else ""))
    listed = ", ".join(told) if told else "not measured"
    return f"{panel.title} by {panel.x_label}, {panel.y_label}: {listed}."

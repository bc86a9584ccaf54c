"""The pictures of docs/algorithms: how hard an algorithm pushes, and where its runs ended.

Drawn of the library's own losses and rules, in float64, and of the committed rows of
experiments/objectives.py; colors and dashes are those of every other page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import escape

from proxstep.algorithms import Aggregation, Algorithm, SignalInputs
from proxstep.isopo import IsometricRule, NaturalRule, Rule
from proxstep.isopo.plan import Statistics
from proxstep.lab.strokes import Stroke, strokes
from proxstep.lab.svg import Limits, limits, ticks
from proxstep.typing import Tensor

ROWS = Path(__file__).parents[1] / "experiments" / "objectives" / "rows.json"
PANEL_WIDTH, HEIGHT = 370, 270
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 46, 44, 310, 182
INK, GRID, GRAY = "#33383f", "#e3e6ea", "#a9afb8"
DASHED = (3.6, 1.7)

OLD_PROBABILITY = 0.3
"""Of the one token whose push is drawn; only DPPO's masks depend on it."""
RATIO_N = torch.linspace(0.1, 3.0, 117, dtype=torch.float64)
LENGTH_N = torch.linspace(0.25, 3.0, 111, dtype=torch.float64)
Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A curve: its name in the legend, its points and how it is drawn."""

    name: str
    points: Points
    color: str
    dash: tuple[float, ...] = ()
    width: float = 2.0


class Dots(NamedTuple):
    """Runs: their name in the legend and where they ended."""

    name: str
    points: Points
    color: str
    size: float


class Panel(NamedTuple):
    """One of a picture's halves."""

    title: str
    x_label: str
    marks: Sequence[Line | Dots]


def objective_figure(algorithm: Algorithm) -> str:
    """Return the picture of an objective's page."""
    return _picture(algorithm.name, [push_panel(algorithm), *_runs_panel(algorithm.name)])


def rule_figure(name: str, rule: Rule) -> str | None:
    """Return the picture of a rule's page; None where there is nothing to draw."""
    panels = [*_factor_panel(name, rule), *_runs_panel(name)]
    return _picture(name, panels) if panels else None


def push_panel(algorithm: Algorithm) -> Panel:
    """Return the push on a completion of one token against its ratio to the old policy."""
    stroke = strokes([algorithm.name])[algorithm.name]
    up, down = pushes(algorithm)
    plain = [(ratio, 1.0) for ratio in RATIO_N.tolist()]
    marks = [
        Line("", plain, GRAY, width=1.0),
        Line("REINFORCE", [(ratio, -push) for ratio, push in plain], GRAY, width=1.0),
        Line("A = 1", up, stroke.color),
        Line("A = -1", down, stroke.color, DASHED),
    ]
    return Panel("push on log pi: -dL / d log pi", "ratio pi / pi_old of the token", marks)


def pushes(algorithm: Algorithm) -> tuple[Points, Points]:
    """Return -dL / d log pi by ratio, for the advantages 1 and -1 of a group of two."""
    inputs = SignalInputs(torch.tensor([1.0, -1.0]).double(), torch.tensor([0, 0]))
    signal = algorithm.signal(inputs, algorithm.defaults)
    options = algorithm.loss_options(algorithm.defaults) | signal.hyper
    old_BT = torch.full((len(RATIO_N), 1), OLD_PROBABILITY, dtype=torch.float64).log()
    counts = Aggregation(
        algorithm.default_loss_agg_mode, num_sequences=1, num_tokens=1, max_length=1
    )
    found = []
    for value in signal.value_B.tolist():
        log_prob_BT = (old_BT + RATIO_N.log()[:, None]).requires_grad_()
        mask_BT = torch.ones_like(old_BT, dtype=torch.bool)
        value_B = torch.full_like(RATIO_N, value)
        loss, _ = algorithm.loss(
            log_prob_BT, old_BT, value_B, mask_BT, **options, aggregation=counts
        )
        (gradient_BT,) = torch.autograd.grad(loss, log_prob_BT)
        found.append(list(zip(RATIO_N.tolist(), (-gradient_BT[:, 0]).tolist(), strict=True)))
    return found[0], found[1]


def factors(rule: IsometricRule | NaturalRule) -> dict[str, Points]:
    """Return what multiplies a sequence's gradient, by its length over an average one's."""
    ones_N = torch.ones_like(LENGTH_N)
    if isinstance(rule, NaturalRule):
        found = Statistics(ones_N, ntk_BB=LENGTH_N.diag())
        return {"along one direction of the kernel": _weighed(rule, found, ["eigenvalue"])}
    means = ["fisher_sq", "norm_sq", "relative_fisher_sq"]
    square_N = LENGTH_N.square()
    return {
        "F longer, |G| the same": _weighed(rule, Statistics(ones_N, square_N, ones_N), means),
        "F and |G| longer": _weighed(rule, Statistics(ones_N, square_N, square_N), means),
    }


def _weighed(rule: Any, found: Statistics, means: Sequence[str]) -> Points:
    one: Tensor = torch.ones((), dtype=torch.float64)
    weight_N, _, _ = rule.weigh(found, dict.fromkeys(means, one))
    return list(zip(LENGTH_N.tolist(), weight_N.tolist(), strict=True))


def _factor_panel(name: str, rule: Rule) -> list[Panel]:
    if not isinstance(rule, IsometricRule | NaturalRule):
        return []
    stroke: Stroke = strokes([name])[name]
    dashes = iter([(), DASHED])
    lines = [Line(k, points, stroke.color, next(dashes)) for k, points in factors(rule).items()]
    what = "eigenvalue" if isinstance(rule, NaturalRule) else "length"
    return [Panel("factor on the gradient", f"{what} / that of an average sequence", lines)]


def _runs_panel(name: str) -> list[Panel]:
    """Return where the runs of experiments/objectives.py ended; nothing where it has none."""
    rows = [row for row in json.loads(ROWS.read_text())["rows"] if row["row"] != "opo, sequence"]
    own = [row for row in rows if row["row"] == name]
    if not own:
        return []
    drawn = [
        Dots("all others", _ends([row for row in rows if row not in own]), GRAY, 3.2),
        Dots(name, _ends(own), strokes([name])[name].color, 7.0),
    ]
    return [Panel("greedy score after 30 steps", "KL(policy || initial), nats a token", drawn)]


def _ends(rows: Sequence[dict[str, Any]]) -> Points:
    return [(row["kl_policy_initial"], row["score"]) for row in rows]


def _picture(name: str, panels: Sequence[Panel]) -> str:
    """Return panels side by side as an SVG file."""
    width = PANEL_WIDTH * len(panels)
    told = escape(f"{name}: " + "; ".join(f"{p.title} by {p.x_label}" for p in panels))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" '
        f'height="{HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="11.5" '
        f'fill="{INK}"><title>{told}</title><rect width="{width}" height="{HEIGHT}" fill="#fff"/>'
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({place * PANEL_WIDTH} 0)">{_drawn(panel)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(panel: Panel) -> str:
    points = [point for mark in panel.marks for point in mark.points]
    x, y = limits([p[0] for p in points], pad=0.02), limits([p[1] for p in points])
    parts = [f'<text x="4" y="14" font-weight="bold">{escape(panel.title)}</text>']
    for tick in ticks(y):
        _, at = _place(x, y, (x.low, tick))
        parts.append(f'<path d="M{LEFT} {at:.1f}h{PLOT_WIDTH}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(x):
        at, _ = _place(x, y, (tick, y.low))
        parts.append(
            f'<text x="{at:.1f}" y="{TOP + PLOT_HEIGHT + 16}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{LEFT + PLOT_WIDTH}" y="{HEIGHT - 8}" text-anchor="end">'
        f"{escape(panel.x_label)}</text>"
    )
    parts += [_mark(x, y, mark) for mark in panel.marks]
    return "\n".join([*parts, *_legend(panel.marks)])


def _mark(x: Limits, y: Limits, mark: Line | Dots) -> str:
    places = [f"{across:.1f} {down:.1f}" for across, down in (_place(x, y, p) for p in mark.points)]
    if isinstance(mark, Dots):
        dots = "".join(f"M{place}h0" for place in places)
        look = f'stroke-width="{mark.size}" stroke-linecap="round"'
        return f'<path d="{dots}" stroke="{mark.color}" {look}/>'
    return f'<path d="M{"L".join(places)}" fill="none" {_look(mark)}/>'


def _look(line: Line) -> str:
    dash = " ".join(f"{part * line.width:.3g}" for part in line.dash)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{line.color}" stroke-width="{line.width}"{dashes}'


def _place(x: Limits, y: Limits, point: tuple[float, float]) -> tuple[float, float]:
    return (
        LEFT + PLOT_WIDTH * (point[0] - x.low) / (x.high - x.low),
        TOP + PLOT_HEIGHT * (y.high - point[1]) / (y.high - y.low),
    )


def _legend(marks: Sequence[Line | Dots]) -> list[str]:
    """Return a row of samples and names between the title and the plot."""
    parts, at = [], LEFT
    for mark in marks:
        if not mark.name:
            continue
        if isinstance(mark, Dots):
            look = f'stroke="{mark.color}" stroke-width="{mark.size}" stroke-linecap="round"'
            parts.append(f'<path d="M{at + 10} 30h0" {look}/>')
        else:
            parts.append(f'<path d="M{at} 30h20" {_look(mark)}/>')
        parts.append(f'<text x="{at + 25}" y="34">{escape(mark.name)}</text>')
        at += 40 + round(6.2 * len(mark.name))
    return parts

"""What the figures of a comparison show: quantities by step, by KL and by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan

from proxstep.lab.comparison import Comparison
from proxstep.runs.reading import (
    Run,
    Spread,
    by_algorithm,
    entropy_field,
    load_diagnostics,
    seed_spread,
)

MOST_CURVES = 8
"""Algorithms in one figure."""
LARGEST = 1e30
"""What is larger is a gap: browsers keep coordinates in single precision, and matplotlib's axes end
before 1e308."""

_LOG_SCALE_ABOVE_RATIO = 30.0


@dataclass(frozen=True)
class Chart:
    """One field of `metrics.jsonl`, to be drawn by step.

    Attributes:
        field: The field.
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

_ESCORT = (
    Chart(
        "objective/effective_sample_size",
        "Effective sample size",
        "sequences",
        "Of a group's completions, how many the escort weights leave in effect; near 1, one "
        "completion decides the step.",
        from_zero=True,
    ),
    Chart(
        "objective/weight_max",
        "Largest escort weight",
        "omega",
        "The largest weight of the step, where 1 is a completion that counts as in REINFORCE.",
        from_zero=True,
        may_be_log=True,
    ),
    Chart(
        "objective/frac_negative_target",
        "Impossible targets",
        "share",
        "Share of the completions whose target is less than probability 0; raise mu where it is "
        "not small.",
        from_zero=True,
    ),
)

_GEOMETRY = (
    Chart(
        "geometry/weight_spread",
        "Weight spread",
        "std / mean",
        "How unevenly the rule weighs the sequences, mean over layers; 0 is REINFORCE up to a "
        "factor.",
        from_zero=True,
    ),
    Chart(
        "geometry/cosine_to_reinforce",
        "Cosine to REINFORCE",
        "cosine",
        "Between the transformed gradient and REINFORCE's, all layers together; 1 is its "
        "direction.",
    ),
    Chart(
        "geometry/ntk_off_diagonal",
        "Interaction",
        "share",
        "Share of the sequences' kernel off its diagonal, mean over layers; near 0 they do not "
        "interact.",
        from_zero=True,
    ),
)

_LAYERS = (
    Chart(
        "grad_share",
        "Gradient share by layer",
        "share",
        "Share of the transformed gradient's squared norm in each parameter: where the update "
        "happens.",
        from_zero=True,
    ),
    Chart(
        "weight_spread",
        "Weight spread by layer",
        "std / mean",
        "How unevenly the rule weighs the sequences in each parameter.",
        from_zero=True,
    ),
    Chart(
        "cosine_to_reinforce",
        "Cosine by layer",
        "cosine",
        "How far the rule turns the gradient within each parameter away from REINFORCE's; 1 is not "
        "at all.",
    ),
)

_SCALE = Chart(
    "kl_budget/scale",
    "Scale of a step",
    "share",
    "The share of the optimizer's step that was taken; below 1 the KL budget held it back, and "
    "near 0 all along the learning rate is far too large.",
    from_zero=True,
)


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        algorithm: Whose it is, which gives its color.
        x: Where it was measured.
        y: The values there; what is not finite is a gap.
        low: Lower edge of its band; empty without one.
        high: Upper edge of its band.
        label: What tells it from others of its algorithm in the panel.
        faint: Whether it stands back behind those.
    """

    algorithm: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label: str = ""
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One figure.

    Attributes:
        title: Its title.
        x_label: What is on the horizontal axis.
        y_label: The unit of the vertical axis.
        teaching: What it is, and what to look for.
        curves: What is drawn; empty where nothing was measured.
        from_zero: Whether zero is on the vertical axis.
        log: Whether the vertical axis is logarithmic.
        x_names: Names of the places 0, 1, ... of the horizontal axis, where they have any.
        by_run: Whether a curve is a run, which shares its x with no other.
    """

    title: str
    x_label: str
    y_label: str
    teaching: str
    curves: list[Curve]
    from_zero: bool = False
    log: bool = False
    x_names: tuple[str, ...] = ()
    by_run: bool = False


@dataclass(frozen=True)
class PanelGroup:
    """Panels under one heading."""

    title: str
    panels: list[Panel]


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of every run, with the entropy that all runs measured alike if they did.

    A step's entropy is of the sequences that its update takes: hardly comparable, since some
    algorithms leave out groups of equal rewards.
    """
    return [
        replace(chart, field=entropy_field(runs)) if chart.field == "entropy" else chart
        for chart in CHARTS
    ]


def panel_groups(comparison: Comparison) -> list[PanelGroup]:
    """Return what the page draws; of what was not measured, the six charts of every run alone."""
    runs = drawn_runs(comparison)
    groups = [
        PanelGroup(
            "Curves", [*_frontier(comparison), *(step_panel(runs, c) for c in charts_of(runs))]
        ),
        PanelGroup("Per-layer geometry", [*_layer_panels(runs), *_measured(runs, _GEOMETRY)]),
        PanelGroup("Escort weights", _measured(runs, _ESCORT)),
        PanelGroup("KL budget", [*_budget_panels(runs), *_measured(runs, [_SCALE])]),
    ]
    return [group for group in groups if group.panels]


def drawn_runs(comparison: Comparison) -> list[Run]:
    """Return the runs of all algorithms, or of those with the highest final scores if many."""
    names = list(comparison.chosen)
    if len(names) > MOST_CURVES:
        finals = {row.algorithm: row.final.value for row in comparison.settings[0].standings}
        ranked = sorted(names, key=lambda name: -inf if isnan(finals[name]) else finals[name])
        names = ranked[-MOST_CURVES:]
    return [run for run in comparison.runs if run.algorithm in names]


def band_note(runs: Sequence[Run]) -> str:
    """Return what line and band stand for."""
    if all(len(members) == 1 for members in by_algorithm(runs).values()):
        return "one seed each, so no band"
    return "line: mean over seeds; band: min to max"


def step_panel(runs: Sequence[Run], chart: Chart) -> Panel:
    """Return a field by step: the mean over seeds, and the range where there are several."""
    curves = []
    for algorithm, members in by_algorithm(runs).items():
        spreads = seed_spread(members, chart.field)
        if spreads:
            curves.append(_with_band(algorithm, spreads, len(members) > 1))
    return _panel(chart, "step", curves)


def _with_band(algorithm: str, spreads: dict[int, Spread], band: bool) -> Curve:
    return Curve(
        algorithm,
        list(spreads),
        [spread.mean for spread in spreads.values()],
        [spread.low for spread in spreads.values()] if band else (),
        [spread.high for spread in spreads.values()] if band else (),
    )


def _panel(chart: Chart, x_label: str, curves: list[Curve], x_names: Iterable[str] = ()) -> Panel:
    values = [v for c in curves for v in (*c.y, *c.low, *c.high) if isfinite(v)]
    log = chart.may_be_log and bool(values)
    log = log and 0 < _LOG_SCALE_ABOVE_RATIO * min(values) < max(values)
    unit = f"{chart.unit} (log scale)" if log else chart.unit
    return Panel(
        chart.title, x_label, unit, chart.teaching, curves, chart.from_zero, log, tuple(x_names)
    )


def _measured(runs: Sequence[Run], charts: Sequence[Chart]) -> list[Panel]:
    return [panel for chart in charts if (panel := step_panel(runs, chart)).curves]


def _frontier(comparison: Comparison) -> list[Panel]:
    """Return the score against the KL spent, each run a line; nothing where it was not measured."""
    drawn = {id(run) for run in drawn_runs(comparison)}
    curves = [
        Curve(outcome.run.algorithm, outcome.kl, outcome.scores, label=f"seed {outcome.run.seed}")
        for chosen in comparison.chosen.values()
        for outcome in chosen.outcomes
        if id(outcome.run) in drawn and len(outcome.kl) > 1
    ]
    panel = Panel(
        "Score against KL",
        "KL(policy ‖ initial), nats per token",
        "greedy score",
        "Greedy score against the divergence from the initial policy that it was bought with, at "
        "every evaluation, each run a line with a dot at its end; further up and to the left is "
        "better, so look at which color lies above the others at one KL.",
        curves,
        by_run=True,
    )
    return [panel] if curves else []


def _layer_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the last diagnosed step by parameter, the mean over the seeds that have one."""
    last = {id(run): rows[-1] for run in runs if (rows := load_diagnostics(run))}
    layers = {
        key: {layer["name"]: layer for layer in row.get("layers", [])} for key, row in last.items()
    }
    names = list(dict.fromkeys(name for found in layers.values() for name in found))
    panels = []
    for chart in _LAYERS:
        curves = []
        for algorithm, members in by_algorithm(run for run in runs if id(run) in last).items():
            spreads = {}
            for place, name in enumerate(names):
                values = [layers[id(run)].get(name, {}).get(chart.field) for run in members]
                known = [float(value) for value in values if value is not None]
                if known:
                    spreads[place] = Spread.of(known)
            if spreads:
                curves.append(_with_band(algorithm, spreads, len(members) > 1))
        if curves:
            panels.append(_panel(chart, "parameter", curves, names))
    return panels


def _budget_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return what was predicted of the steps that were taken and what they did, by algorithm."""
    panels = []
    for algorithm, members in by_algorithm(runs).items():
        proposed = seed_spread(members, "kl_budget/predicted")
        scale, realized = (seed_spread(members, f"kl_budget/{n}") for n in ("scale", "realized"))
        steps = [step for step in proposed if step in scale]
        if not steps:
            continue
        taken = [proposed[step].mean * scale[step].mean ** 2 for step in steps]
        curves = [Curve(algorithm, steps, taken, label="predicted", faint=True)]
        if realized:
            means = [spread.mean for spread in realized.values()]
            curves.append(Curve(algorithm, list(realized), means, label="realized"))
        chart = Chart(
            "",
            f"KL of a step of {algorithm}",
            f"nats per {members[0].recipe.get('update', {}).get('kl_budget_per', 'sequence')}",
            "Thin: what was predicted of the step as it was taken, predicted times scale squared. "
            "Thick, where update.kl_control measures it: what the step did, or, with corrected, "
            "the step before. Look for the two at one height.",
            from_zero=True,
            may_be_log=True,
        )
        panels.append(_panel(chart, "step", curves))
    return panels

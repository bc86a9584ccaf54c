"""What a comparison shows: statistics by algorithm, a table for the terminal, a page to share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from proxstep.config.yamlfile import dump_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.audit import audit
from proxstep.lab.comparison import Comparison, compare_runs
from proxstep.lab.plots import CHARTS, Track, band_note, curve_svg, frontier_svg, strokes
from proxstep.lab.tables import text_tables
from proxstep.lab.verdict import verdict
from proxstep.runs.reading import (
    MISSING,
    Run,
    Spread,
    by_algorithm,
    fairness_notes,
    load_samples,
)

_TEMPLATE = "report.html.jinja"
_LAST_STEPS = 5
_MOST_CURVES = 8
_NUM_SAMPLES = 3


@dataclass(frozen=True)
class AlgorithmSummary:
    """Statistics of one algorithm, each over its runs; None where no run measured it.

    Attributes:
        algorithm: The algorithm's name.
        num_seeds: Number of distinct seeds.
        start_score: Greedy score before training (step 0).
        final_score: Greedy score at the last evaluation after step 0.
        gain: Final minus start score, run by run.
        kl_policy_initial: Last KL(policy || initial), in nats per token.
        kl_initial_policy: Last KL(initial || policy), in nats per token.
        entropy: Last entropy, in nats per token.
        reward: Mean over the last 5 steps that measured it.
        grad_norm: Mean over the last 5 steps that measured it.
        grad_response_efficiency: Mean over the last 5 steps that measured it.
        seconds_per_step: Median over the training steps.
    """

    algorithm: str
    num_seeds: int
    start_score: Spread | None
    final_score: Spread | None
    gain: Spread | None
    kl_policy_initial: Spread | None
    kl_initial_policy: Spread | None
    entropy: Spread | None
    reward: Spread | None
    grad_norm: Spread | None
    grad_response_efficiency: Spread | None
    seconds_per_step: Spread | None


def summarize(runs: Iterable[Run]) -> list[AlgorithmSummary]:
    """Return the statistics of each algorithm, in order of first appearance."""
    return [_summarize(algorithm, members) for algorithm, members in by_algorithm(runs).items()]


def comparison_table(summaries: Sequence[AlgorithmSummary]) -> Table:
    """Return the comparison as a table for a terminal of 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    table.caption = Text(
        "Means over seeds, gain with [min, max]; KL and entropy in nats per token."
    )
    columns = [column for column in _COLUMNS if column.in_terminal]
    for column in columns:
        table.add_column(
            Text(column.header),
            justify="left" if column is columns[0] else "right",
            overflow="fold",
            vertical="bottom",
        )
    for summary in summaries:
        table.add_row(*(Text(column.cell(summary)) for column in columns))
    return table


def write_report(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the comparison as one self-contained HTML page, replacing an earlier one at once.

    Raises:
        ProxstepError: There are no runs, or the path is a folder.
    """
    path = Path(path)
    if not runs:
        raise ProxstepError(f"{path}: no runs to report; train some first.")
    if path.is_dir():
        raise ProxstepError(f"{path}: is a folder; name the page, such as {path / 'report.html'}.")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(_page_content(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(page.encode("utf-8", "replace"))  # a completion may hold lone surrogates
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _summarize(algorithm: str, runs: Sequence[Run]) -> AlgorithmSummary:
    def over_runs(statistic: Callable[[Run], float | None]) -> Spread | None:
        values = [value for run in runs if (value := statistic(run)) is not None]
        return Spread.of(values) if values else None

    def last(name: str, num_steps: int = 1) -> Spread | None:
        return over_runs(lambda run: _mean(_trained(run, name)[-num_steps:]))

    return AlgorithmSummary(
        algorithm=algorithm,
        num_seeds=len({run.seed for run in runs}),
        start_score=over_runs(_start_score),
        final_score=last("score"),
        gain=over_runs(_gain),
        kl_policy_initial=last("kl_policy_initial"),
        kl_initial_policy=last("kl_initial_policy"),
        entropy=last("entropy"),
        reward=last("reward", _LAST_STEPS),
        grad_norm=last("grad_norm", _LAST_STEPS),
        grad_response_efficiency=last("grad_response_efficiency", _LAST_STEPS),
        seconds_per_step=over_runs(_seconds_per_step),
    )


def _trained(run: Run, name: str) -> list[float]:
    """Return a field's values after step 0."""
    return [value for step, value in zip(*run.series(name), strict=True) if step > 0]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _start_score(run: Run) -> float | None:
    return dict(zip(*run.series("score"), strict=True)).get(0)


def _gain(run: Run) -> float | None:
    start, scores = _start_score(run), _trained(run, "score")
    return scores[-1] - start if scores and start is not None else None


def _seconds_per_step(run: Run) -> float | None:
    seconds = _trained(run, "seconds_step")
    return median(seconds) if seconds else None


def _number(spread: Spread | None) -> str:
    """Return the mean to three significant digits.

    >>> [_number(Spread.of([value])) for value in (0.5, 123.4, 1234.0)]
    ['0.500', '123', '1.23e+03']
    """
    return f"{spread.mean:#.3g}".rstrip(".") if spread else MISSING


def _score(spread: Spread | None) -> str:
    return f"{spread.mean:.3f}" if spread else MISSING


def _signed_range(spread: Spread | None, num_seeds: int) -> str:
    if spread is None:
        return MISSING
    seeds = f" [{spread.low:.3f}, {spread.high:.3f}]" if num_seeds > 1 else ""
    return f"{spread.mean:+.3f}{seeds}"


@dataclass(frozen=True)
class _Column:
    """One column of the table: its header, what the page says of it, and its cell."""

    header: str
    meaning: str
    cell: Callable[[AlgorithmSummary], str]
    in_terminal: bool = True


_COLUMNS = (
    _Column("algorithm", "As named in the recipe.", lambda s: s.algorithm),
    _Column("seeds", "Number of distinct seeds.", lambda s: str(s.num_seeds)),
    _Column("start", "Greedy validation score before training.", lambda s: _score(s.start_score)),
    _Column("final", "Greedy score at the last evaluation.", lambda s: _score(s.final_score)),
    _Column(
        "gain",
        "Final minus start score: mean over seeds, [min, max].",
        lambda s: _signed_range(s.gain, s.num_seeds),
    ),
    _Column(
        "reward",
        "Mean reward of the sampled completions over the last 5 steps.",
        lambda s: _score(s.reward),
        in_terminal=False,
    ),
    _Column(
        "KL(policy\n‖ initial)",
        "Drift on the policy's own samples at the last measurement, in nats per token.",
        lambda s: _number(s.kl_policy_initial),
    ),
    _Column(
        "KL(initial\n‖ policy)",
        "Drift on the initial policy's samples at the last measurement, in nats per token.",
        lambda s: _number(s.kl_initial_policy),
    ),
    _Column(
        "entropy",
        "Policy entropy at the last measurement, in nats per token.",
        lambda s: _number(s.entropy),
    ),
    _Column(
        "grad\nnorm",
        "Gradient norm before clipping, mean over the last 5 steps.",
        lambda s: _number(s.grad_norm),
    ),
    _Column(
        "gradient\nresponse",
        "Gradient norm per unit of advantage signal: grad norm over half the advantage range, "
        "mean over the last 5 steps.",
        lambda s: _number(s.grad_response_efficiency),
        in_terminal=False,
    ),
    _Column(
        "s/step",
        "Seconds per training step, median over steps.",
        lambda s: _number(s.seconds_per_step),
    ),
)


def _page_content(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that the template shows, as text except for the charts."""
    everyone, comparison = runs, compare_runs(runs)
    runs = comparison.runs
    groups = by_algorithm(runs)
    drawn = _drawn(comparison)
    curves = [run for name, members in groups.items() if name in drawn for run in members]
    return {
        "verdict": verdict(comparison),
        "tables": text_tables(comparison),
        "everyone": everyone,
        "algorithms": list(groups),
        "facts": _facts(runs),
        "columns": _COLUMNS,
        "summaries": summarize(runs),
        "colors": {name: stroke.color for name, stroke in strokes(groups).items()},
        "charts": [(chart, Markup(curve_svg(curves, chart))) for chart in CHARTS],
        "frontier": _frontier(comparison, drawn),
        "drawn": drawn,
        "band_note": band_note(runs),
        "notes": fairness_notes(runs, comparison.varied),
        "audit": audit(runs),
        "samples": {name: _last_samples(members) for name, members in groups.items()},
        "recipes": {name: dump_yaml(members[0].recipe) for name, members in groups.items()},
        "runs": runs,
        "missing": MISSING,
    }


def _drawn(comparison: Comparison) -> list[str]:
    """Return the algorithms that are drawn: all, or those with the highest final scores."""
    names = list(comparison.chosen)
    if len(names) <= _MOST_CURVES:
        return names
    finals = {row.algorithm: row.final.value for row in comparison.settings[0].standings}
    best = sorted(names, key=lambda name: -inf if isnan(finals[name]) else finals[name])
    return [name for name in names if name in best[-_MOST_CURVES:]]


def _frontier(comparison: Comparison, drawn: Sequence[str]) -> Markup | None:
    """Return the panel of score against KL, None where the KL was not measured."""
    outcomes = [o for name in drawn for o in comparison.chosen[name].outcomes if len(o.kl) > 1]
    tracks: dict[str, list[Track]] = {}
    for outcome in outcomes:
        tracks.setdefault(outcome.run.algorithm, []).append((outcome.kl, outcome.scores))
    return Markup(frontier_svg([o.run for o in outcomes], tracks)) if tracks else None


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """Return what the page says of all runs at once, distinct values side by side."""
    return {
        "model": _distinct(_nested(run.recipe, "model", "name") for run in runs),
        "task": _distinct(_nested(run.recipe, "task", "name") for run in runs),
        "steps": _distinct(run.recipe.get("steps") for run in runs),
        "num_parameters": _distinct(_with_commas(run.info.get("num_parameters")) for run in runs),
        "machine": _distinct(run.info.get("machine") for run in runs),
        "started": _distinct(_day(run.info.get("started")) for run in runs),
    }


def _nested(tree: dict[str, Any], section: str, key: str) -> Any:
    inner = tree.get(section)
    return inner.get(key) if isinstance(inner, dict) else inner


def _with_commas(number: Any) -> str | None:
    return f"{number:,}" if isinstance(number, int) else None


def _day(moment: Any) -> str | None:
    """Return the date of an ISO moment."""
    return moment[:10] if isinstance(moment, str) else None


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(MISSING if value is None else str(value) for value in values))


def _last_samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the last samples of the first run that has any."""
    for run in runs:
        samples = load_samples(run)[-_NUM_SAMPLES:]
        if samples:
            return [{"seed": run.seed, **sample} for sample in samples]
    return []

"""What a toy leaves behind: figure, curves, summary, and a table for the terminal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from proxstep.lab import bandit, saturation
from proxstep.lab.bandit import METHODS, Trace, kl_per_gain, quartiles, reward_at_kl
from proxstep.lab.plots import STYLE
from proxstep.lab.toy_plots import bandit_figure, saturation_figure

SHOWN_PROBS = (0.1, 0.5, 0.9, 0.99, 0.999)
LOGITS = tuple(i / 20 for i in range(-120, 186))
"""From p = 0.0025 to p = 0.9999."""
KL_LEVEL = 0.5
"""Where rewards are compared at equal KL(pi || pi_0), in nats."""


def report_saturation(folder: Path, console: Console) -> None:
    """Run the saturation toy: saturation.{png,svg,csv,json} in the folder and a table."""
    curves = saturation.make_curves()
    edges = [edge + gap for edge in saturation.clip_edges() for gap in (-1e-9, 1e-9)]
    columns = saturation.trace(curves, sorted({*LOGITS, *edges}))
    summary = {
        curve.name: {
            "settings": curve.settings,
            "derivative": f"|dL/d{curve.coordinate}|",
            "rate": saturation.rate(curve),
            **{f"p={p:g}": curve.magnitude(math.log(p / (1 - p))) for p in SHOWN_PROBS},
        }
        for curve in curves
    }
    _save(saturation_figure(curves, columns), folder / "saturation")
    rows = zip(*columns.values(), strict=True)
    _write_csv(folder / "saturation.csv", list(columns), rows)
    settings = {"advantage": saturation.ADVANTAGE, "anchor_prob": saturation.ANCHOR_PROB}
    _write_json(folder / "saturation.json", {"settings": settings, "summary": summary})
    console.print(saturation_table(summary))


def saturation_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the magnitudes at a few confidences as a table for a terminal of 100 columns."""
    table = _table(
        "Advantage 1, old and reference policy at p = 0.5. Rate: d log|gradient| / dz from z = 8 "
        "to 9; -1 falls like 1 - p.",
        ["curve", "", "settings", *(f"p={p:g}" for p in SHOWN_PROBS), "rate"],
        num_left=3,
    )
    for name, row in summary.items():
        numbers = [f"{row[f'p={p:g}']:.2g}" for p in SHOWN_PROBS]
        rate = "-" if row["rate"] is None else f"{round(row['rate'], 2) + 0.0:.2f}"
        table.add_row(*map(Text, (name, row["derivative"], row["settings"], *numbers, rate)))
    return table


def report_bandit(folder: Path, console: Console, *, num_seeds: int, steps: int) -> None:
    """Run the bandit toy: bandit.{png,svg,csv,json} in the folder and a table.

    Args:
        folder: Where the files go.
        console: Where the table goes.
        num_seeds: Seeds 0 to num_seeds - 1; each is another instance.
        steps: Updates of each method.
    """
    traces = run_bandit(num_seeds, steps, console)
    summary = summarize_bandit(traces)
    _save(bandit_figure(traces), folder / "bandit")
    _write_csv(folder / "bandit.csv", _BANDIT_FIELDS, _bandit_rows(traces))
    settings = {
        "num_seeds": num_seeds,
        "steps": steps,
        "num_outcomes": bandit.NUM_OUTCOMES,
        "num_features": bandit.NUM_FEATURES,
        "batch_size": bandit.BATCH_SIZE,
        "updates_per_rollout": bandit.UPDATES_PER_ROLLOUT,
        "kl_per_update": bandit.KL_PER_UPDATE,
        "kl_level": KL_LEVEL,
    }
    _write_json(folder / "bandit.json", {"settings": settings, "summary": summary})
    console.print(bandit_table(summary, num_seeds, steps))


def run_bandit(num_seeds: int, steps: int, console: Console) -> dict[str, list[Trace]]:
    """Return every method's traces, one per seed."""
    traces: dict[str, list[Trace]] = {name: [] for name in METHODS}
    seeds = track(
        range(num_seeds),
        "instances",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for seed in seeds:
        instance = bandit.make_bandit(seed)
        for name, method in METHODS.items():
            trace = bandit.run_method(instance, method, seed=seed, steps=steps)
            traces[name].append(trace)
    return traces


def summarize_bandit(traces: Mapping[str, Sequence[Trace]]) -> dict[str, dict[str, Any]]:
    """Return each method's quartiles over seeds: at the end, and for cosines over all updates.

    Quartiles are lists of three, None where no seed has a value (nothing was gained, or no update
    had a direction). `frac_no_update` is the share of all updates that moved nothing, and
    `frac_reached_level` that of the seeds whose KL(pi || pi_0) ever reached the level.
    """
    summary = {}
    for name, of_seeds in traces.items():
        values: dict[str, list[float | None]] = {
            "reward_at_level": [reward_at_kl(trace, KL_LEVEL) for trace in of_seeds],
            "reward": [trace.reward[-1] for trace in of_seeds],
            "gain": [trace.reward[-1] - trace.reward[0] for trace in of_seeds],
            "kl_policy_initial": [trace.kl_policy_initial[-1] for trace in of_seeds],
            "kl_initial_policy": [trace.kl_initial_policy[-1] for trace in of_seeds],
            "chi_square": [trace.chi_square[-1] for trace in of_seeds],
            "kl_per_gain": [kl_per_gain(trace)[-1] for trace in of_seeds],
            "distance_fisher": [_mean_distance(trace.cosine_fisher) for trace in of_seeds],
            "distance_euclidean": [_mean_distance(trace.cosine_euclidean) for trace in of_seeds],
        }
        spent = [kl for trace in of_seeds for kl in trace.kl_spent]
        summary[name] = {field: quartiles(of_field) for field, of_field in values.items()}
        reached = [reward is not None for reward in values["reward_at_level"]]
        summary[name]["frac_reached_level"] = sum(reached) / len(reached)
        summary[name]["frac_no_update"] = sum(kl == 0 for kl in spent) / len(spent)
    return summary


def bandit_table(summary: Mapping[str, Mapping[str, Any]], num_seeds: int, steps: int) -> Table:
    """Return the summary as a table for a terminal of 100 columns."""
    kl = bandit.KL_PER_UPDATE
    table = _table(
        f"Medians over {num_seeds} instances after {steps} updates of KL {kl:g} nats each; "
        f"reward at {KL_LEVEL:g}: when KL(π‖π₀) first reached {KL_LEVEL:g} nats. 1 - cos: to the "
        "exact natural gradient, mean over updates.",
        ["method", *(heading for heading, _ in BANDIT_COLUMNS.values()), "no update"],
        num_left=1,
    )
    for name, row in summary.items():
        cells = [name]
        for field, (_, form) in BANDIT_COLUMNS.items():
            cells.append("-" if row[field] is None else format(row[field][1], form))
        table.add_row(*map(Text, (*cells, f"{row['frac_no_update']:.0%}")))
    return table


BANDIT_COLUMNS = {
    "reward_at_level": (f"reward\nat {KL_LEVEL:g}", ".3f"),
    "reward": ("reward\nat end", ".3f"),
    "kl_policy_initial": ("KL(π‖π₀)", ".3f"),
    "kl_initial_policy": ("KL(π₀‖π)", ".3f"),
    "kl_per_gain": ("KL per\nreward", ".2f"),
    "distance_fisher": ("1 - cos\nFisher", ".3f"),
    "distance_euclidean": ("1 - cos\nEuclidean", ".3f"),
}
_BANDIT_FIELDS = ["method", "seed", "step", *(name for name in vars(Trace()))]


def _bandit_rows(traces: Mapping[str, Sequence[Trace]]) -> Iterable[list[Any]]:
    """Yield one row per method, seed and step; step 0 is before the first update."""
    for name, of_seeds in traces.items():
        for seed, trace in enumerate(of_seeds):
            columns = [
                [None] * (len(trace.reward) - len(column)) + column
                for column in vars(trace).values()
            ]
            for step, values in enumerate(zip(*columns, strict=True)):
                yield [name, seed, step, *values]


def _mean_distance(cosines: Sequence[float | None]) -> float | None:
    given = [1 - cosine for cosine in cosines if cosine is not None]
    return sum(given) / len(given) if given else None


def _table(caption: str, headings: Sequence[str], *, num_left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = Text(caption), "left"
    for i, heading in enumerate(headings):
        justify = "left" if i < num_left else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold", vertical="bottom")
    return table


def _save(figure: Figure, stem: Path) -> None:
    with mpl.rc_context({**STYLE, "svg.hashsalt": stem.name}):
        figure.savefig(stem.with_suffix(".png"), dpi=105)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_short(value) for value in row] for row in rows)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(_shortened(content), indent=1) + "\n", encoding="utf-8")


def _short(value: Any) -> Any:
    """Return a float to six digits, anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _shortened(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _shortened(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_shortened(value) for value in content]
    return _short(content)

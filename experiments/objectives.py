"""Every objective on the arithmetic task: score, drift, entropy, gradients; five seeds each.

    python experiments/objectives.py                # 25 minutes on two cores
    python experiments/objectives.py --table        # the table again, from the rows

One recipe for all (recipes/arithmetic.yaml with four updates per rollout, so that ratios leave 1),
the same learning rate, prompts and seeds. OPO runs with every drive and every anchor correction.
DAPO has its four mechanisms. The script writes rows.json, one object per run and seed, and prints
the mean over seeds with a bootstrapped 95 % interval.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from proxstep.config.loading import load_recipe
from proxstep.config.objectives import OpoSection
from proxstep.lab.compare import Job, run_jobs
from proxstep.runs.folder import describe_machine
from proxstep.runs.reading import Run, load_run

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
ROWS = Path(__file__).with_suffix("") / "rows.json"
SHARED = {
    "steps": "30",
    "rollout.num_prompts": "16",
    "update.num_minibatches": "2",
    "update.num_iterations": "2",
    "evaluation.every": "6",
}
DAPO = {
    "rollout.dynamic_sampling_max_batches": "4",
    "rollout.mask_truncated_completions": "true",
    "rollout.overlong_buffer": "1",
}
DRIVES = ("center", "zscore", "none")
CORRECTIONS = ("absorbed", "length", "sequence")
DEFAULT = OpoSection(name="opo")


def name_of(drive: str, correction: str) -> str:
    """Return the row of an OPO variant."""
    default = (drive, correction) == (DEFAULT.drive, DEFAULT.anchor_correction)
    return "opo" if default else f"opo, {drive}, {correction}"


VARIANTS: dict[str, dict[str, str]] = {
    **{name: {"algorithm": name} for name in ("reinforce", "grpo", "gspo")},
    "dapo": {"algorithm": "dapo", **DAPO},
    **{name: {"algorithm": name} for name in ("cispo", "dro")},
    **{
        name_of(drive, correction): {
            "algorithm": "opo",
            "objective.drive": drive,
            "objective.anchor_correction": correction,
        }
        for drive, correction in itertools.product(DRIVES, CORRECTIONS)
    },
}

FIGURES = {
    "score": "score",
    "KL(policy ‖ initial)": "kl_policy_initial",
    "entropy": "entropy",
    "grad norm": "grad_norm",
    "response efficiency": "grad_response_efficiency",
    "ESS": "objective/effective_sample_size",
}
"""Columns: the last measured value, or the mean of the last ten steps where each step has one."""
LATEST = ("score", "kl_policy_initial")


def figures_of(run: Run) -> dict[str, float | None]:
    """Return a finished run's figures, with the score that it began with."""
    found: dict[str, float | None] = {"start": run.series("score")[1][0]}
    for name in FIGURES.values():
        values = run.series(name)[1]
        found[name] = None
        if values:
            found[name] = values[-1] if name in LATEST else statistics.mean(values[-10:])
    return found


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of a mean."""
    value_N = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn_RN = torch.randint(len(values), (10_000, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = value_N[drawn_RN].mean(1).quantile(ends).tolist()
    return low, high


def measure(seeds: int, parallel: int, output: Path, console: Console) -> list[dict[str, Any]]:
    """Run everything; return one row per run."""
    planned = [(seed, name) for seed in range(seeds) for name in VARIANTS]
    jobs = []
    for seed, name in planned:
        folder = output / f"{name.replace(', ', '-')}-seed{seed}"
        keys = {**SHARED, **VARIANTS[name], "seed": str(seed), "output_dir": str(folder)}
        jobs.append(Job(load_recipe(RECIPE, list(keys.items()))))
    run_jobs(jobs, parallel, console)
    return [
        {"row": name, "seed": seed, **figures_of(load_run(job.folder))}
        for (seed, name), job in zip(planned, jobs, strict=True)
    ]


def markdown_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows' means with their intervals as a table in Markdown."""
    headings = ["", "worst seed", *FIGURES]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        cells = [name, f"{min(row['score'] for row in own):.3f}"]
        for key in FIGURES.values():
            values = [row[key] for row in own if row[key] is not None]
            if not values:
                cells.append("")
                continue
            low, high = interval(values)
            cells.append(f"{statistics.mean(values):.3f} [{low:.3f}, {high:.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Every objective on the arithmetic task.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the committed rows only")
    arguments, console = parser.parse_args(), Console(width=170)
    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(arguments.seeds, arguments.parallel, Path(folder), console)
        ROWS.parent.mkdir(exist_ok=True)
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(torch.device("cpu")),
            "recipe": RECIPE.name,
            "shared": SHARED,
            "variants": VARIANTS,
            "rows": rows,
        }
        ROWS.write_text(json.dumps(report, indent=1) + "\n")
    rows = json.loads(ROWS.read_text())["rows"]
    console.print(f"score before training: {rows[0]['start']:.3f}")
    console.out(markdown_of(rows), highlight=False)


if __name__ == "__main__":
    main()

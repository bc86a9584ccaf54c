"""Every algorithm on the arithmetic task: score, drift, entropy, gradients; five seeds each.

    python experiments/objectives.py                # about 50 minutes on two cores
    python experiments/objectives.py --table        # the table again, from the rows

One recipe for all (recipes/arithmetic.yaml with four updates per rollout, so that ratios leave 1),
the same learning rate, prompts and seeds; each registered algorithm with its own defaults, DAPO
with its four mechanisms, OPO with its other drives and corrections, and ISOPO's rules. The script
keeps the row of each run as it ends, so that it goes on where it was stopped; at the end it writes
rows.json and puts the mean over seeds with a bootstrapped 95 % interval into docs/algorithms.md;
make reference then renews the pages of docs/algorithms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import Quiet, stamp

from proxstep.algorithms import ALGORITHMS, Signal, centered_weights, escort_weights, register
from proxstep.algorithms.opo import OPO
from proxstep.algorithms.preparation import SignalInputs
from proxstep.config.loading import load_recipe
from proxstep.logprobs.tokens import masked_sum
from proxstep.runs.reading import Run, load_run
from proxstep.training import lifecycle

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
FOLDER = Path(__file__).with_suffix("")
ROWS, UNFINISHED = FOLDER / "rows.json", FOLDER / "unfinished.json"
PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"
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


def by_sequence(inputs: SignalInputs, *, alpha: float = 0.4) -> Signal:
    """Return OPO's drive with equation 7 read literally: the correction is log pi_k(y_b)."""
    old = inputs.old_policy
    assert old is not None  # reads_old_policy
    correction_B = masked_sum(old.log_prob_BT, old.response_BT).cpu()
    weight_B, metrics = escort_weights(
        inputs.advantage_B, inputs.group_B, alpha=alpha, correction=correction_B
    )
    return Signal(centered_weights(weight_B, inputs.group_B), metrics=metrics)


MICROBATCHES = {"update.microbatch_size": "16"}
"""What PROMA projects depends on them: with one alone it is REINFORCE."""

OPO_SEQUENCE = dataclasses.replace(
    OPO,
    name="opo-sequence",
    about="OPO with equation 7 read literally: one completion takes all the weight.",
    keys={name: OPO.keys[name] for name in ("alpha", "mu", "surrogate", "length_normalize")},
    prepare=by_sequence,
    reads_old_policy=lambda options: True,
    compares=lambda options: "another algorithm",
    checks=(),
)
"""An algorithm of this experiment alone; the run's process registers it."""

VARIANTS: dict[str, dict[str, str]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS},
    "dapo": {"algorithm": "dapo", **DAPO},
    "opo, length": {"algorithm": "opo", "objective.anchor_correction": "length"},
    "opo, sequence": {"algorithm": OPO_SEQUENCE.name},
    "opo, zscore": {"algorithm": "opo", "objective.drive": "zscore"},
    "opo, none": {"algorithm": "opo", "objective.drive": "none"},
    "isopo": {"algorithm": "isopo"},
    "isopo, microbatch": {"algorithm": "isopo", "geometry.overlap_source": "microbatch"},
    "isopo+opo": {"algorithm": "isopo+opo"},
    "proma": {"algorithm": "proma", **MICROBATCHES},
    "proma-intra": {"algorithm": "proma-intra", **MICROBATCHES},
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


def train(name: str, seed: int, folder: Path) -> None:
    """Run one variant with one seed in this process."""
    register(OPO_SEQUENCE)
    keys = {**SHARED, **VARIANTS[name], "seed": str(seed), "output_dir": str(folder)}
    lifecycle.train(load_recipe(RECIPE, list(keys.items())), Quiet())


def row_of(name: str, seed: int, output: Path) -> dict[str, Any]:
    """Run one variant with one seed in a process of its own and return its row."""
    folder = output / f"{name.replace(', ', '-')}-seed{seed}"
    log, began = folder.with_suffix(".log"), time.perf_counter()
    words = [sys.executable, __file__, "--run", name, str(seed), str(folder)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("wb") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if code.returncode:
        raise RuntimeError(f"{name}, seed {seed} failed:\n{log.read_text()[-2000:]}")
    seconds = round(time.perf_counter() - began, 1)
    return {"row": name, "seed": seed, "seconds": seconds, **figures_of(load_run(folder))}


def measure(seeds: int, parallel: int, console: Console) -> list[dict[str, Any]]:
    """Run what has no row yet, seed by seed; return one row per run."""
    settings = {"shared": SHARED, "variants": VARIANTS}
    kept = json.loads(UNFINISHED.read_text()) if UNFINISHED.exists() else {}
    rows = [row for row in kept.get("rows", []) if _is_current(row["row"], kept["settings"])]
    done = {(row["row"], row["seed"]) for row in rows}
    planned = [(name, seed) for seed in range(seeds) for name in VARIANTS]
    FOLDER.mkdir(exist_ok=True)
    left = [pair for pair in planned if pair not in done]
    console.print(f"{len(left)} of {len(planned)} runs to do")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(row_of, *pair, Path(folder)) for pair in left]
        try:
            for future in as_completed(futures):
                row = future.result()
                rows.append(row)
                UNFINISHED.write_text(json.dumps({"settings": settings, "rows": rows}))
                console.out(
                    f"{row['row']}, seed {row['seed']}: score {row['score']:.3f}, "
                    f"{row['seconds']:.0f} s; {len(rows)} of {len(planned)}"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(rows, key=lambda row: planned.index((row["row"], row["seed"])))


def _is_current(name: str, settings: dict[str, Any]) -> bool:
    """Whether a row that was measured with those settings would be measured alike today."""
    alike = settings["variants"].get(name) == VARIANTS.get(name)
    return name in VARIANTS and alike and settings["shared"] == SHARED


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


def write_table(rows: Sequence[dict[str, Any]]) -> None:
    """Put the table in the place of the one in docs/algorithms.md."""
    lines = PAGE.read_text().splitlines()
    heading = "| " + " | ".join(["", "worst seed", *FIGURES]) + " |"
    first = lines.index(heading)
    end = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    PAGE.write_text("\n".join([*lines[:first], markdown_of(rows), *lines[end:]]) + "\n")


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="Every algorithm on the arithmetic task.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write the table of the rows only")
    parser.add_argument("--run", nargs=3, metavar=("ROW", "SEED", "FOLDER"), help="one run only")
    arguments, console = parser.parse_args(), Console(width=170)
    if arguments.run:
        name, seed, folder = arguments.run
        return train(name, int(seed), Path(folder))
    if not arguments.table:
        rows = measure(arguments.seeds, arguments.parallel, console)
        report = {
            **stamp(),
            "recipe": RECIPE.name,
            "shared": SHARED,
            "variants": VARIANTS,
            "rows": rows,
        }
        ROWS.write_text(json.dumps(report, indent=1) + "\n")
        UNFINISHED.unlink()
    rows = json.loads(ROWS.read_text())["rows"]
    write_table(rows)
    console.print(f"score before training: {rows[0]['start']:.3f}")
    console.out(markdown_of(rows), highlight=False)


if __name__ == "__main__":
    main()

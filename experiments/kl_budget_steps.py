"""What single steps of the runs of kl_budget.py did under its budget, beside what was predicted.

    python experiments/kl_budget_steps.py

Each step was measured on a quarter of its batch, and under `corrected` on the next step's
samples as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.kl_budget import BUDGET, TASKS, written


def steps_of(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return what steps did, in nats or over something, by what it is."""
    found: dict[str, list[float]] = {}
    for run in runs:
        scaled = [scale is not None and scale < 1 for scale in run["scale"]]
        own = [kl for kl, cut in zip(run["kl_of_the_step"], scaled, strict=True) if cut]
        found.setdefault(f"{run['control']}: scaled steps, nats", []).extend(own)
        if run["control"] in ("predicted", "corrected"):
            steps = zip(run["kl_of_the_step"], run["predicted"], run["scale"], strict=True)
            over = [kl / (told * scale**2) for kl, told, scale in steps if told]
            found.setdefault("predicted and corrected: over the prediction", []).extend(over)
        if run["control"] == "corrected":
            steps = zip(run["realized"][1:], run["kl_of_the_step"], scaled, strict=False)
            later = [(after, kl, cut) for after, kl, cut in steps if after is not None]
            over, nats = (
                found.setdefault(f"corrected, on the next step's samples: {name}", [])
                for name in ("over its own batch", "scaled steps, nats")
            )
            over += [after / kl for after, kl, _ in later]
            nats += [after for after, _, cut in later if cut]
    return {name: sorted(values) for name, values in found.items() if values}


def lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return `steps_of` in words."""
    made = []
    for name, values in steps_of(runs).items():
        tenth, last = (values[int(share * len(values))] for share in (0.1, 0.9))
        made.append(
            f"- {name}: {len(values)} steps, median {statistics.median(values):.3f}, "
            f"mean {statistics.mean(values):.3f}, four of five {tenth:.3f} to {last:.3f}"
        )
    return made


def main() -> None:
    """Print them."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for task in TASKS:
        runs = [run for run in written(task) if run["budget"] == BUDGET and "judges" not in run]
        Console(width=120).out("\n".join([task, *lines(runs)]))


if __name__ == "__main__":
    main()

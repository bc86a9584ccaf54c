"""Which scale should ISOPO's weights have: the paper's, or one that keeps REINFORCE's units?

    python experiments/scale.py                  # 27 runs of 15 steps; writes scale/results.json
    python experiments/scale.py --seeds 0        # nine of them

Each optimizer trains with REINFORCE, and with `isopo` in both scales at REINFORCE's own learning
rate and clipping threshold, as somebody would who adds the geometry to a run that works. What
matters is whether that learning rate carries over: the reward gained, the KL divergence that it
took, the norm of the gradient against REINFORCE's, and how often the threshold cut it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from proxstep.__main__ import main as proxstep_main

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
RESULTS = Path(__file__).with_suffix("") / "results.json"
CLIP = 1.0
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer.name": "adamw"},
    "sgd": {"optimizer.name": "sgd", "optimizer.learning_rate": 0.05},
    "muon": {"optimizer.name": "muon"},
}
METHODS: dict[str, dict[str, Any]] = {
    "reinforce": {"algorithm": "reinforce"},
    "isopo, preserved": {"algorithm": "isopo", "geometry.scale": "preserved"},
    "isopo, paper": {"algorithm": "isopo", "geometry.scale": "paper"},
}
SIZES = {
    "device": "cpu",
    "optimizer.max_grad_norm": CLIP,
    "rollout.num_prompts": 8,
    "task.num_validation": 64,
    "evaluation.num_probe_prompts": 16,
}


def run(optimizer: str, method: str, seed: int, steps: int) -> dict[str, float]:
    """Train once; return what the table shows."""
    keys = {**SIZES, **OPTIMIZERS[optimizer], **METHODS[method], "seed": seed, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        keys |= {"output_dir": folder, "evaluation.every": steps}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status = proxstep_main(["train", str(RECIPE), *words])
        if status:
            raise SystemExit(f"{optimizer}, {method}, seed {seed}: {output.getvalue()[-500:]}")
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    norms = [record["grad_norm"] for record in records if record.get("grad_norm") is not None]
    last = records[-1]
    return {
        "reward_last_five": statistics.mean(record["reward"] for record in records[-5:]),
        "score": last["score"],
        "kl_initial_policy": last["kl_initial_policy"],
        "median_grad_norm": statistics.median(norms),
        "frac_clipped": statistics.mean(norm > CLIP for norm in norms),
    }


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=15)
    arguments, rows = parser.parse_args(), []
    console, table = Console(), Table("optimizer", "method")
    for optimizer in OPTIMIZERS:
        for method in METHODS:
            found = [run(optimizer, method, seed, arguments.steps) for seed in arguments.seeds]
            rows.append({"optimizer": optimizer, "method": method, "runs": found})
            console.print(optimizer, method, found)
            RESULTS.parent.mkdir(exist_ok=True)
            report = {"seeds": arguments.seeds, "steps": arguments.steps, "rows": rows}
            RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in rows[0]["runs"][0]:
        table.add_column(name)
    for row in rows:
        means = [statistics.mean(run[name] for run in row["runs"]) for name in row["runs"][0]]
        table.add_row(row["optimizer"], row["method"], *(f"{mean:.3g}" for mean in means))
    console.print(table)


if __name__ == "__main__":
    main()

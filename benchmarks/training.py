"""Real training steps of several algorithms: seconds by phase, peak memory, rewards.

    python benchmarks/training.py                              # 30 steps each on SmolLM2
    python benchmarks/training.py --device cuda --autocast bfloat16 --json FILE
    python benchmarks/training.py --model embedded --steps 2   # a tiny one, anywhere

The model is a recipe's: smollm2 (see `make smollm2`), a folder, a name on the hub. Every algorithm
begins from the same weights and seed, one after another in one process, on arithmetic's prompts. A
figure is the median of the steps but the first, which also loads kernels. On a CPU the peak is the
process's, which never falls: only the first row's is its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from proxstep.config.loading import resolve
from proxstep.config.recipe import Recipe
from proxstep.runs.console import make_progress
from proxstep.runs.folder import check_file, describe_machine
from proxstep.training import lifecycle
from proxstep.training.models import pick_device

ALGORITHMS = ("reinforce", "grpo", "isopo", "opo")
MEDIANS = ("seconds_rollout", "seconds_update", "seconds_step", "completions_mean_length")


def recipe_for(algorithm: str, arguments: argparse.Namespace, folder: Path) -> Recipe:
    """Return what one algorithm is run with."""
    model: dict[str, Any] = {"name": arguments.model, "autocast": arguments.autocast}
    if arguments.model == "embedded":
        model["warmup_score"] = 0.0
    return resolve(
        {"algorithm": algorithm},
        {
            "steps": arguments.steps,
            "device": arguments.device,
            "output_dir": str(folder / algorithm),
            "model": model,
            "task": {"difficulty": 1, "num_validation": 8},
            "rollout": {
                "num_prompts": arguments.num_prompts,
                "num_generations": 8,
                "max_completion_length": arguments.length,
            },
            "update": {"microbatch_size": 8},
            "optimizer": {"learning_rate": 1e-5},
            "evaluation": {
                "every": arguments.steps,
                "num_probe_prompts": 4,
                "kl_policy_initial": False,
            },
            "logging": {"num_samples": 0, "checkpoint_minutes": None},
        },
        "benchmark",
    )


def measure(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Run a recipe; return its figures."""
    device = pick_device(recipe.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    progress = make_progress(console)
    try:
        lifecycle.train(recipe, progress)
    finally:
        progress.end()
    text = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line) for line in text.splitlines()][1:]
    settled = steps[1:] or steps
    figures: dict[str, Any] = {"algorithm": recipe.algorithm, "steps": len(steps)}
    for name in MEDIANS:
        figures[name] = statistics.median(step[name] for step in settled if name in step)
    few = max(1, len(steps) // 6)
    for name, part in (("reward_first", steps[:few]), ("reward_last", steps[-few:])):
        figures[name] = statistics.mean(step["reward"] for step in part)
    figures["peak_gib"] = peak_bytes(device) / 2**30
    gc.collect()
    return figures


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held so far: of the card, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(words: list[str] | None = None, console: Console | None = None) -> list[dict[str, Any]]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="smollm2", help="a recipe's model.name")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--autocast", choices=["bfloat16"], help="compute in it")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="longest completion, in tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(words)
    if arguments.json:
        check_file(arguments.json, "--json")
    console = console or Console()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measure(recipe_for(algorithm, arguments, Path(folder)), console)
            for algorithm in arguments.algorithms
        ]
    table = Table(*found[0], box=None)
    for figures in found:
        values = figures.values()
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        machine = describe_machine(pick_device(arguments.device))
        report = {"machine": machine, "torch": torch.__version__, "settings": settings}
        text = json.dumps({**report, "rows": found}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()

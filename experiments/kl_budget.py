"""Does a KL budget make a run independent of its learning rate?

    python experiments/kl_budget.py                        # what results.json lacks
    python experiments/kl_budget.py --seconds 500          # no new run after so many seconds
    python experiments/kl_budget.py --plot                 # the figures alone

Arithmetic with the embedded model, recipes/arithmetic.yaml with REINFORCE and 15 steps, every
learning rate with every control and seed. What an optimizer step really did is measured apart from
what the control measures: KL(before || after) per sequence, on completions of the step's own batch
that did not judge it, by the same estimate from sampled tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from proxstep.__main__ import main as proxstep_main
from proxstep.budget.prediction import sampled_kl
from proxstep.training.rollout import Cut, completion_log_probs
from proxstep.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "arithmetic.yaml"
FOLDER = Path(__file__).with_suffix("")
RESULTS = FOLDER / "results.json"
BUDGET = 0.03
CONTROLS = ("none", "predicted", "corrected", "measured-backtracking", "adaptive-learning-rate")
RATES = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-4, 3e-5, 1e-2),
    "sgd": (3e-2, 1e-1, 3e-1),
    "muon": (3e-4, 1e-3, 3e-3),
}
SIZES = {
    "algorithm": "reinforce",
    "device": "cpu",
    "steps": 15,
    "optimizer.warmup_updates": 0,
    "evaluation.every": 15,
    "evaluation.kl_policy_initial": False,
    "evaluation.remember_first": True,
    "logging.checkpoint_last": False,
}


@contextlib.contextmanager
def watched(found: list[float]) -> Any:
    """Measure each optimizer step from outside, on completions that did not judge it."""
    step = Trainer._optimizer_step

    def measured(self: Trainer, losses: Any, minibatch: Any) -> dict[str, float]:
        # Judges are every sixteenth or so; these lie between them.
        rows = torch.arange(3, len(minibatch), 4)
        completions = minibatch.rows(rows).trimmed().completions
        settings = (completions, 1.0, Cut())
        before_BT = completion_log_probs(self.model, *settings)
        taken = step(self, losses, minibatch)
        after_BT = completion_log_probs(self.model, *settings)
        kl_B = sampled_kl(before_BT, after_BT, completions.response_BT[:, 1:])
        found.append(kl_B.mean().item())
        return taken

    Trainer._optimizer_step = measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._optimizer_step = step  # type: ignore[method-assign]


def trained(optimizer: str, rate: float, seed: int, budget: dict[str, Any]) -> list[dict[str, Any]]:
    """Train once; return the run's records."""
    keys: dict[str, Any] = {**SIZES, "optimizer.learning_rate": rate, "seed": seed, **budget}
    keys["optimizer.name"] = optimizer
    if optimizer == "sgd":
        keys["optimizer.momentum"] = 0.9
    words = [w for k, v in keys.items() for w in (f"--{k}", str(v).lower())]
    with tempfile.TemporaryDirectory() as folder:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = proxstep_main(["train", str(RECIPE), *words, "--output_dir", folder])
        if status:
            raise SystemExit(f"{keys}: {output.getvalue()[-500:]}")
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(optimizer: str, rate: float, control: str, seed: int) -> dict[str, Any]:
    """Train once; return the score and what every step was."""
    given = {"update.kl_budget": BUDGET, "update.kl_control": control}
    realized: list[float] = []
    start = time.process_time()
    with watched(realized):
        records = trained(optimizer, rate, seed, given if control != "none" else {})
    steps = records[1:]

    def column(name: str) -> list[float | None]:
        return [step.get(f"kl_budget/{name}") for step in steps]

    return {
        "optimizer": optimizer,
        "learning_rate": rate,
        "control": control,
        "seed": seed,
        "first_score": records[0]["score"],
        "score": records[-1]["score"],
        "kl_initial_policy": records[-1]["kl_initial_policy"],
        "processor_seconds": round(time.process_time() - start, 1),
        "seconds_update": round(sum(step["seconds_update"] for step in steps), 2),
        "reward": [step["reward"] for step in steps],
        "kl_of_the_step": realized,
        **{name: column(name) for name in ("predicted", "scale", "realized", "factor", "forwards")},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results by optimizer, rate and control."""
    lines = [
        "| optimizer | rate | control | seeds | score | worst | KL of a step, median (90 %) | "
        "scale, median | forwards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    key = ("optimizer", "learning_rate", "control")
    ordered = sorted(results, key=lambda r: (r["optimizer"], r["learning_rate"], _place(r)))
    for values, group in itertools.groupby(ordered, key=lambda r: tuple(r[k] for k in key)):
        runs = list(group)
        scores = [r["score"] for r in runs]
        kl = sorted(k for r in runs for k in r["kl_of_the_step"])
        scales = [s for r in runs for s in r["scale"] if s is not None]
        forwards = [f for r in runs for f in r["forwards"] if f is not None]
        cells = [values[0], f"{values[1]:g}", values[2], len(runs)]
        cells += [f"{statistics.mean(scores):.3f}", f"{min(scores):.3f}"]
        cells += [f"{statistics.median(kl):.4f} ({kl[int(0.9 * len(kl))]:.4f})"]
        cells += [f"{statistics.median(scales):.3f}" if scales else ""]
        cells += [f"{statistics.mean(forwards):.1f}" if forwards else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def written() -> list[dict[str, Any]]:
    """Return the runs that are there."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[key] for key in ("optimizer", "learning_rate", "control", "seed"))


def _place(result: dict[str, Any]) -> int:
    return CONTROLS.index(result["control"])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw scores against learning rates, and what AdamW's steps were predicted and found to be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    optimizers = sorted({r["optimizer"] for r in results})
    figure, axes = plt.subplots(
        1, len(optimizers) + 1, figsize=(4.5 * (len(optimizers) + 1), 3.6), squeeze=False
    )
    for axis, optimizer in zip(axes[0], optimizers, strict=False):
        for control in CONTROLS:
            runs = [r for r in results if (r["optimizer"], r["control"]) == (optimizer, control)]
            rates = sorted({r["learning_rate"] for r in runs})
            means = [
                statistics.mean(r["score"] for r in runs if r["learning_rate"] == rate)
                for rate in rates
            ]
            (line,) = axis.plot(rates, means, label=control)
            rest = {"s": 10, "color": line.get_color(), "alpha": 0.6}
            axis.scatter([r["learning_rate"] for r in runs], [r["score"] for r in runs], **rest)
        axis.set(xscale="log", xlabel="learning rate", ylabel="greedy score", title=optimizer)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    axis = axes[0][-1]
    for control in ("predicted", "corrected"):
        runs = [r for r in results if r["control"] == control]
        pairs = [
            (p * s**2, k)
            for r in runs
            for p, s, k in zip(r["predicted"], r["scale"], r["kl_of_the_step"], strict=True)
            if p
        ]
        if pairs:
            axis.scatter(*zip(*pairs, strict=True), s=6, alpha=0.5, label=control)
    axis.axline((BUDGET, BUDGET), slope=1, color="black", linewidth=0.7)
    axis.set(xscale="log", yscale="log", xlabel="predicted KL of the step, nats", title="all steps")
    axis.set(ylabel="KL of the step on other completions")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_rates(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the final score against AdamW's learning rate, with a budget and without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    looks = {
        "none": ("no budget", "#d55e00", "o", "--"),
        "predicted": (f"at most {BUDGET} nats per completion", "#0072b2", "s", "-"),
    }
    of_adamw = [r for r in results if r["optimizer"] == "adamw"]
    for control, (label, color, marker, line) in looks.items():
        runs = [r for r in of_adamw if r["control"] == control]
        rates = sorted({r["learning_rate"] for r in runs})
        means = [
            statistics.mean(r["score"] for r in runs if r["learning_rate"] == x) for x in rates
        ]
        axis.plot(rates, means, line, color=color, label=label)
        points = [(r["learning_rate"], r["score"]) for r in runs]
        axis.scatter(*zip(*points, strict=True), s=14, color=color, marker=marker, alpha=0.6)
    start = statistics.mean(r["first_score"] for r in of_adamw)
    axis.axhline(start, color="#666666", linewidth=0.8, linestyle=":")
    axis.annotate("before training", (rates[0], start), xytext=(0, 3), textcoords="offset points")
    axis.set(
        xscale="log", xlabel="learning rate of AdamW", ylabel="greedy score", ylim=(-0.02, 0.85)
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.05))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, write after every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=RATES)
    parser.add_argument("--controls", nargs="+", default=CONTROLS[:3], choices=CONTROLS)
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=1e9, help="no new run after that")
    parser.add_argument("--plot", action="store_true", help="draw what there is, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    begin, console = time.monotonic(), Console()
    for seed, optimizer in itertools.product(options.seeds, options.optimizers):
        rates = options.rates or RATES[optimizer][:3]
        for rate, control in itertools.product(rates, options.controls):
            if options.plot or time.monotonic() - begin > options.seconds:
                break
            if (optimizer, rate, control, seed) in {_key(r) for r in written()}:
                continue
            made = run(optimizer, rate, control, seed)
            results = [*written(), made]  # another process may have written in the meantime
            lines = ",\n".join(json.dumps(result) for result in results)
            RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            console.print(*_key(made), made["score"], made["processor_seconds"])
    console.print(table(written()), soft_wrap=True)
    plot(written(), FOLDER / "scores.png")
    plot_rates(written(), ROOT / "docs" / "figures" / "kl-budget.png")


if __name__ == "__main__":
    main()

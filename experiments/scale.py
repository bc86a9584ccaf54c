"""Which scale should ISOPO's weights have: the paper's, or one that keeps REINFORCE's units?

    python experiments/scale.py                  # 27 runs of 15 steps; writes scale/results.json
    python experiments/scale.py --seeds 0        # nine of them
    python experiments/scale.py --norms          # the gradients' norms alone

Each optimizer trains with REINFORCE, and with `isopo` in both scales at REINFORCE's own learning
rate and clipping threshold, as somebody would who adds the geometry to a run that works. What
matters is whether that learning rate carries over: the reward gained, the KL divergence that it
took, the norm of the gradient against REINFORCE's, and how often the threshold cut it.

The norms alone are also taken on untrained models of two widths, with sequences of three lengths:
a scale that keeps REINFORCE's units keeps its norm in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import stamp

from proxstep import IsometricRule, Isopo
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


def norm_of(rule: IsometricRule, width: int, length: int, seed: int) -> float:
    """Return the norm of the first step's gradient, eight random sequences in one microbatch."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
        )
    )
    token_BT, coefficient_B = torch.randint(64, (8, length)), torch.randn(8) / 8
    sequence_BT = torch.arange(8)[:, None].expand(8, length)
    isopo = Isopo(model, rule)

    def backward() -> None:
        with isopo.microbatch(sequence_BT, coefficient_B) as microbatch:
            log_prob_BTV = model(token_BT, use_cache=False).logits[:, :-1].log_softmax(-1)
            log_prob_BT = log_prob_BTV.gather(2, token_BT[:, 1:, None]).squeeze(2)
            microbatch.objective(log_prob_BT).backward()

    while isopo.needs_past:
        with isopo.measuring():
            backward()
    model.zero_grad()
    backward()
    return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item()


def norms() -> list[dict[str, Any]]:
    """Return each scale's norm over REINFORCE's, mean of three seeds, by width and length."""
    rows = []
    for width, length in itertools.product((64, 256), (16, 64, 256)):
        plain = [norm_of(IsometricRule(0.0), width, length, seed) for seed in range(3)]
        row: dict[str, Any] = {"width": width, "length": length}
        for scale in ("preserved", "paper"):
            rule = IsometricRule(-1.0, scale=scale)
            found = [norm_of(rule, width, length, seed) for seed in range(3)]
            row[scale] = statistics.mean(ours / it for ours, it in zip(found, plain, strict=True))
        rows.append(row)
    return rows


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--norms", action="store_true", help="take the gradients' norms alone")
    arguments, rows = parser.parse_args(), []
    console, table = Console(), Table("optimizer", "method")
    RESULTS.parent.mkdir(exist_ok=True)
    report = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    made = stamp()
    report["norms_over_reinforce"] = {**made, "rows": norms()}
    console.print(report["norms_over_reinforce"])
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.norms:
        return
    for optimizer in OPTIMIZERS:
        for method in METHODS:
            found = [run(optimizer, method, seed, arguments.steps) for seed in arguments.seeds]
            rows.append({"optimizer": optimizer, "method": method, "runs": found})
            console.print(optimizer, method, found)
            report |= {"seeds": arguments.seeds, "steps": arguments.steps, **made, "rows": rows}
            RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in rows[0]["runs"][0]:
        table.add_column(name)
    for row in rows:
        means = [statistics.mean(run[name] for run in row["runs"]) for name in row["runs"][0]]
        table.add_row(row["optimizer"], row["method"], *(f"{mean:.3g}" for mean in means))
    console.print(table)


if __name__ == "__main__":
    main()

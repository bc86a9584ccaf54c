"""Is the split of the gradient's noise the truth? One policy, resampled 200 times.

    python experiments/noise_split.py                # what noise_split.json lacks, then the table

Arithmetic with the embedded model as its warm-up left it, REINFORCE against the mean of the other
completions (advantage leave-one-out). For every (prompts, generations) the gradient of 200 batches
of 128 completions is taken, each of other prompts, without ever taking a step: their variance is
the truth. What 8 x 16 batches are split into predicts it for all of them; the kernel comes from
every sequence's gradient by itself. The smallest batch that the split holds to be as good as 8 x 16
is measured as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import batches, stamp, trainer_of

from proxstep.isopo.diagnostics.noise_split import NoiseSplit, noise_split, pooled
from proxstep.training.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
RESULTS = Path(__file__).with_suffix(".json")
NUM_BATCHES = 200
NUM_SPLIT = 32
"""Batches that are split."""
MEASURED = (8, 16)
SPLITS = ((64, 2), (32, 4), (16, 8), (8, 16), (4, 32))
STEPS = (1, 4, 16)
"""Over how many steps a split is averaged before the batch size is chosen."""


def shaped(prompts: int, generations: int, folder: Path) -> Trainer:
    """Return the recipe's trainer for batches of one shape; it never takes a step."""
    keys = {
        "algorithm": "reinforce",
        "objective.advantage": "leave-one-out",
        "rollout.num_prompts": prompts,
        "rollout.num_generations": generations,
        "evaluation.kl_policy_initial": False,
        "device": "cpu",
    }
    return trainer_of(RECIPE, keys, folder)


def gradient(trainer: Trainer) -> torch.Tensor:
    """Return the gradient that has accumulated, as one vector, and clear it."""
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    return torch.cat(grads)


def truth(trainer: Trainer) -> dict[str, float]:
    """Return the variance of the gradient, its standard error, and the square of its mean."""
    total, squares, start = torch.zeros(1), [], time.process_time()
    for batch in batches(trainer, range(NUM_BATCHES)):
        trainer._accumulate(batch, {}, measure_entropy=False)
        grad = gradient(trainer)
        total = total + grad.double()
        squares.append(float(grad.double().square().sum()))
    n = NUM_BATCHES
    mean_square = float(total.square().sum()) / n**2
    variance = (statistics.mean(squares) - mean_square) * n / (n - 1)
    return {
        "variance": variance,
        "error": statistics.stdev(squares) / n**0.5,
        "squared_gradient": mean_square - variance / n,
        "seconds": round(time.process_time() - start, 1),
    }


def measured(trainer: Trainer) -> dict[str, Any]:
    """Return the split of each batch, in units of the batch gradient's squared length."""
    splits, start = [], time.process_time()
    for batch in batches(trainer, range(NUM_SPLIT)):
        rows = []
        for b in range(len(batch)):
            completions = batch.rows(torch.tensor([b])).trimmed().completions
            log_prob_BT = trainer._score(completions).log_prob_BT
            log_prob_BT[completions.response_BT[:, 1:]].sum().backward()
            rows.append(gradient(trainer))
        score_BD = torch.stack(rows)
        ntk_BB = (score_BD @ score_BD.mT).double()
        # Leave-one-out advantages are n / (n - 1) times the centered ones.
        centered_B = batch.signal_B.double() * (1 - 1 / MEASURED[1])
        split = noise_split(centered_B[None], ntk_BB[None], batch.group_B[None])
        assert split is not None
        splits.append(asdict(split))
    return {"seconds": round(time.process_time() - start, 1), "splits": splits}


def table(results: dict[str, Any]) -> list[str]:
    """Return the truth beside the prediction, and what one chooses by it."""
    splits = [NoiseSplit(**each) for each in results["measured"]["splits"]]
    mean = pooled(splits)
    assert mean is not None
    lines = [mean.sentence(), "| batch | completions | true noise (error) | predicted | ratio |"]
    lines.append("|---|---|---|---|---|")
    for label, found in results["truth"].items():
        prompts, generations = map(int, label.split(" x "))
        true, told = found["variance"], mean.variance(prompts, generations)
        cells = [label, prompts * generations, f"{true:.4g} ({found['error']:.2g})"]
        cells += [f"{told:.4g}", f"{told / true:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for steps in STEPS:
        parts = [splits[i : i + steps] for i in range(0, len(splits) - steps + 1, steps)]
        chosen = [found.cheapest(*MEASURED) for part in parts if (found := pooled(part))]
        whole = MEASURED[0] * MEASURED[1]
        shares = sorted(p * n / whole for p, n in chosen)
        ratios = sorted(mean.variance(p, n) / mean.variance(*MEASURED) for p, n in chosen)
        lines.append(
            f"averaged over {steps} steps ({len(chosen)} times): rollouts "
            f"{statistics.median(shares):.0%} ({shares[0]:.0%} to {shares[-1]:.0%}), noise "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times"
        )
    return lines


def main() -> None:
    """Measure what is missing, and print the table."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"truth": {}}
    made = stamp()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        if "measured" not in results:
            results["measured"] = {**made, **measured(shaped(*MEASURED, folder))}
            RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
        mean = pooled([NoiseSplit(**each) for each in results["measured"]["splits"]])
        assert mean is not None
        for prompts, generations in dict.fromkeys((MEASURED, mean.cheapest(*MEASURED), *SPLITS)):
            label = f"{prompts} x {generations}"
            if label not in results["truth"]:
                found = {**made, **truth(shaped(prompts, generations, folder))}
                results["truth"][label] = found
                RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
                console.print(f"{label}: {found['seconds']} s")
    console.print("\n".join(table(results)))


if __name__ == "__main__":
    main()

"""Is the split of the gradient's noise the truth? One policy, resampled 200 times.

    python experiments/noise_split.py                # what noise_split.json lacks, then the table

Arithmetic with the embedded model as its warm-up left it, REINFORCE against the mean of the other
completions (advantage leave-one-out). For every (prompts, generations) the gradient of 200 batches
of 128 completions is taken, each of other prompts, without ever taking a step: their variance is
the truth. What 8 x 16 batches are split into, averaged over the 200, predicts it for all of them;
the smallest batch that the split holds to be as good as 8 x 16 is measured as well.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from proxstep.config.loading import load_recipe
from proxstep.isopo.diagnostics.noise_split import NoiseSplit, pooled
from proxstep.runs.console import make_progress
from proxstep.runs.folder import RunFolder
from proxstep.training import lifecycle
from proxstep.training.batch import collect
from proxstep.training.models import load_model, load_tokenizer
from proxstep.training.prompts import load_prompts
from proxstep.training.task import load_task
from proxstep.training.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
RESULTS = Path(__file__).with_suffix(".json")
NUM_BATCHES = 200
MEASURED = (8, 16)
SPLITS = ((64, 2), (32, 4), (16, 8), (8, 16), (4, 32))
STEPS = (1, 8, 32)
"""Over how many steps a split is averaged before the batch size is chosen."""


def trainer_of(prompts: int, generations: int, folder: Path, *, diagnose: bool) -> Trainer:
    """Return the recipe's trainer for batches of one shape; it never takes a step."""
    keys = {
        "algorithm": "reinforce+reinforce" if diagnose else "reinforce",
        "objective.advantage": "leave-one-out",
        "rollout.num_prompts": prompts,
        "rollout.num_generations": generations,
        "evaluation.kl_policy_initial": "false",
        "device": "cpu",
        "output_dir": str(folder),
        **({"geometry.diagnose_every": 1} if diagnose else {}),
    }
    recipe = load_recipe(RECIPE, [(key, str(value)) for key, value in keys.items()])
    progress = make_progress(Console())
    source = lifecycle.prepared_source(recipe, progress)
    tokenizer, model = load_tokenizer(source), load_model(source, "float32", torch.device("cpu"))
    task = load_task(recipe, chat=False)
    data = load_prompts(recipe, tokenizer, task, progress.note)
    return Trainer(recipe, model, tokenizer, *data, RunFolder(folder), progress)


def gradients(trainer: Trainer) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the gradient of one batch after another, by parameter."""
    for number in range(NUM_BATCHES):
        torch.manual_seed(number)
        batch, _ = collect(
            *(trainer.recipe, trainer.objective, trainer.model, trainer.sampler),
            *(trainer.tokenizer, trainer.train_prompts, number, trainer.clock.phase),
        )
        trainer.model.zero_grad()
        if batch is not None:
            trainer.model.train()
            trainer._accumulate(batch, {}, measure_entropy=False)
            trainer.model.eval()
        named = trainer.model.named_parameters()
        yield {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def truth(trainer: Trainer) -> dict[str, Any]:
    """Return the variance of the gradient and the square of its mean, by parameter, unbiased."""
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, float] = {}
    start = time.process_time()
    for gradient in gradients(trainer):
        for name, grad in gradient.items():
            sums[name] = sums[name] + grad.double() if name in sums else grad.double()
            squares[name] = squares.get(name, 0.0) + float(grad.double().square().sum())
    n, found = NUM_BATCHES, {}
    for name, total in sums.items():
        mean_square = float(total.square().sum()) / n**2
        variance = (squares[name] / n - mean_square) * n / (n - 1)
        found[name] = {"variance": variance, "squared_mean": mean_square - variance / n}
    return {"seconds": round(time.process_time() - start, 1), "parameters": found}


def measured(trainer: Trainer) -> dict[str, Any]:
    """Return the split of each batch, in units of the batch gradient's squared length."""
    isopo, splits, start = trainer.isopo, [], time.process_time()
    assert isopo is not None
    isopo.diagnose = True
    prompts, generations = MEASURED
    unit = (prompts * (generations - 1)) ** 2
    names: list[str] = []
    for _ in gradients(trainer):
        isopo.step()
        step = isopo.diagnostics
        assert step is not None
        names = [layer.name for layer in step.layers if layer.ntk_effective_rank is not None]
        if step.noise_split is not None:
            parts = asdict(step.noise_split)
            scaled = ("squared_gradient", "between", "single", "pair")
            splits.append({k: v * unit if k in scaled else v for k, v in parts.items()})
    seconds = round(time.process_time() - start, 1)
    return {"seconds": seconds, "uses": len(step.layers), "with_kernel": names, "splits": splits}


def table(results: dict[str, Any]) -> list[str]:
    """Return the truth beside the prediction, and what one chooses by it."""
    splits = [NoiseSplit(**each) for each in results["measured"]["splits"]]
    mean = pooled(splits)
    assert mean is not None
    lines = [mean.sentence(), "| batch | completions | true variance | predicted | ratio |"]
    lines.append("|---|---|---|---|---|")
    for label, found in results["truth"].items():
        prompts, generations = map(int, label.split(" x "))
        true = sum(each["variance"] for each in found["parameters"].values())
        told = mean.variance(prompts, generations)
        cells = [label, prompts * generations, f"{true:.4g}", f"{told:.4g}", f"{told / true:.2f}"]
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
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        if "measured" not in results:
            results["measured"] = measured(trainer_of(*MEASURED, folder, diagnose=True))
            RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
        mean = pooled([NoiseSplit(**each) for each in results["measured"]["splits"]])
        assert mean is not None
        for prompts, generations in (MEASURED, mean.cheapest(*MEASURED), *SPLITS):
            label = f"{prompts} x {generations}"
            if label not in results["truth"]:
                found = truth(trainer_of(prompts, generations, folder, diagnose=False))
                results["truth"][label] = found
                RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
                console.print(f"{label}: {found['seconds']} s")
    console.print("\n".join(table(results)))


if __name__ == "__main__":
    main()

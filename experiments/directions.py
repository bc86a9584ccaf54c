"""What single steps of a method and an optimizer are worth, measured at one fixed policy.

    python experiments/directions.py               # what is missing, then the page
    python experiments/directions.py --chains 2    # fewer batches, a first look

The task and batches of experiments/truth/drift-fisher: long additions, 8 x 8 completions, gradients
clipped at 1. From a policy that does not change, chains of 20 batches are sampled; each method's
gradients of a chain go through each optimizer, whose step is taken back each time. A step's
direction Delta is then held against three things:

- <grad J, Delta>, the reward that it gains to first order, with grad J the mean of REINFORCE's
  gradients over the batches of all other chains;
- its KL divergence on completions that had no part in it, 1/2 mean_b sum_t <grad log pi_bt,
  Delta>^2, exact by forward-mode derivatives;
- the same on the batch that made it, which is what a KL budget sees.

What chains have in common is signal, the rest is their batches' luck: the share of the divergence
that is signal is the mean product of two chains' directions, in the Fisher metric, over the mean
square.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from math import isnan, log
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import POLICIES, batches, stamp, trainer_of

from proxstep.budget.prediction import quadratic_kl, slopes
from proxstep.lab.statistics import Estimate, mean_interval, share_saved
from proxstep.training.batch import Batch
from proxstep.training.optimizers import make_optimizer
from proxstep.training.rollout import Cut, completion_log_probs
from proxstep.training.trainer import Trainer
from proxstep.typing import Float, Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "findings" / "directions.md"
FIGURE = ROOT / "docs" / "figures" / "findings" / "directions.svg"
BEGIN, END = "<!-- results: python experiments/directions.py -->", "<!-- end of the results -->"
RECIPE = ROOT / "experiments" / "truth" / "drift-fisher" / "plan.yaml"
METHODS = ("reinforce", "isopo", "isopo-euclidean")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "learning_rate": 1.0},
    "sgd with momentum": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.9},
    "adamw without momentum": {"name": "adamw", "learning_rate": 1e-2, "betas": [0.0, 0.999]},
    "adamw": {"name": "adamw", "learning_rate": 1e-2},
    "muon": {"name": "muon", "learning_rate": 1e-2},
}
"""Rates do not matter here, so long as a step is far above the weights' rounding."""
STEPS_BEFORE = (0, 10)
"""Steps of REINFORCE with AdamW that the policies have behind them, at the rate best for it."""
LENGTH, MEASURED = 20, (1, 20)
"""Batches of a chain, and those whose steps are measured."""
NUM_HELD_OUT = 3
"""Batches on which divergences are measured."""
CROSSED = ("reinforce", "isopo")
Direction = list[Tensor]


def trainers(folder: Path, steps_before: int) -> dict[str, Trainer]:
    """Return a trainer for each method, all with the same policy."""
    found = {}
    for method in METHODS:
        keys = {"algorithm": method, "model.name": POLICIES / "sums", "device": "cpu"}
        keys |= {"optimizer.learning_rate": 4e-5, "optimizer.warmup_updates": 3}
        found[method] = trainer_of(RECIPE, keys, folder / method)
    first = found["reinforce"]
    for _ in range(steps_before):
        first._train_step()
    for trainer in found.values():
        trainer.model.load_state_dict(first.model.state_dict())
        trainer.model.eval()
    return found


def gradient(trainer: Trainer, batch: Batch) -> tuple[Direction, float]:
    """Return a method's gradient of a batch, and its norm; nothing is changed but ISOPO's past."""
    trainer._measure_past(batch)
    trainer._accumulate(batch, {}, measure_entropy=False)
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).item()
    if trainer.isopo is not None:
        trainer.isopo.step()
    grads = [p.grad.clone() for p in _parameters(trainer) if p.grad is not None]
    trainer.model.zero_grad()
    return grads, norm


def steps_of(trainer: Trainer, section: Mapping[str, Any], grads: Sequence[Direction]) -> Any:
    """Yield an optimizer's steps on a chain of gradients, each taken back."""
    settings = trainer.recipe.optimizer.model_dump() | dict(section) | {"warmup_updates": 0}
    optimizer = make_optimizer(type(trainer.recipe.optimizer)(**settings), trainer.model)
    parameters = _parameters(trainer)
    before = [p.detach().clone() for p in parameters]
    for grad in grads:
        for parameter, own in zip(parameters, grad, strict=True):
            parameter.grad = own.clone()
        optimizer.step()
        with torch.no_grad():
            delta = [p - old for p, old in zip(parameters, before, strict=True)]
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
        yield delta
    trainer.model.zero_grad()


def moved(trainer: Trainer, delta: Direction, batch: Batch) -> tuple[float, Float[Tensor, " n"]]:
    """Return a direction's divergence in nats per completion, and each token's slope."""
    completions = batch.completions
    response_BT = completions.response_BT[:, 1:]
    direction = dict(zip(_parameters(trainer), delta, strict=True))

    def log_probs() -> tuple[Tensor, Tensor]:
        return completion_log_probs(trainer.model, completions, 1.0, Cut()), response_BT

    _, slope_BT, _ = slopes(trainer.model, log_probs, direction)
    slope_N = slope_BT[response_BT].double() / (2 * len(batch)) ** 0.5
    return quadratic_kl(slope_BT, response_BT).mean().item(), slope_N


def measured(steps_before: int, chains: int, folder: Path) -> dict[str, Any]:
    """Return what every direction is, by method, optimizer and step of the chain."""
    found = trainers(folder, steps_before)
    sampled, held_out, n = _sampled(found["reinforce"], chains)
    rows: dict[str, dict[str, Any]] = {}
    sums: list[Direction] = []
    for method, trainer in found.items():
        made = [[gradient(trainer, batch) for batch in chain] for chain in sampled]
        if method == "reinforce":
            sums = [_sum(chain) for chain in made]
        for name, section in OPTIMIZERS.items():
            at: dict[int, list[Direction]] = {step: [] for step in MEASURED}
            for chain in made:
                grads = [grads for grads, _ in chain]
                for step, delta in enumerate(steps_of(trainer, section, grads), 1):
                    if step in at:
                        at[step].append(delta)
            for step, deltas in at.items():
                own = [chain[step - 1] for chain in sampled]
                row = _row(trainer, deltas, sums, own, held_out, n)
                rows[f"{method}, {name}, {step}"] = row
    return rows


def _sampled(trainer: Trainer, chains: int) -> tuple[list[list[Batch]], list[Batch], int]:
    """Return the chains' batches, those held out, and how many completions a prompt has."""
    numbers = range(1000, 1000 + chains * LENGTH + NUM_HELD_OUT)
    sampled = list(batches(trainer, numbers))
    chained = [sampled[i * LENGTH : (i + 1) * LENGTH] for i in range(chains)]
    return chained, sampled[chains * LENGTH :], trainer.recipe.rollout.num_generations


def _sum(chain: Sequence[tuple[Direction, float]]) -> Direction:
    """Return the sum of a chain's gradients as they were before clipping."""
    whole = [[g * max(norm, 1.0) for g in grads] for grads, norm in chain]
    return [torch.stack(parts).sum(0) for parts in zip(*whole, strict=True)]


def _row(
    trainer: Trainer,
    deltas: Sequence[Direction],
    sums: Sequence[Direction],
    own: Sequence[Batch],
    held_out: Sequence[Batch],
    n: int,
) -> dict[str, Any]:
    gains, slope_CN = [], []
    for c, delta in enumerate(deltas):
        others = [total for i, total in enumerate(sums) if i != c]
        descent = sum(
            float((d.double() * torch.stack(parts).double().sum(0)).sum())
            for d, parts in zip(delta, zip(*others, strict=True), strict=True)
        )
        # A group's mean is of all its rewards, the completion's own too: hence n / (n - 1).
        gains.append(-descent / (len(others) * LENGTH) * n / (n - 1))
        slope_CN.append(torch.cat([moved(trainer, delta, batch)[1] for batch in held_out]))
    stacked_CN = torch.stack(slope_CN) / len(held_out) ** 0.5
    return {
        "gain": gains,
        "kl_own": [moved(trainer, d, b)[0] for d, b in zip(deltas, own, strict=True)],
        "gram": (stacked_CN @ stacked_CN.mT).tolist(),
    }


def _parameters(trainer: Trainer) -> list[nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def crossed(steps_before: int, chains: int, folder: Path) -> dict[str, Any]:
    """Return AdamW's last direction with one method's average and another's average square."""
    found = trainers(folder, steps_before)
    reinforce = found["reinforce"]
    sampled, held_out, n = _sampled(reinforce, chains)
    made = {m: [[gradient(found[m], b) for b in chain] for chain in sampled] for m in CROSSED}
    sums = [_sum(chain) for chain in made["reinforce"]]
    rows = {}
    for first, second in itertools.product(CROSSED, repeat=2):
        deltas = [
            _adam([g for g, _ in one], [g for g, _ in other])
            for one, other in zip(made[first], made[second], strict=True)
        ]
        last = [chain[-1] for chain in sampled]
        rows[f"{first}, {second}"] = _row(reinforce, deltas, sums, last, held_out, n)
    return rows


def _adam(average: Sequence[Direction], squares: Sequence[Direction]) -> Direction:
    """Return AdamW's direction after a chain, its two averages from gradients of their own."""
    beta1, beta2, steps = 0.9, 0.999, len(average)
    found = []
    for ours, theirs in zip(zip(*average, strict=True), zip(*squares, strict=True), strict=True):
        ages = range(steps - 1, -1, -1)
        m = sum((beta1**age * g for age, g in zip(ages, ours, strict=True)), torch.zeros(()))
        v = sum((beta2**age * g**2 for age, g in zip(ages, theirs, strict=True)), torch.zeros(()))
        m, v = m * (1 - beta1) / (1 - beta1**steps), v * (1 - beta2) / (1 - beta2**steps)
        found.append(-m / (v.sqrt() + 1e-8))
    return found


def described(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return each chain's figures; NaN where its batch had no signal, so that no step was taken."""
    gram_CC = torch.tensor(row["gram"], dtype=torch.float64)
    gain_C, own_C = (torch.tensor(row[name], dtype=torch.float64) for name in ("gain", "kl_own"))
    kl_C = gram_CC.diagonal()
    others_C = (gram_CC.sum(1) - kl_C) / (len(gram_CC) - 1)
    found = {
        "efficiency": gain_C / (2 * kl_C).sqrt(),
        "signal": others_C / kl_C.mean(),
        "own": own_C / kl_C,
    }
    return {name: values.tolist() for name, values in found.items()}


def estimated(values: Sequence[float]) -> Estimate:
    """Return the mean of what is known with its interval."""
    return mean_interval([value for value in values if not isnan(value)])


def lines(rows: Mapping[str, Any], names: Mapping[str, str], plain: str) -> Iterator[str]:
    """Yield a table of directions.

    Args:
        rows: The directions.
        names: Those to show, with their headings.
        plain: The one that the others are compared with.
    """
    yield (
        "| | reward by sqrt(nat) | against the first | less KL for as much reward "
        "| the batches' common part of the KL | KL on its own batch, over that elsewhere |"
    )
    yield "|---|---|---|---|---|---|"
    reference = described(rows[plain])["efficiency"]
    for name, heading in names.items():
        own = described(rows[name])
        pairs = list(zip(own["efficiency"], reference, strict=True))
        ratio = estimated([log(a / b) for a, b in pairs if a > 0 and b > 0])
        saved = share_saved(Estimate(*(2 * x for x in (ratio.value, ratio.low, ratio.high))))
        cells = [heading, estimated(own["efficiency"]).text()]
        cells += (
            ["", ""]
            if name == plain
            else [estimated([a - b for a, b in pairs]).text("+"), saved.percent()]
        )
        cells += [estimated(own["signal"]).text(), estimated(own["own"]).text()]
        yield f"| {' | '.join(cells)} |"


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was run, and the tables of all policies."""
    made = [found for found in results.values() if "machine" in found]
    machines, dates = (sorted({found[key] for found in made}) for key in ("machine", "date"))
    yield f"{'; '.join(machines)}; {' to '.join(dates)}; {made[0]['chains']} chains."
    for before, step in itertools.product(STEPS_BEFORE, MEASURED):
        rows = results[str(before)]["rows"]
        own = OPTIMIZERS if step > 1 else [name for name in OPTIMIZERS if "with" not in name]
        names = {
            f"{method}, {name}, {step}": f"{method}, {name}"
            for name, method in itertools.product(own, METHODS)
        }
        yield f"{_policy(before)}, batch {step} of a chain:"
        yield "\n".join(lines(rows, names, f"reinforce, adamw, {step}"))
    for before in STEPS_BEFORE:
        rows = results[str(before)]["crossed"]
        names = {
            f"{first}, {second}": f"{first} over the root of {second}'s squares"
            for first, second in itertools.product(CROSSED, repeat=2)
        }
        yield f"{_policy(before)}, AdamW's two averages apart, batch {LENGTH} of a chain:"
        yield "\n".join(lines(rows, names, "reinforce, reinforce"))


def _policy(before: int) -> str:
    return f"The policy after {before} steps" if before else "The initial policy"


def plot(results: Mapping[str, Any]) -> None:
    """Draw what a step's direction is worth, by optimizer and method."""
    figure, panels = plt.subplots(
        1, len(STEPS_BEFORE), figsize=(9, 3.2), layout="constrained", sharey=True
    )
    own = [name for name in OPTIMIZERS if "without" not in name and name != "sgd"]
    looks = dict(zip(METHODS, ("#6b7280", "#0072b2", "#d55e00"), strict=True))
    for panel, before in zip(panels, STEPS_BEFORE, strict=True):
        rows = results[str(before)]["rows"]
        for place, method in enumerate(METHODS):
            found = [described(rows[f"{method}, {name}, {LENGTH}"])["efficiency"] for name in own]
            means = [estimated(values) for values in found]
            at = [column + 0.2 * (place - 1) for column in range(len(own))]
            errors = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            panel.errorbar(
                at, [m.value for m in means], errors, fmt="o", color=looks[method], label=method
            )
        panel.set_xticks(range(len(own)), [name.replace(" with", "\nwith") for name in own])
        panel.set(title=_policy(before), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="reward gained by sqrt(nat)")
    panels[-1].legend(frameon=False, loc="lower right")
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for before, (part, measure) in itertools.product(
        STEPS_BEFORE, {"rows": measured, "crossed": crossed}.items()
    ):
        found = results.setdefault(str(before), {})
        if part not in found:
            start = time.process_time()
            with tempfile.TemporaryDirectory() as name:
                found[part] = measure(before, options.chains, Path(name))
            found |= {**stamp(), "chains": options.chains}
            found[f"seconds_{part}"] = round(time.process_time() - start, 1)
            RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    text = "\n\n".join(tables(results))
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "proxstep"}):
        plot(results)
    Console().out(text, highlight=False)


if __name__ == "__main__":
    main()

"""What single steps of a method and an optimizer are worth, measured at a fixed policy.

    python experiments/directions.py               # what is missing, then the page
    python experiments/directions.py products      # one policy alone

At each of `PLACES`, a policy that does not change, chains of batches are sampled; each method's
gradients of a chain, clipped at 1, go through each optimizer, whose step is taken back each time. A
step's direction Delta is then held against three things:

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
from dataclasses import dataclass, field
from math import isnan, log
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import POLICIES, batches, stamp, trainer_of

from proxstep.budget.prediction import judges, quadratic_kl, slopes
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
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "learning_rate": 1.0},
    "sgd with momentum": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.9},
    "adamw without momentum": {"name": "adamw", "learning_rate": 1e-2, "betas": [0.0, 0.999]},
    "adamw": {"name": "adamw", "learning_rate": 1e-2},
    "muon": {"name": "muon", "learning_rate": 1e-2},
}
"""Rates do not matter here, so long as a step is far above the weights' rounding."""
CROSSED = ("reinforce", "isopo")
Direction = list[Tensor]


@dataclass(frozen=True)
class Place:
    """A task and a policy, and what is measured there.

    Attributes:
        title: What stands over its tables.
        short: What stands over its panel of the figure.
        recipe: The task, the model and the batches.
        keys: Recipe keys that are set otherwise.
        steps_before: Steps of REINFORCE that the policy has behind it.
        chains: How many of them.
        length: Batches of a chain.
        measured: Those of them whose steps are measured.
        num_held_out: Batches on which divergences are measured.
        num_own: Completions of a step's own batch on which its divergence is measured; None: all.
        methods: Rules whose gradients are taken.
        optimizers: Names in `OPTIMIZERS`.
        crossed: Whether AdamW's two averages are taken apart as well.
    """

    title: str
    short: str
    recipe: Path
    keys: Mapping[str, Any] = field(default_factory=dict)
    steps_before: int = 0
    chains: int = 8
    length: int = 20
    measured: tuple[int, ...] = (1, 20)
    num_held_out: int = 3
    num_own: int | None = None
    methods: tuple[str, ...] = ("reinforce", "isopo", "isopo-euclidean")
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    crossed: bool = False


DRIFT_FISHER = ROOT / "experiments" / "truth" / "drift-fisher" / "plan.yaml"
BEST_RATE = {"model.name": POLICIES / "sums", "optimizer.learning_rate": 4e-5}
PLACES = {
    "0": Place(
        "`sums`, the initial policy", "sums, initial", DRIFT_FISHER, BEST_RATE, crossed=True
    ),
    "10": Place(
        *("`sums`, the policy after 10 steps", "sums, after 10 steps", DRIFT_FISHER, BEST_RATE, 10),
        crossed=True,
    ),
    "products": Place(
        *("`products`, the initial policy", "products, initial", ROOT / "recipes" / "worked.yaml"),
        {"task.name": "products"},
        measured=(20,),
        methods=CROSSED,
        optimizers=("sgd with momentum", "adamw"),
    ),
    "stories": Place(
        "SmolLM2-135M-Instruct on `stories`, the policy after 3 rollouts",
        "SmolLM2 on stories,\nafter 3 rollouts",
        ROOT / "recipes" / "smollm2.yaml",
        steps_before=3,
        chains=5,
        length=8,
        measured=(8,),
        num_held_out=1,
        num_own=12,
        methods=CROSSED,
        optimizers=("sgd with momentum", "adamw"),
    ),
}
"""Of the long additions two policies, then another task, and a pretrained model."""


def trainers(place: Place, folder: Path) -> dict[str, Trainer]:
    """Return a trainer for each method, all with the same policy."""
    found = {}
    for method in place.methods:
        keys = {"algorithm": method, "device": "cpu", **place.keys}
        found[method] = trainer_of(place.recipe, keys, folder / method)
    first = found["reinforce"]
    for _ in range(place.steps_before):
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


class Proposer:
    """An optimizer whose steps are taken back.

    Args:
        trainer: Whose model it moves.
        section: The optimizer, as a recipe has it.
    """

    def __init__(self, trainer: Trainer, section: Mapping[str, Any]) -> None:
        settings = trainer.recipe.optimizer.model_dump() | dict(section) | {"warmup_updates": 0}
        self.model = trainer.model
        self.optimizer = make_optimizer(type(trainer.recipe.optimizer)(**settings), self.model)
        self.parameters = _parameters(trainer)

    def step(self, grads: Direction) -> Direction:
        """Return the step that follows from one more gradient."""
        before = [p.detach().clone() for p in self.parameters]
        for parameter, own in zip(self.parameters, grads, strict=True):
            parameter.grad = own.clone()
        self.optimizer.step()
        with torch.no_grad():
            delta = [p - old for p, old in zip(self.parameters, before, strict=True)]
            for parameter, old in zip(self.parameters, before, strict=True):
                parameter.copy_(old)
        self.model.zero_grad()
        return delta


def moved(trainer: Trainer, delta: Direction, batch: Batch) -> tuple[float, Float[Tensor, " n"]]:
    """Return a direction's divergence in nats per completion, and each token's slope."""
    direction = dict(zip(_parameters(trainer), delta, strict=True))
    kl_B, slope_N = [], []
    for part in batch.microbatches(trainer.recipe.update):
        response_BT = part.completions.response_BT[:, 1:]

        def log_probs(
            part: Batch = part, response_BT: Tensor = response_BT
        ) -> tuple[Tensor, Tensor]:
            return completion_log_probs(trainer.model, part.completions, 1.0, Cut()), response_BT

        _, slope_BT, _ = slopes(trainer.model, log_probs, direction)
        kl_B.append(quadratic_kl(slope_BT, response_BT))
        slope_N.append(slope_BT[response_BT].double() / (2 * len(batch)) ** 0.5)
    return torch.cat(kl_B).mean().item(), torch.cat(slope_N)


def measured(place: Place, folder: Path) -> dict[str, Any]:
    """Return what every direction is, by method, optimizer and step of the chain."""
    found = trainers(place, folder)
    sampled, held_out, n = _sampled(found["reinforce"], place)
    rows: dict[str, dict[str, Any]] = {}
    sums: list[Direction] = []
    for method, trainer in found.items():
        deltas: dict[tuple[str, int], list[Direction]] = {}
        for chain in sampled:
            proposers = {name: Proposer(trainer, OPTIMIZERS[name]) for name in place.optimizers}
            total: Direction = []
            for step, batch in enumerate(chain, 1):
                grads, norm = gradient(trainer, batch)
                total = _added(total, grads, norm)
                for name, proposer in proposers.items():
                    delta = proposer.step(grads)
                    if step in place.measured:
                        deltas.setdefault((name, step), []).append(delta)
            if method == "reinforce":
                sums.append(total)
        for (name, step), own in deltas.items():
            batches_of = [chain[step - 1] for chain in sampled]
            row = _row(place, trainer, own, sums, batches_of, held_out, n)
            rows[f"{method}, {name}, {step}"] = row
    return rows


def _sampled(trainer: Trainer, place: Place) -> tuple[list[list[Batch]], list[Batch], int]:
    """Return the chains' batches, those held out, and how many completions a prompt has."""
    chained = place.chains * place.length
    sampled = list(batches(trainer, range(1000, 1000 + chained + place.num_held_out)))
    chains = [sampled[i : i + place.length] for i in range(0, chained, place.length)]
    return chains, sampled[chained:], trainer.recipe.rollout.num_generations


def _added(total: Direction, grads: Direction, norm: float) -> Direction:
    """Return a sum of gradients and one more, as it was before clipping."""
    whole = [g * max(norm, 1.0) for g in grads]
    return [old + new for old, new in zip(total, whole, strict=True)] if total else whole


def _row(
    place: Place,
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
        gains.append(-descent / (len(others) * place.length) * n / (n - 1))
        slope_CN.append(torch.cat([moved(trainer, delta, batch)[1] for batch in held_out]))
    stacked_CN = torch.stack(slope_CN) / len(held_out) ** 0.5
    parts = [batch.rows(_spread(len(batch), place.num_own)) for batch in own]
    return {
        "gain": gains,
        "kl_own": [moved(trainer, d, part)[0] for d, part in zip(deltas, parts, strict=True)],
        "gram": (stacked_CN @ stacked_CN.mT).tolist(),
    }


def _parameters(trainer: Trainer) -> list[nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def _spread(count: int, number: int | None) -> Tensor:
    """Return so many rows of a batch, evenly spread over its prompts."""
    return torch.arange(count) if number is None else judges(count, number)


def crossed(place: Place, folder: Path) -> dict[str, Any]:
    """Return AdamW's last direction with one method's average and another's average square."""
    found = trainers(place, folder)
    reinforce = found["reinforce"]
    sampled, held_out, n = _sampled(reinforce, place)
    made = {m: [[gradient(found[m], b) for b in chain] for chain in sampled] for m in CROSSED}
    sums = []
    for chain in made["reinforce"]:
        total: Direction = []
        for grads, norm in chain:
            total = _added(total, grads, norm)
        sums.append(total)
    rows = {}
    for first, second in itertools.product(CROSSED, repeat=2):
        deltas = [
            _adam([g for g, _ in one], [g for g, _ in other])
            for one, other in zip(made[first], made[second], strict=True)
        ]
        last = [chain[-1] for chain in sampled]
        rows[f"{first}, {second}"] = _row(place, reinforce, deltas, sums, last, held_out, n)
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
    made = {key: place for key, place in PLACES.items() if "rows" in results.get(key, {})}
    for machine, date in sorted({(results[key]["machine"], results[key]["date"]) for key in made}):
        yield f"{machine}; {date}."
    for key, place in made.items():
        for step in place.measured:
            names = {
                f"{method}, {name}, {step}": f"{method}, {name}"
                for name, method in itertools.product(place.optimizers, place.methods)
                if step > 1 or "with" not in name
            }
            yield f"{place.title}, batch {step} of a chain, {place.chains} chains:"
            yield "\n".join(lines(results[key]["rows"], names, f"reinforce, adamw, {step}"))
    for key, place in made.items():
        if place.crossed:
            names = {
                f"{first}, {second}": f"{first} over the root of {second}'s squares"
                for first, second in itertools.product(CROSSED, repeat=2)
            }
            yield f"{place.title}, AdamW's two averages apart, batch {place.length} of a chain:"
            yield "\n".join(lines(results[key]["crossed"], names, "reinforce, reinforce"))


def plot(results: Mapping[str, Any]) -> None:
    """Draw what a step's direction is worth, by optimizer and method."""
    made = [(results[key]["rows"], place) for key, place in PLACES.items() if key in results]
    shown = [[name for name in place.optimizers if _is_shown(name)] for _, place in made]
    figure, panels = plt.subplots(
        *(1, len(made)),
        figsize=(9, 3.4),
        layout="constrained",
        width_ratios=[len(own) for own in shown],
        squeeze=False,
    )
    methods = max((place.methods for _, place in made), key=len)
    looks = dict(zip(methods, ("#6b7280", "#0072b2", "#d55e00"), strict=True))
    for panel, own, (rows, place) in zip(panels[0], shown, made, strict=True):
        step = place.measured[-1]
        for number, method in enumerate(place.methods):
            found = [described(rows[f"{method}, {name}, {step}"])["efficiency"] for name in own]
            means = [estimated(values) for values in found]
            at = [column + 0.2 * (number - 1) for column in range(len(own))]
            errors = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            panel.errorbar(
                at, [m.value for m in means], errors, fmt="o", color=looks[method], label=method
            )
        panel.set_xticks(range(len(own)), [name.replace(" with", "\nwith") for name in own])
        panel.set_title(place.short, fontsize=10)
        panel.set(xlim=(-0.6, len(own) - 0.4), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set(ylabel="reward gained by sqrt(nat)")
    panels[0, 0].legend(frameon=False, loc="lower right")
    figure.savefig(FIGURE, metadata={"Date": None})


def _is_shown(optimizer: str) -> bool:
    return optimizer != "sgd" and "without" not in optimizer


def read() -> dict[str, Any]:
    """Return what was measured so far, by the policy."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", nargs="*", help=f"of {', '.join(PLACES)}; all of them if none")
    options = parser.parse_args()
    if unknown := set(options.place) - set(PLACES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(PLACES)}")
    torch.set_num_threads(1)
    for key in options.place or PLACES:
        for part, measure in {"rows": measured, "crossed": crossed}.items():
            found = read().get(key, {})
            if part in found or (part == "crossed" and not PLACES[key].crossed):
                continue
            start = time.process_time()
            with tempfile.TemporaryDirectory() as name:
                found[part] = measure(PLACES[key], Path(name))
            found |= stamp()
            found[f"seconds_{part}"] = round(time.process_time() - start, 1)
            RESULTS.write_text(json.dumps(read() | {key: found}) + "\n", encoding="utf-8")
    results = read()
    text = "\n\n".join(tables(results))
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "proxstep"}):
        plot(results)
    Console().out(text, highlight=False)


if __name__ == "__main__":
    main()

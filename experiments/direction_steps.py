"""The measurements of directions.py: steps at a fixed policy, and what they do.

Legend for shape suffixes: C chains, P prompts that were held out, B sequences, T token positions,
N all tokens of some sequences.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from experiments.shared import batches, trainer_of
from torch import nn

from proxstep.budget.prediction import judges, slopes
from proxstep.training.batch import Batch
from proxstep.training.optimizers import make_optimizer
from proxstep.training.rollout import Completions, Cut, completion_log_probs
from proxstep.training.trainer import Trainer
from proxstep.typing import Float, Tensor

ROOT = Path(__file__).parents[1]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "learning_rate": 1.0},
    "sgd with momentum": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.9},
    "adamw": {"name": "adamw", "learning_rate": 1e-2},
    "muon": {"name": "muon", "learning_rate": 1e-2},
}
"""Rates do not matter here, so long as a step is far above the weights' rounding."""
CROSSED = ("reinforce", "isopo")
Direction = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A task and a policy, and what is measured there.

    Attributes:
        title: What stands over its table.
        short: What stands over its panel of the figure.
        recipe: The task, the model and the batches.
        keys: Recipe keys that are set otherwise.
        steps_before: Steps of REINFORCE that the policy has behind it.
        chains: How many of them.
        length: Batches of a chain.
        num_held_out: Batches on which divergences are measured.
        num_own: Completions of a step's own batch on which its divergence is measured; None: all.
        methods: Rules whose gradients are taken.
        optimizers: Names in `OPTIMIZERS`.
        crossed: Whether AdamW's two averages are taken apart as well.
    """

    title: str
    short: str
    recipe: Path
    keys: Mapping[str, str | float] = field(default_factory=dict)
    steps_before: int = 0
    chains: int = 8
    length: int = 20
    num_held_out: int = 4
    num_own: int | None = None
    methods: tuple[str, ...] = ("reinforce", "isopo", "isopo-euclidean")
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    crossed: bool = False

    def settings(self) -> dict[str, Any]:
        """Return all that decides the figures."""
        given = asdict(self) | {"recipe": str(self.recipe.relative_to(ROOT))}
        return json.loads(
            json.dumps({k: v for k, v in given.items() if k not in {"title", "short"}})
        )


SUMS = Place(
    title="`sums`, the initial policy",
    short="sums, initial",
    recipe=ROOT / "experiments" / "truth" / "drift-fisher" / "plan.yaml",
    keys={"optimizer.learning_rate": 4e-5},
    crossed=True,
)
PLACES = {
    "sums": SUMS,
    "products": Place(
        title="`products`, the initial policy",
        short="products, initial",
        recipe=ROOT / "recipes" / "worked.yaml",
        keys={"task.name": "products"},
        methods=CROSSED,
        optimizers=("sgd with momentum", "adamw"),
    ),
    "stories": Place(
        title="SmolLM2-135M-Instruct on `stories`, after 3 rollouts",
        short="SmolLM2 on stories,\nafter 3 rollouts",
        recipe=ROOT / "recipes" / "smollm2.yaml",
        steps_before=3,
        chains=5,
        length=8,
        num_held_out=1,
        num_own=12,
        methods=CROSSED,
        optimizers=("sgd with momentum", "adamw"),
    ),
}
"""Long additions, then another task, and a pretrained model."""


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


def moved(trainer: Trainer, delta: Direction, batch: Batch) -> dict[int, Float[Tensor, " n"]]:
    """Return a direction's slope at each token of each prompt's completions."""
    direction = dict(zip(_parameters(trainer), delta, strict=True))
    found: dict[int, list[Tensor]] = {}
    for part in batch.microbatches(trainer.recipe.update):
        completions = part.completions
        response_BT = completions.response_BT[:, 1:]

        def log_probs(
            completions: Completions = completions, response_BT: Tensor = response_BT
        ) -> tuple[Tensor, Tensor]:
            return completion_log_probs(trainer.model, completions, 1.0, Cut()), response_BT

        _, slope_BT, _ = slopes(trainer.model, log_probs, direction)
        for group, slope_T, response_T in zip(
            part.group_B.tolist(), slope_BT.double(), response_BT, strict=True
        ):
            found.setdefault(group, []).append(slope_T[response_T])
    return {group: torch.cat(parts) for group, parts in found.items()}


def measured(place: Place, folder: Path) -> dict[str, Any]:
    """Return what the chains' last directions are, by method and optimizer."""
    found = trainers(place, folder)
    sampled, held_out = _sampled(found["reinforce"], place)
    rows: dict[str, dict[str, Any]] = {}
    sums: list[Direction] = []
    for method, trainer in found.items():
        deltas: dict[str, list[Direction]] = {name: [] for name in place.optimizers}
        for chain in sampled:
            proposers = {name: Proposer(trainer, OPTIMIZERS[name]) for name in place.optimizers}
            total: Direction = []
            last: dict[str, Direction] = {}
            for batch in chain:
                grads, norm = gradient(trainer, batch)
                if method == "reinforce":
                    total = _added(total, grads, norm)
                last = {name: proposer.step(grads) for name, proposer in proposers.items()}
            for name, delta in last.items():
                deltas[name].append(delta)
            if method == "reinforce":
                sums.append(total)
        for name, own in deltas.items():
            rows[f"{method}, {name}"] = _row(place, trainer, own, sums, sampled, held_out)
    return rows


def _sampled(trainer: Trainer, place: Place) -> tuple[list[list[Batch]], list[Batch]]:
    """Return the chains' batches, and those held out."""
    chained = place.chains * place.length
    sampled = list(batches(trainer, range(1000, 1000 + chained + place.num_held_out)))
    chains = [sampled[i : i + place.length] for i in range(0, chained, place.length)]
    return chains, sampled[chained:]


def _added(total: Direction, grads: Direction, norm: float) -> Direction:
    """Return a sum of gradients and one more, as it was before clipping."""
    whole = [g * max(norm, 1.0) for g in grads]
    return [old + new for old, new in zip(total, whole, strict=True)] if total else whole


def _row(
    place: Place,
    trainer: Trainer,
    deltas: Sequence[Direction],
    sums: Sequence[Direction],
    chains: Sequence[Sequence[Batch]],
    held_out: Sequence[Batch],
) -> dict[str, Any]:
    """Return the gains CC by the chain of grad J, the grams PCC of slopes, and own divergences."""
    # A group's mean is of all its rewards, the completion's own too: hence n / (n - 1).
    n = trainer.recipe.rollout.num_generations
    factor = n / (n - 1) / place.length
    gains_CC = [[-factor * _inner(delta, total) for total in sums] for delta in deltas]
    slopes_C = [[moved(trainer, delta, batch) for batch in held_out] for delta in deltas]
    grams_PCC = []
    for number, batch in enumerate(held_out):
        for group, size in zip(*batch.group_B.unique(return_counts=True), strict=True):
            slope_CN = torch.stack([of_batch[number][int(group)] for of_batch in slopes_C])
            grams_PCC.append((slope_CN @ slope_CN.mT / (2 * int(size))).tolist())
    own = []
    for delta, chain in zip(deltas, chains, strict=True):
        batch = chain[-1]
        part = batch.rows(judges(len(batch), place.num_own or len(batch)))
        slope_N = torch.cat(list(moved(trainer, delta, part).values()))
        own.append(float(slope_N.square().sum()) / (2 * len(part)))
    return {"gains": _rounded(gains_CC), "grams": _rounded(grams_PCC), "own": _rounded(own)}


def _rounded(values: Any) -> Any:
    return [_rounded(own) for own in values] if isinstance(values, list) else float(f"{values:.5g}")


def _inner(first: Direction, second: Direction) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))


def _parameters(trainer: Trainer) -> list[nn.Parameter]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def crossed(place: Place, folder: Path) -> dict[str, Any]:
    """Return AdamW's last direction with one method's average and another's average square."""
    found = trainers(place, folder)
    reinforce = found["reinforce"]
    sampled, held_out = _sampled(reinforce, place)
    made = {m: [[gradient(found[m], b) for b in chain] for chain in sampled] for m in CROSSED}
    sums = [
        reduce(lambda total, one: _added(total, *one), chain, []) for chain in made["reinforce"]
    ]
    rows = {}
    for first, second in itertools.product(CROSSED, repeat=2):
        deltas = [
            _adam([g for g, _ in one], [g for g, _ in other])
            for one, other in zip(made[first], made[second], strict=True)
        ]
        rows[f"{first}, {second}"] = _row(place, reinforce, deltas, sums, sampled, held_out)
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

"""Does a KL budget for each layer do anything that a budget for the whole step does not?

    python experiments/layer_budgets.py                  # what layer_budgets/results.json lacks
    python experiments/layer_budgets.py --seconds 500    # no new run after so many seconds

The runs of kl_budget.py with a budget of 0.03 nats per completion: REINFORCE on arithmetic with the
embedded model, 15 steps. Each step's KL divergence is split over the model's blocks, exactly to
second order: 1/2 mean_b sum_t <grad log pi_bt, Delta_l>^2, Delta_l being the step of block l alone,
by forward-mode derivatives on the completions that judge the step. With "capped" a block whose part
is more than twice the blocks' mean is scaled down to that, before the whole step gets its budget.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.kl_budget import BUDGET, stamp, trained

from proxstep.budget.prediction import LogProbs, quadratic_kl, slopes
from proxstep.training import judging
from proxstep.training.trainer import Trainer

RESULTS = Path(__file__).with_suffix("") / "results.json"
LIMIT = 2.0
RATES = {"adamw": (1e-3, 3e-3), "sgd": (0.1, 0.3), "muon": (1e-3, 3e-3)}


class ByBlock(torch.optim.Optimizer):
    """An optimizer that measures its steps by block, and caps those of single blocks.

    Attributes:
        judges: Scores the completions that judge the next step.
        steps: Of each step, every block's part of the KL divergence in nats, and what the whole
            step has.
    """

    def __init__(self, inner: torch.optim.Optimizer, model: nn.Module, *, capped: bool) -> None:
        self.inner, self.model, self.capped = inner, model, capped
        self.judges: LogProbs | None = None
        self.steps: list[dict[str, Any]] = []
        self.blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            parts = name.split(".")  # model.layers.0.mlp..., model.embed_tokens.weight
            block = ".".join(parts[1:3]) if parts[1] == "layers" else parts[1]
            self.blocks.setdefault(block, []).append(parameter)
        super().__init__(inner.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take the inner optimizer's step, and what is left of it under the cap."""
        del closure
        assert self.judges is not None
        before = {p: p.detach().clone() for block in self.blocks.values() for p in block}
        with torch.enable_grad():
            self.inner.step()
        delta = {p: p.detach() - old for p, old in before.items()}
        for parameter, old in before.items():
            parameter.copy_(old)
        parts = {
            name: self._kl(self.judges, {p: delta[p] for p in block})
            for name, block in self.blocks.items()
        }
        limit = LIMIT * statistics.mean(parts.values())
        for name, block in self.blocks.items():
            share = min(1.0, (limit / parts[name]) ** 0.5) if self.capped and limit else 1.0
            for parameter in block:
                parameter.add_(delta[parameter], alpha=share)
        self.steps.append({"parts": parts, "whole": self._whole(self.judges, before, delta)})

    def _whole(self, judges: LogProbs, before: Any, delta: Any) -> float:
        placed = {p: p.detach().clone() for p in before}
        for parameter, old in before.items():
            parameter.copy_(old)
        whole = self._kl(judges, delta)
        for parameter, new in placed.items():
            parameter.copy_(new)
        return whole

    def _kl(self, judges: LogProbs, direction: Any) -> float:
        _, slope_BT, response_BT = slopes(self.model, judges, direction)
        return quadratic_kl(slope_BT, response_BT).mean().item()


@contextlib.contextmanager
def by_block(found: list[ByBlock], *, capped: bool) -> Iterator[None]:
    """Let a run's optimizer measure by block, under its budget."""
    with_budget, step = judging.with_budget, Trainer._optimizer_step

    def wrapped(section: Any, optimizer: Any, model: Any, note: Any) -> Any:
        found.append(ByBlock(optimizer, model, capped=capped))
        return with_budget(section, found[-1], model, note)

    def stepped(self: Trainer, losses: Any, minibatch: Any) -> Any:
        found[-1].judges = judging.judged(self.recipe, self.model, minibatch)
        return step(self, losses, minibatch)

    with (
        mock.patch("proxstep.training.trainer.with_budget", wrapped),
        mock.patch.object(Trainer, "_optimizer_step", stepped),
    ):
        yield


def run(optimizer: str, rate: float, capped: bool, seed: int) -> dict[str, Any]:
    """Train once; return the score and every step by block."""
    found: list[ByBlock] = []
    begun = time.process_time()
    with by_block(found, capped=capped):
        records = trained(optimizer, rate, seed, {"update.kl_budget": BUDGET}, "arithmetic")
    return {
        **{"optimizer": optimizer, "learning_rate": rate, "capped": capped, "seed": seed},
        **{"first_score": records[0]["score"], "score": records[-1]["score"]},
        "processor_seconds": round(time.process_time() - begun, 1),
        "steps": [
            {
                "parts": {name: float(f"{part:.4g}") for name, part in each["parts"].items()},
                "whole": float(f"{each['whole']:.4g}"),
            }
            for each in found[-1].steps
        ],
        **stamp(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return scores, the largest block's share and how parts add up, by optimizer and rate."""
    lines = [
        "| optimizer | rate | scores without | scores with a cap | largest share, median (90 %) | "
        "steps with a block above the cap | whole over sum of parts |",
        "|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(results, key=lambda r: (r["optimizer"], r["learning_rate"], r["seed"]))
    for key, group in itertools.groupby(ordered, lambda r: (r["optimizer"], r["learning_rate"])):
        runs = list(group)
        scores = [
            ", ".join(f"{r['score']:.3f}" for r in runs if r["capped"] == capped)
            for capped in (False, True)
        ]
        shares, above, ratios = [], [], []
        for step in (step for r in runs if not r["capped"] for step in r["steps"]):
            parts = [*step["parts"].values()]
            shares.append(max(parts) / sum(parts))
            above.append(max(parts) > LIMIT * statistics.mean(parts))
            ratios.append(step["whole"] / sum(parts))
        shares.sort()
        cells = [
            *(key[0], f"{key[1]:g}", *scores),
            f"{statistics.median(shares):.2f} ({shares[int(0.9 * len(shares))]:.2f})",
            f"{statistics.mean(above):.0%}",
            f"{statistics.median(ratios):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written() -> list[dict[str, Any]]:
    """Return the runs that are there."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def main() -> None:
    """Run what is missing, write after every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=1e9, help="no new run after that")
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    begin, console = time.monotonic(), Console()
    names = ("optimizer", "learning_rate", "capped", "seed")
    for seed, optimizer in itertools.product(options.seeds, RATES):
        for rate, capped in itertools.product(RATES[optimizer], (False, True)):
            done = {tuple(r[name] for name in names) for r in written()}
            if (
                time.monotonic() - begin > options.seconds
                or (optimizer, rate, capped, seed) in done
            ):
                continue
            made = run(optimizer, rate, capped, seed)
            lines = ",\n".join(json.dumps(result) for result in [*written(), made])
            RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            console.print(*(made[name] for name in (*names, "score", "processor_seconds")))
    console.print(table(written()), soft_wrap=True)


if __name__ == "__main__":
    main()

"""What it costs to know how far a step moves the policy: time of an update over plain REINFORCE's.

    python benchmarks/kl_budget.py
    python benchmarks/kl_budget.py --json benchmarks/baselines/kl-budget-cpu.json

An update is forward and backward of all microbatches, of 8 sequences each, and AdamW's step. The
contestants alternate with the plain one in the same run, as in overhead.py; the peak of the second
update, over what is held before it, comes from a process for each, as in memory.py. The first three
judge the step on as many sequences as a trainer does by default:

- predicted, corrected: `KlBudget` with these controls.
- slopes: exact derivatives of the log-probabilities in the step's direction (`slopes`).
- backward: <g_t, direction a_t> at all positions of every layer within the backward pass, by the
  hooks of `Isopo` (its PROMA rule needs that product, and its projection is counted too).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import CHILD, peak, reset_peak
from benchmarks.overhead import ratios_to
from benchmarks.settings import DTYPES, add_options, prepare, shape_of, write_report
from benchmarks.workload import Batch, Shape, build_model, completion_log_probs, draw_batch, twin_of
from proxstep import PRESETS, Isopo, KlBudget
from proxstep.budget.prediction import judges, slopes
from proxstep.isopo.hooks import uses
from proxstep.logprobs.tokens import token_log_probs
from proxstep.typing import Tensor

MICROBATCH = 8
RATE = 1e-6

Update = Callable[[], None]


def accumulate(model: nn.Module, batch: Batch) -> None:
    """Accumulate the policy gradient, a microbatch at a time."""
    model.zero_grad()
    for rows in torch.arange(len(batch.token_BT)).split(MICROBATCH):
        log_prob_B = completion_log_probs(model, batch.token_BT[rows], batch.num_prompt)
        (-(batch.coefficient_B[rows] * log_prob_B).sum()).backward()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all rows."""
    return torch.optim.AdamW(model.parameters(), lr=RATE)


def scored(model: nn.Module, batch: Batch) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return the function that scores the sequences which judge."""
    row_B = judges(len(batch.token_BT), None)
    token_BT, first = batch.token_BT[row_B], batch.num_prompt

    def log_probs() -> tuple[Tensor, Tensor]:
        kept = token_BT.shape[1] - first + 1
        logits_BTV = model(input_ids=token_BT, use_cache=False, logits_to_keep=kept).logits
        log_prob_BT = token_log_probs(logits_BTV[:, :-1], token_BT[:, first:])
        return log_prob_BT, torch.ones_like(log_prob_BT, dtype=torch.bool)

    return log_probs


def plain(model: nn.Module, batch: Batch) -> Update:
    """Plain REINFORCE."""
    optimizer = adamw(model)

    def update() -> None:
        accumulate(model, batch)
        optimizer.step()

    return update


def budget(control: str) -> Callable[[nn.Module, Batch], Update]:
    """Return the row of a control."""

    def build(model: nn.Module, batch: Batch) -> Update:
        optimizer = KlBudget(adamw(model), model, 1e3, control=control)
        log_probs = scored(model, batch)

        def update() -> None:
            accumulate(model, batch)
            optimizer.step(log_probs)

        return update

    return build


def exact(model: nn.Module, batch: Batch) -> Update:
    """Exact derivatives in the step's direction."""
    optimizer, log_probs = adamw(model), scored(model, batch)
    parameters = list(model.parameters())

    def update() -> None:
        accumulate(model, batch)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        with torch.no_grad():
            delta = [p - old for p, old in zip(parameters, before, strict=True)]
        slopes(model, log_probs, dict(zip(parameters, delta, strict=True)))

    return update


def backward(model: nn.Module, batch: Batch) -> Update:
    """The product within the backward pass, in a direction that is always the same."""
    optimizer, isopo = adamw(model), Isopo(model, PRESETS["proma"])
    direction = {key: torch.randn_like(parameter) for key, parameter in uses(isopo._modules)}

    def update() -> None:
        model.zero_grad()
        for rows in torch.arange(len(batch.token_BT)).split(MICROBATCH):
            ids = batch.sequence_BT[: len(rows)]
            isopo._running.update(direction)
            with isopo.microbatch(ids, batch.coefficient_B[rows]) as microbatch:
                log_prob_B = completion_log_probs(model, batch.token_BT[rows], batch.num_prompt)
                microbatch.objective(log_prob_B).backward()
        optimizer.step()
        isopo.step()

    return update


ROWS: dict[str, Callable[[nn.Module, Batch], Update]] = {
    "reinforce": plain,
    "predicted": budget("predicted"),
    "corrected": budget("corrected"),
    "slopes": exact,
    "backward": backward,
}


def growth_bytes(name: str, shape: Shape, batch: Batch, arguments: argparse.Namespace) -> int:
    """Return the most that the second update holds, on top of what is there before it."""
    model = build_model(shape, arguments.device, DTYPES[arguments.dtype])
    update = ROWS[name](model, batch)
    update()
    before = reset_peak(arguments.device)
    update()
    return peak(arguments.device) - before


def growth_in_child(name: str) -> int:
    """Return `growth_bytes`, measured in a process of its own with the same options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(command, env=os.environ | CHILD, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, ROWS)
    parser.add_argument("--hidden-size", type=int, default=512, help="where --shape is not given")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    parser.set_defaults(num_sequences=64)
    arguments = parser.parse_args()
    prepare(arguments)
    shape = shape_of(arguments, arguments.hidden_size)
    sizes = (arguments.num_sequences, arguments.length, shape.vocab_size)
    batch, console = draw_batch(*sizes, arguments.device), Console()
    if arguments.child:
        console.out(growth_bytes(arguments.child, shape, batch, arguments))
        return
    names = arguments.rows or list(ROWS)
    # Before this process holds anything: a child's peak begins at its parent's.
    grown = {name: growth_in_child(name) for name in dict.fromkeys(["reinforce", *names])}
    model = build_model(shape, arguments.device, DTYPES[arguments.dtype])
    reference, figures = plain(twin_of(model), batch), []
    reference()
    table = Table("row", "time, ratio", "quartiles", "peak, ratio")
    for name in names:
        update = ROWS[name](twin_of(model), batch)
        update()
        ratios, seconds = ratios_to(reference, update, arguments.repeats, arguments.device)
        lower, median, upper = statistics.quantiles(ratios, n=4)
        memory = grown[name] / grown["reinforce"]
        figures.append(
            {
                "row": name,
                "ratio": median,
                "lower_quartile": lower,
                "upper_quartile": upper,
                "reinforce_seconds": statistics.median(seconds),
                "memory_ratio": memory,
            }
        )
        table.add_row(name, f"{median:.3f}", f"{lower:.3f} to {upper:.3f}", f"{memory:.3f}")
    console.print(table)
    settings = {
        "hidden_size": shape.hidden_size,
        "length": arguments.length,
        "repeats": arguments.repeats,
        "microbatch": MICROBATCH,
        "judges": len(judges(len(batch.token_BT), None)),
        "reinforce_growth_bytes": grown["reinforce"],
    }
    write_report(arguments, settings, figures=figures)


if __name__ == "__main__":
    main()

"""Time of an optimizer step in verl's FSDP2 engine: what ISOPO and OPO add to its plain run.

    make test-verl                                  # once: the environment with verl, .venv-verl
    .venv-verl/bin/python benchmarks/engines_verl.py
    .venv-verl/bin/python benchmarks/engines_verl.py --json figures.json

One process, which is one data-parallel rank, and one thread; verl's defaults otherwise (packed
sequences, activation checkpointing), on the CPU platform of `tests.verl.cpu`. A row's
steps alternate with the plain policy gradient's (gpg) on the same mini-batch; a ratio is a step's
processor time over the mean of the plain steps just before and just after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.verl.verl_case import Case, Rollout, made_engine, quiet, verl_batch

from benchmarks.overhead import ratios_to
from benchmarks.settings import add_options, prepare, shape_of, write_report
from benchmarks.workload import build_model

PLAIN: dict[str, Any] = {"geometry": None}
OPO: dict[str, Any] = {
    "policy_loss": {"loss_mode": "chi2_opo"},
    "loss_agg_mode": "seq-mean-token-mean",
}
ROWS: dict[str, dict[str, Any]] = {
    "reinforce": PLAIN,
    "grpo": PLAIN | {"policy_loss": {"loss_mode": "vanilla"}},
    "opo": PLAIN | OPO,
    "isopo": {"geometry": {"rule": "isopo"}},
    "isopo-figure4": {"geometry": {"rule": "isopo-figure4"}},
    "isopo-natural": {"geometry": {"rule": "isopo-natural"}},
    "isopo+opo": {"geometry": {"rule": "isopo"}, **OPO},
}
"""What of verl's configuration differs; the first is plain REINFORCE, against itself: the noise."""

NUM_GENERATIONS = 8


def draw(num_sequences: int, length: int, vocab_size: int) -> Rollout:
    """Return random responses; the first half of each sequence is prompt."""
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(vocab_size, (num_sequences, length), generator=generator)
    half = length // 2
    responses = list(token_BT[:, half:])
    old = [-3 + 0.1 * torch.randn(len(row), generator=generator) for row in responses]
    return Rollout(
        prompts=list(token_BT[:, :half]),
        responses=responses,
        masks=[torch.ones_like(row) for row in responses],
        old_log_probs=old,
        ref_log_prob=old,
        rewards=torch.randn(num_sequences, generator=generator),
        uids=[str(row // NUM_GENERATIONS) for row in range(num_sequences)],
    )


def stepper(folder: Path, row: dict[str, Any], data: Rollout, size: int) -> Callable[[], None]:
    """Return an optimizer step of an engine of its own."""
    engine, loss = made_engine(Case(str(folder), micro_batch=size, **row))
    advantage_B = data.rewards
    options = {"micro_batch_size_per_gpu": size, "global_batch_size": len(data.uids)}

    def step() -> None:
        batch = verl_batch(data, advantage_B, **options)
        with quiet(), engine.train_mode():
            engine.train_batch(batch, loss)

    step()  # the first is slower
    return step


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every row at every length."""
    shape = shape_of(arguments, arguments.hidden_size)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = build_model(shape, torch.device("cpu"), torch.float32)
        model.save_pretrained(folder)
        for length in arguments.lengths:
            data = draw(arguments.num_sequences, length, shape.vocab_size)
            size = arguments.microbatch_size
            plain = stepper(folder, ROWS["reinforce"], data, size)
            for name in arguments.rows:
                step = stepper(folder, ROWS[name], data, size)
                found, _ = ratios_to(plain, step, arguments.repeats, torch.device("cpu"))
                yield {"row": name, "length": length, "ratio": statistics.quantiles(found, n=4)}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    table = Table(title="an optimizer step over plain REINFORCE's, in verl", box=None)
    for heading in ("row", "length", "ratio", "quartiles"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        lower, median, upper = row["ratio"]
        table.add_row(row["row"], str(row["length"]), f"{median:.3f}", f"{lower:.3f}-{upper:.3f}")
    return table


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Time of an optimizer step in verl's engine.")
    add_options(parser, ROWS)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256], help="of sequences")
    parser.add_argument("--microbatch-size", type=int, default=8, help="sequences at a time")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each row, 2 or more")
    parser.set_defaults(num_sequences=16)
    arguments = parser.parse_args(words)
    arguments.rows = arguments.rows or list(ROWS)
    if arguments.repeats < 2:
        parser.error("--repeats must be 2 or more: a row has quartiles")
    return arguments


def main() -> None:
    """Measure, print, write."""
    arguments, console, rows = options(), Console(width=100), []
    prepare(arguments)
    for row in run(arguments):
        rows.append(row)
        console.print(f"{row['row']}, {row['length']}: {row['ratio'][1]:.3f}")
        settings = {
            "hidden_size": arguments.hidden_size,
            "microbatch_size": arguments.microbatch_size,
            "repeats": arguments.repeats,
        }
        write_report(arguments, settings, rows=rows)
    console.print(table_of(rows))


if __name__ == "__main__":
    main()

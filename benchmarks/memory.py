"""Peak memory of one microbatch above the model's own, over plain REINFORCE's.

    python benchmarks/memory.py --json benchmarks/baselines/memory-cpu.json
    python benchmarks/memory.py --device cuda --dtype bfloat16 --shape qwen3-0.6b --length 1024

Every row runs in a process of its own. On a CPU what grows is the resident set: its peak during two
microbatches, less what was resident before the first, while the allocator returns what is freed at
once. On an accelerator it is the allocated memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.overhead import DEFAULT, verdict
from benchmarks.rows import MAIN_ROWS, ROWS
from benchmarks.settings import DTYPES, add_options, prepare, shape_of, write_report
from benchmarks.workload import build_model, draw_batch, reinforce, untied
from proxstep.errors import ProxstepError

TARGETS = {"p": 1.02, "pqr": 1.25, "natural": 1.25, "euclidean": 1.25, "chunked": 0.3}
"""The ratio to stay below, by class of rule."""

CHILD = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""glibc then returns a freed tensor's pages at once, and the peak is that of living tensors."""

BASELINES = {True: "reinforce", False: "untied-reinforce"}
"""The rows that tied and untied ones are compared with."""


@dataclass(frozen=True)
class Section:
    """Rows that are measured at the same sizes.

    Attributes:
        rows: Names in `ROWS`.
        sizes: What differs from the command line's sizes, by option; None to leave one out.
    """

    rows: tuple[str, ...]
    sizes: dict[str, int | None] = field(default_factory=dict)


CHUNKED = ("chunked-reinforce", "chunked-isopo")
SECTIONS = {
    "rules": Section(tuple(name for name in ROWS if name not in CHUNKED)),
    "chunked head": Section(CHUNKED, {"shape": None, "vocab_size": 32768, "num_layers": 0}),
}
"""What is measured, by title."""


def growth_bytes(arguments: argparse.Namespace) -> int:
    """Return how much two microbatches of the row --child hold at most, on top of the model."""
    row, device = ROWS[arguments.child], arguments.device
    shape = shape_of(arguments, arguments.hidden_size)
    model = build_model(shape, device, DTYPES[arguments.dtype])
    model = model if row.tied else untied(model)
    # Libraries load code and reserve buffers at their first use: a few tokens' worth comes first.
    reinforce(model, draw_batch(2, 8, shape.vocab_size, device))
    model.zero_grad()
    batch = draw_batch(arguments.num_sequences, arguments.length, shape.vocab_size, device)
    step = row.build(model, batch, arguments.samples)
    before = reset_peak(device)
    for _ in range(2):
        step()
    return peak(device) - before


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far, and return what is held now, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise ProxstepError(
            "the peak of the resident set cannot be reset here: memory on a CPU is measured on "
            "Linux, where /proc/self/clear_refs can be written"
        ) from error
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: torch.device) -> int:
    """Return the most that was held since `reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth_in_child(arguments: argparse.Namespace, name: str, section: Section) -> int | None:
    """Return a row's growth, measured in a process of its own; None if it ran out of memory."""
    words = ["--child", name]
    for option in ("num_layers", "vocab_size", "num_sequences", "device", "dtype", "shape"):
        value = section.sizes.get(option, getattr(arguments, option))
        words += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    for option in ("hidden_size", "length", "samples"):
        words += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=os.environ | CHILD, capture_output=True, text=True)
    if "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise ProxstepError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, section: Section) -> Iterator[dict[str, Any]]:
    """Measure a section's rows, the baselines that they need first."""
    names = [name for name in section.rows if name in arguments.rows]
    baseline: dict[bool, int | None] = {}
    for name in names:
        row = ROWS[name]
        if row.tied not in baseline:
            baseline[row.tied] = growth_in_child(arguments, BASELINES[row.tied], section)
        plain = baseline[row.tied]
        grown = growth_in_child(arguments, name, section)
        yield {
            "row": name,
            "growth_bytes": grown,
            "reinforce_growth_bytes": plain,
            "ratio": grown / plain if grown is not None and plain else None,
            "target": TARGETS.get(row.kind) if row.kind else None,
        }


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return a section as a table."""
    table = Table(title=f"{title}: peak memory over plain REINFORCE's, less the model", box=None)
    for heading in ("row", "MiB", "ratio", "target", ""):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for row in rows:
        cells = [row["row"], "out of memory"]
        if row["ratio"] is not None:
            target = "" if row["target"] is None else f"{row['target']:.2f}"
            cells[1:] = [f"{row['growth_bytes'] / 2**20:.0f}", f"{row['ratio']:.3f}", target]
            cells += [verdict(row["ratio"], row["target"])]
        table.add_row(*cells)
    return table


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Peak memory of a microbatch over plain REINFORCE's."
    )
    add_options(parser)
    parser.add_argument("--hidden-size", type=int, default=512, help="where --shape is not given")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument(
        "--samples", type=int, default=DEFAULT, help="positions of the Fisher norm, K"
    )
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.rows = arguments.rows or MAIN_ROWS
    return arguments


def main() -> None:
    """Measure, print, write."""
    arguments, console, sections = options(), Console(), {}
    try:
        prepare(arguments)
        if arguments.child:
            console.out(growth_bytes(arguments))
            return
        settings = {
            "hidden_size": shape_of(arguments, arguments.hidden_size).hidden_size,
            "length": arguments.length,
            "samples": arguments.samples,
        }
        for title, section in SECTIONS.items():
            sections[title] = []
            for row in measure(arguments, section):
                sections[title].append(row)
                write_report(arguments, settings, sections=sections)
            console.print(table_of(title, sections[title]))
    except ProxstepError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

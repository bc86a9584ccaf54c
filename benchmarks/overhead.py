"""Time of one microbatch (forward and backward) over one of plain REINFORCE, in the same run.

    python benchmarks/overhead.py                    # a small grid, a few minutes on one core
    python benchmarks/overhead.py --full --json benchmarks/baselines/overhead-cpu.json
    python benchmarks/overhead.py --shape smollm2-135m --lengths 150 --rows isopo isopo-natural
    python benchmarks/overhead.py --shape embedded --num-sequences 256 --lengths 14
    python benchmarks/overhead.py --device cuda --dtype bfloat16 --shape qwen3-0.6b

One process, one thread. A contestant's microbatches alternate with plain REINFORCE's on the same
parameters; each is divided by the mean of the plain ones just before and just after it, and a row
is the median of these ratios with their quartiles. The first row is plain REINFORCE against itself:
the noise. On a CPU processor time is taken, so that other work on the machine counts less; on an
accelerator peak memory is compared as well.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rows import MAIN_ROWS, ROWS, Row, Step
from benchmarks.settings import DTYPES, add_options, prepare, shape_of, write_report
from benchmarks.workload import Batch, build_model, draw_batch, reinforce, twin_of, untied
from proxstep import Isopo
from proxstep.errors import ProxstepError

TARGETS: dict[tuple[str, str], dict[int, float]] = {
    ("cpu", "p"): {128: 1.07, 150: 1.05, 256: 1.05},
    ("cpu", "pqr"): {128: 1.15, 256: 1.10},
    ("cpu", "natural"): {128: 1.12, 150: 1.10, 256: 1.08},
    ("cuda", "p"): {1024: 1.05, 2048: 1.05},
    ("cuda", "pqr"): {1024: 1.20, 2048: 1.20},
    ("cuda", "natural"): {1024: 1.20, 2048: 1.20},
}
"""The ratio to stay below, by device, class of rule and length of the sequences."""

MAX_SAMPLES = {("cpu", "pqr"): 64}
"""The largest K that a target holds for, where there is a limit."""

WARMUP = {"cpu": 1, "cuda": 3}
"""Microbatches that a row runs before any is timed."""

DEFAULT: int = inspect.signature(Isopo).parameters["num_overlap_positions"].default
"""The library's K, which is measured first."""

QUICK = {"hidden_sizes": [512], "lengths": [128], "samples": [DEFAULT], "repeats": 5}
FULL = {"hidden_sizes": [512, 1024], "lengths": [128, 256], "samples": [DEFAULT, 250], "repeats": 9}
PUBLISHED = {"lengths": [512, 1024, 2048], "samples": [DEFAULT], "repeats": 9}
"""The grids: by default, with --full, and with --shape, whose hidden size is its own."""


def target_of(row: Row, device: str, length: int, num_samples: int | None) -> float | None:
    """Return the ratio that a row should stay below, if there is one."""
    if row.kind is None or (num_samples or 0) > MAX_SAMPLES.get((device, row.kind), sys.maxsize):
        return None
    return TARGETS.get((device, row.kind), {}).get(length)


def timed(step: Step, device: torch.device) -> float:
    """Return the seconds of one microbatch: on a CPU those that this process itself computed."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios_to(
    plain: Step, step: Step, repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Return the ratios of a step's times to plain REINFORCE's around them, and the latter."""
    plain_seconds, ratios = [timed(plain, device)], []
    for _ in range(repeats):
        seconds = timed(step, device)
        plain_seconds.append(timed(plain, device))
        ratios.append(2 * seconds / (plain_seconds[-2] + plain_seconds[-1]))
    return ratios, plain_seconds


def warm_up(step: Step, device: torch.device) -> int | None:
    """Run a step until it is as fast as it gets.

    Returns:
        The most memory that was allocated on an accelerator, the model's own included, in bytes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP[device.type]):
        step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def measure(
    row: Row, model: Qwen3ForCausalLM, batch: Batch, num_samples: int | None, repeats: int
) -> dict[str, float | None]:
    """Return a row's ratio to plain REINFORCE with its quartiles."""
    device = batch.token_BT.device

    def plain() -> None:
        reinforce(model, batch)

    plain_peak = warm_up(plain, device)
    step = row.build(twin_of(model), batch, num_samples)
    peak = warm_up(step, device)
    ratios, plain_seconds = ratios_to(plain, step, repeats, device)
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "reinforce_seconds": statistics.median(plain_seconds),
        "peak_memory_ratio": peak / plain_peak if peak is not None and plain_peak else None,
    }


def cases(arguments: argparse.Namespace) -> Iterator[tuple[int, int, str, int | None]]:
    """Return every (hidden size, length, row, K): K varies only where it matters."""
    for hidden_size, length in itertools.product(arguments.hidden_sizes, arguments.lengths):
        for name in arguments.rows:
            for num_samples in arguments.samples if ROWS[name].sampled else [None]:
                yield hidden_size, length, name, num_samples


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every case."""
    size, models = None, {}
    for hidden_size, length, name, num_samples in cases(arguments):
        row, shape = ROWS[name], shape_of(arguments, hidden_size)
        if size != hidden_size:
            tied = build_model(shape, arguments.device, DTYPES[arguments.dtype])
            size, models = hidden_size, {True: tied, False: untied(tied)}
        batch = draw_batch(arguments.num_sequences, length, shape.vocab_size, arguments.device)
        case = {
            "row": name,
            "hidden_size": shape.hidden_size,
            "length": length,
            "num_samples": num_samples,
            "target": target_of(row, arguments.device.type, length, num_samples),
        }
        yield case | attempt(row, models[row.tied], batch, num_samples, arguments.repeats)
        gc.collect()
        if arguments.device.type == "cuda":
            torch.cuda.empty_cache()


def attempt(
    row: Row, model: Qwen3ForCausalLM, batch: Batch, num_samples: int | None, repeats: int
) -> dict[str, Any]:
    """Return what `measure` does, or the failure: too little memory, or a library that cannot."""
    try:
        return measure(row, model, batch, num_samples, repeats)
    except torch.cuda.OutOfMemoryError:
        return {"failure": "out of memory"}
    except RuntimeError as error:
        if row.kind is not None:
            raise
        return {"failure": str(error).splitlines()[0]}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    table = Table(title="forward + backward over plain REINFORCE's", box=None)
    table.add_column("row", no_wrap=True)
    for heading in ("d", "L", "K", "ratio", "quartiles", "memory", "target", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row["row"], row["hidden_size"], row["length"], row["num_samples"]]
        if "failure" in row:
            cells += [row["failure"]]
        else:
            cells += [
                f"{row['ratio']:.3f}",
                f"{row['lower_quartile']:.3f}-{row['upper_quartile']:.3f}",
                row.get("peak_memory_ratio"),
                row["target"],
                verdict(row["ratio"], row["target"]),
            ]
        table.add_row(*(_text(cell) for cell in cells))
    return table


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}"
    return "" if cell is None else str(cell)


def verdict(ratio: float, target: float | None) -> str:
    """Return what the table says of a target."""
    if target is None:
        return ""
    return "[green]met[/green]" if ratio <= target else "[red]missed[/red]"


def print_operators(arguments: argparse.Namespace, console: Console) -> None:
    """Print the operators that a row and plain REINFORCE spend their time in."""
    device, row = arguments.device, ROWS[arguments.profile]
    shape = shape_of(arguments, arguments.hidden_sizes[0])
    model = build_model(shape, device, DTYPES[arguments.dtype])
    model = model if row.tied else untied(model)
    batch = draw_batch(
        arguments.num_sequences, arguments.lengths[0], shape.vocab_size, arguments.device
    )
    order, activities = "self_cpu_time_total", [ProfilerActivity.CPU]
    if device.type == "cuda":
        order, activities = "self_cuda_time_total", [*activities, ProfilerActivity.CUDA]
    for title, step in (
        ("plain REINFORCE", lambda: reinforce(model, batch)),
        (arguments.profile, row.build(twin_of(model), batch, arguments.samples[0])),
    ):
        warm_up(step, device)
        with profile(activities=activities) as profiler:
            timed(step, device)
        console.rule(title)
        console.out(profiler.key_averages().table(sort_by=order, row_limit=20), highlight=False)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options, with the grid filled in."""
    parser = argparse.ArgumentParser(description="Time of a microbatch over plain REINFORCE's.")
    add_options(parser)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", help="where --shape is not given")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens per sequence")
    parser.add_argument("--samples", type=int, nargs="+", help="positions of the Fisher norm, K")
    parser.add_argument("--repeats", type=int, help="pairs of microbatches per row, 2 or more")
    parser.add_argument("--full", action="store_true", help="the whole grid")
    parser.add_argument("--profile", choices=ROWS, help="print this row's operators instead")
    arguments = parser.parse_args(words)
    if arguments.shape and (arguments.hidden_sizes or arguments.full):
        parser.error("--shape has its own sizes: leave --hidden-sizes and --full out")
    grid = FULL if arguments.full else QUICK
    if arguments.shape:
        grid = {"hidden_sizes": [0], **PUBLISHED}
    for name, default in grid.items():
        setattr(arguments, name, getattr(arguments, name) or default)
    if arguments.repeats < 2:
        parser.error("--repeats must be 2 or more: a row has quartiles")
    if not arguments.rows:
        arguments.rows = list(ROWS) if arguments.full else MAIN_ROWS
    return arguments


def main() -> None:
    """Measure, print, write."""
    arguments, console = options(), Console()
    try:
        prepare(arguments)
        if arguments.profile:
            print_operators(arguments, console)
            return
        rows = []
        for row in run(arguments):
            rows.append(row)
            console.print(f"{row['row']}: {row.get('failure') or format(row['ratio'], '.3f')}")
            settings = {"repeats": arguments.repeats}
            write_report(arguments, settings, rows=rows)
        console.print(table_of(rows))
    except ProxstepError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

"""The options that the benchmarks share, and the report that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from experiments.shared import stamp

from benchmarks.rows import ROWS
from benchmarks.workload import SHAPES, Shape, scaled_shape
from proxstep.runs.folder import check_file

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def add_options(parser: argparse.ArgumentParser, rows: Iterable[str] = ROWS) -> None:
    """Add the options that say what is run on what."""
    names = list(rows)
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--shape", choices=SHAPES, help="the sizes of a published model")
    parser.add_argument("--num-layers", type=int, default=4, help="where --shape is not given")
    parser.add_argument("--vocab-size", type=int, default=8192, help="where --shape is not given")
    parser.add_argument("--num-sequences", type=int, default=8, help="of the microbatch")
    parser.add_argument("--device", type=_device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no CUDA device here; use cpu")
    return torch.device(text)


def shape_of(arguments: argparse.Namespace, hidden_size: int) -> Shape:
    """Return the model's sizes: the published ones if --shape was given."""
    if arguments.shape:
        return SHAPES[arguments.shape]
    return scaled_shape(hidden_size, arguments.num_layers, arguments.vocab_size)


def prepare(arguments: argparse.Namespace) -> None:
    """Use one thread, complete the sizes, and find out whether the report can be written."""
    torch.set_num_threads(1)
    if arguments.shape:
        shape = SHAPES[arguments.shape]
        arguments.num_layers, arguments.vocab_size = shape.num_layers, shape.vocab_size
    if arguments.json:
        check_file(arguments.json, "--json")


def write_report(arguments: argparse.Namespace, settings: dict[str, Any], **figures: Any) -> None:
    """Write --json, if it was asked for."""
    if not arguments.json:
        return
    report = {
        **stamp(arguments.device),
        "torch": torch.__version__,
        "settings": {
            "shape": arguments.shape,
            "num_layers": arguments.num_layers,
            "vocab_size": arguments.vocab_size,
            "num_sequences": arguments.num_sequences,
            "device": str(arguments.device),
            "dtype": arguments.dtype,
            **settings,
        },
        **figures,
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

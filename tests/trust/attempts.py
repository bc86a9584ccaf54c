"""A training process that may kill itself, and the comparison of two run folders."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM  # noqa: F401  imported once, by the fork server

from proxstep.runs.checkpoint import checkpoints, latest_checkpoint, load_state
from proxstep.runs.folder import RunFolder
from proxstep.training import lifecycle
from tests.engine import Silent, records, spread_reward, tiny_recipe

FILES = ("samples.jsonl", "diagnostics.jsonl")
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def run(folder: Path, kill: tuple[str, float, float] | None = None) -> int:
    """Begin a run or go on with it, in a process of its own; return its exit code.

    Args:
        folder: The run folder; what else belongs to the run lies beside it.
        kill: ("files", n, seconds) kills it so long after the n-th time that it opened, made,
            renamed or deleted something in the folder; ("seconds", s, 0) after so long.
    """
    process = _context.Process(target=_run, args=(folder, kill))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _run(folder: Path, kill: tuple[str, float, float] | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    count = _count_files(folder, kill)
    began = time.monotonic()
    if kill is not None and kill[0] == "seconds":
        _kill_after(kill[1])
    if RunFolder(folder).status() == "finished":  # it was killed after that
        return
    if checkpoints(folder):
        lifecycle.resume(folder, Silent())
    else:
        lifecycle.train(recipe_in(folder), Silent(), overwrite=True)
    (folder.parent / "measured").write_text(f"{count[0]} {time.monotonic() - began}")


def recipe_in(folder: Path) -> Any:
    """What is trained: everything that has a state of its own, saved after every step."""
    return tiny_recipe(
        folder,
        "isopo",
        steps=6,
        task={**spread_reward(folder.parent), "num_validation": 6},
        geometry={
            "diagnose_every": 2,
            "fisher_denominator": "trailing",
            "overlap_source": "previous_step",
        },
        update={"num_minibatches": 2},
        logging={"checkpoint_every": 1},
    )


def _count_files(folder: Path, kill: tuple[str, float, float] | None) -> list[int]:
    """Count what happens to files of a folder; kill this process when there were enough."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(arguments[0]).startswith(str(folder)):
            count[0] += 1
            if kill is not None and kill[0] == "files" and count[0] == kill[1]:
                _kill_after(kill[2])

    sys.addaudithook(hook)
    return count


def _kill_after(seconds: float) -> None:
    if not seconds:
        os.kill(os.getpid(), signal.SIGKILL)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def differences(first: Path, second: Path) -> list[str]:
    """Return in what two runs differ, but for the time that they took."""
    found = [name for name in FILES if (first / name).read_bytes() != (second / name).read_bytes()]
    rows = [[_timeless(record) for record in records(folder)] for folder in (first, second)]
    found += ["metrics.jsonl"] if rows[0] != rows[1] else []
    states = []
    for folder in (first, second):
        newest = latest_checkpoint(folder)
        state = load_state(newest)
        for name in ("elapsed_seconds", "logs", "recipe"):
            del state[name]
        state["weights"] = (newest / "model.safetensors").read_bytes()
        states.append(state)
    return found + [name for name in states[0] if not _equal(states[0][name], states[1][name])]


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.startswith(("seconds", "elapsed"))}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other

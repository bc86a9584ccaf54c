"""Where a run's metrics go: metrics.jsonl always, and one tracker of the user's choice."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.runs.durable import finite, write_file
from proxstep.runs.schema import FIELDS, unknown_fields
from proxstep.runs.waiting import Waits


class Progress(Waits, Protocol):
    """Shows a run: a terminal, a log, or nothing."""

    def begin(self, recipe: Recipe) -> None:
        """A run begins, or goes on."""

    def note(self, text: str) -> None:
        """Show a line."""

    def record(self, record: Mapping[str, Any]) -> None:
        """One line of metrics was written."""


class MetricsLog:
    """The append-only metrics.jsonl: one line a record, every field of the schema in each.

    Args:
        path: The file; created, or continued.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; what was not measured, or is not finite, is null."""
        unknown = unknown_fields(dict(record))
        if unknown:
            raise KeyError(f"not in proxstep.runs.schema: {', '.join(unknown)}")
        full = {**dict.fromkeys(FIELDS), **record}
        self._file.write(json.dumps(finite(full), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a row that could not be written was an error when it came."""
        with suppress(OSError):
            self._file.close()


def drop_later_steps(path: Path, step: int) -> None:
    """Delete the lines of later steps, and one that a kill cut off, from a file of JSON lines."""
    if path.exists():
        write_file(path, lines_until(path, step))


def lines_until(path: Path, step: int) -> bytes:
    """Return the lines of a file of JSON lines up to the last one of a step.

    Raises:
        ProxstepError: If one of them is damaged.
    """
    lines = path.read_bytes().split(b"\n")
    until = [_step_of(line) <= step for line in lines]
    number = len(lines) - until[::-1].index(True) if any(until) else 0
    if not all(until[:number]):
        raise ProxstepError(
            f"{path}, line {until.index(False) + 1} is damaged: mend it, or move the file away, "
            "and the run goes on without the lines that it had"
        )
    return b"".join(line + b"\n" for line in lines[:number])


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class Tracker:
    """A second destination for the metrics: TensorBoard, trackio, W&B or none.

    Raises:
        ProxstepError: If the tracker's package is not installed.
    """

    def __init__(self, name: str, project: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        self._writer = self._module = None
        if name == "tensorboard":
            self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(
                str(folder)
            )
        elif name != "none":
            self._module = _import(name, name)
            self._module.init(project=project, name=folder.name, config=dict(recipe))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the measured numbers of one record."""
        step = record["step"]
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and math.isfinite(value) and key != "step"
        }
        if self._writer is not None:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        if self._module is not None:
            self._module.log(numbers, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._module is not None:
            self._module.finish()


def check_tracker(name: str) -> None:
    """Fail early where a tracker's package is missing.

    Raises:
        ProxstepError: With the command that installs it.
    """
    if name != "none":
        _import("torch.utils.tensorboard" if name == "tensorboard" else name, name)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ProxstepError(
            f"logging.tracker {package} is not installed: pip install {package}, or set "
            "logging.tracker to none"
        ) from None

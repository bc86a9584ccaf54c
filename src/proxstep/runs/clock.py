"""Wall-clock time of a run and of its phases, and Ctrl-C as a request to stop at a step's end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds since the run began, and seconds by phase since they were last taken.

    Args:
        device: Where the work happens; an accelerator is waited for at the end of a phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before, self._started = 0.0, time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards a phase."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the phases' seconds and their sum, and start over."""
        taken = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        taken["seconds_step"] = sum(self._seconds.values())
        self._seconds = {}
        return taken

    def elapsed(self) -> float:
        """Return the seconds of the run, those of its earlier parts included."""
        return self._before + time.perf_counter() - self._started

    def continue_from(self, seconds: float) -> None:
        """Begin where an earlier part of the run ended."""
        self._before, self._started = seconds, time.perf_counter()


class StopRequest:
    """Whether the run was asked to stop."""

    made = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second Ctrl-C stops at once."""
    stop = StopRequest()

    def request(number: int, frame: Any) -> None:
        del frame
        if stop.made and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.made = True

    try:
        previous = {
            number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread, which handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""The seconds of a step by phase, shown while they last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from proxstep.runs.waiting import UNSEEN, Waits

_PHASES = {
    "rollout": "sampling completions",
    "reward": "grading them",
    "log_probs": "log-probabilities of the old policy",
    "update": "updating the weights",
    "evaluation": "measuring the drift from the initial policy",
}


class Clock:
    """Seconds by phase since they were last taken.

    Args:
        device: Where the work happens; an accelerator is waited for at the end of a phase.
        waits: Shows what a phase is about.
    """

    def __init__(self, device: torch.device, waits: Waits = UNSEEN) -> None:
        self._device, self._waits = device, waits
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        with self._waits.wait(_PHASES.get(name, name), brief=True):
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

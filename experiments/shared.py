"""What several experiments use: initial policies, a silent progress, a row's date and machine."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from proxstep.runs.folder import describe_machine
from proxstep.runs.waiting import UNSEEN

POLICIES = Path(__file__).parent / "policies"
"""The embedded model after its warm-up on a task, in float16. A warm-up ends elsewhere on every
kind of processor; runs from these weights can be put together, whichever machine made them."""


class Quiet:
    """Nobody watches; what is worth knowing goes to the log."""

    begin = record = lambda self, what: None
    wait = UNSEEN.wait

    def note(self, text: str) -> None:
        """Print it."""
        print(text)  # noqa: T201


def words(keys: Mapping[str, Any]) -> list[str]:
    """Return a recipe's keys as a command line has them.

    >>> words({"steps": 3, "evaluation.baselines": False})
    ['--steps', '3', '--evaluation.baselines', 'false']
    """
    return [
        word
        for key, value in keys.items()
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def stamp(device: str | torch.device = "cpu") -> dict[str, str]:
    """Return when and on what a run is made."""
    machine = describe_machine(torch.device(device))
    return {"date": datetime.date.today().isoformat(), "machine": machine}

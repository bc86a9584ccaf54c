"""What several experiments use: initial policies, a silent progress, a row's date and machine."""

from __future__ import annotations

import datetime
from pathlib import Path

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


def stamp(device: str | torch.device = "cpu") -> dict[str, str]:
    """Return when and on what a run is made."""
    machine = describe_machine(torch.device(device))
    return {"date": datetime.date.today().isoformat(), "machine": machine}

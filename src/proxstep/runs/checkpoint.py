"""Checkpoints: what `from_pretrained` loads and the trainer's state, all or nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError

STATE_FILE = "trainer_state.pt"
STATE_KEYS = {
    "step",
    "num_updates",
    "num_sequences",
    "elapsed_seconds",
    "optimizer",
    "schedule",
    "isopo",
    "probe",
}

_OF_GARBAGE = (ValueError, LookupError, TypeError, AssertionError)
"""What torch's unpickler raises besides, for bytes that are no pickle."""


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, tokenizer: Any, state: dict[str, Any]
) -> Path:
    """Write checkpoints/step-N and delete the ones before it.

    The new folder appears under its name only when it is complete, and the old ones go only then.

    Args:
        folder: The run folder.
        step: Rollout steps done.
        model: Saved with save_pretrained (safetensors); adapters alone, where it has them.
        tokenizer: Saved beside it.
        state: Tensors, numbers, strings, and containers of them.

    Returns:
        The checkpoint's folder.
    """
    parent = folder / "checkpoints"
    parent.mkdir(exist_ok=True)
    final = parent / f"step-{step:06d}"
    scratch = parent / f"{final.name}.incomplete"
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)  # type: ignore[operator]
    tokenizer.save_pretrained(scratch)
    torch.save(state, scratch / STATE_FILE)
    if final.exists():
        shutil.rmtree(final)
    os.replace(scratch, final)
    for other in [*checkpoints(folder), *parent.glob("*.incomplete")]:
        if other != final:
            shutil.rmtree(other)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return a run's complete checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step-[0-9]*")
    return sorted(path for path in found if path.name.removeprefix("step-").isdigit())


def latest_checkpoint(folder: Path) -> Path:
    """Return a run's newest checkpoint; of a run of verl, the model that it saved there.

    Raises:
        ProxstepError: If it has none.
    """
    found = checkpoints(folder) or _of_verl(folder)
    if not found:
        raise ProxstepError(
            f"{folder}: no checkpoint there; a run writes one when it ends or is interrupted, and "
            "every logging.checkpoint_every steps"
        )
    return found[-1]


def _of_verl(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("global_step_*/actor/huggingface")
    return sorted(found, key=lambda path: int(path.parts[-3].removeprefix("global_step_")))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state; tensors and plain data only, no code is run.

    Raises:
        ProxstepError: If the file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, *_OF_GARBAGE) as error:
        reason = type(error).__name__
    else:
        if isinstance(state, dict) and set(state) >= STATE_KEYS:
            return state
        reason = "it is not a trainer's state"
    raise ProxstepError(
        f"{path}: cannot be read ({reason}), so the run cannot be continued; the model beside it "
        "may still load, as model.name of a new run"
    )

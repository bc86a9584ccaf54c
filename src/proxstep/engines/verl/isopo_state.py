"""ISOPO's state in verl's checkpoints: one file, since it is the same on all ranks."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from verl.utils.device import get_device_name
from verl.utils.fs import copy_to_local, is_non_local

from proxstep.isopo import Isopo

logger = logging.getLogger(__name__)

STATE_FILE = "proxstep.pt"


def save_state(isopo: Isopo, folder: str, rank: int) -> None:
    """Write the trailing means and carried samples, on rank 0."""
    if rank == 0:
        torch.save(isopo.state_dict(), Path(folder) / STATE_FILE)


def load_state(isopo: Isopo, folder: str, rank: int) -> None:
    """Read what `save_state` wrote, on rank 0, and hand it to all; every rank must call it.

    A checkpoint without it, of another engine, is continued with new trailing means.
    """
    found = [_read(folder) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    content = found[0]
    if content is None:
        logger.warning("ISOPO: %s is not in %s; its trailing means start again", STATE_FILE, folder)
        return
    state = torch.load(io.BytesIO(content), map_location=get_device_name(), weights_only=True)
    isopo.load_state_dict(state)


def _read(folder: str) -> bytes | None:
    place = f"{folder}/{STATE_FILE}"
    path = Path(copy_to_local(place) if is_non_local(folder) else place)
    return path.read_bytes() if path.exists() else None

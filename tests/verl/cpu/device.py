"""What verl asks of `torch.<device>`, for the CPU: `torch.cpu` and the functions that it lacks.

Memory is the process's own, in bytes: what is resident counts as allocated and as reserved.
"""

from __future__ import annotations

import platform
import resource
import sys

import psutil
import torch
from torch.cpu import (
    Event,
    Stream,
    current_device,
    current_stream,
    device_count,
    is_available,
    set_device,
    stream,
    synchronize,
)

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "device_count",
    "empty_cache",
    "get_device_name",
    "get_rng_state",
    "ipc_collect",
    "is_available",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "set_device",
    "set_rng_state",
    "stream",
    "synchronize",
]

get_rng_state = torch.get_rng_state
set_rng_state = torch.set_rng_state
manual_seed = torch.manual_seed
manual_seed_all = torch.manual_seed


def get_device_name() -> str:
    """Return the processor's architecture: verl knows no speed for it, so its MFU reads 0."""
    return platform.machine()


def memory_allocated() -> int:
    """Return the process's resident bytes."""
    return psutil.Process().memory_info().rss


def max_memory_allocated() -> int:
    """Return the most bytes that were resident in the process at any time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return max(peak, memory_allocated())  # the two are counted apart, and lag each other


memory_reserved = memory_allocated
max_memory_reserved = max_memory_allocated


def mem_get_info() -> tuple[int, int]:
    """Return the machine's available and total bytes."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def empty_cache() -> None:
    """Do nothing: the CPU's allocator keeps no cache that could be given back."""


def ipc_collect() -> None:
    """Do nothing: no memory is shared by handle."""

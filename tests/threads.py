"""Ranks that are threads of this process: any number of them, for code that only exchanges."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

SECONDS = 60
"""What one collective may wait."""


class Threads:
    """`torch.distributed` among threads: `all_gather` and `all_gather_object`; groups are ignored.

    Args:
        num_ranks: Their number.

    Attributes:
        sent: What rank 0 has given to collectives.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.sent: list[Any] = []
        self._slots: list[Any] = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=SECONDS)
        self._own = threading.local()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return what the function returns for each rank."""
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(self.num_ranks) as pool:
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "get_world_size", lambda group=None: self.num_ranks)
            patch.setattr(dist, "get_rank", lambda group=None: self._own.rank)
            patch.setattr(dist, "all_gather", self._all_gather)
            patch.setattr(dist, "all_gather_object", self._all_gather_object)
            return list(pool.map(lambda rank: self._on_rank(function, rank), range(self.num_ranks)))

    def _on_rank(self, function: Callable[[int], Any], rank: int) -> Any:
        self._own.rank = rank
        try:
            return function(rank)
        except BaseException:
            self._barrier.abort()  # nobody is to wait for it
            raise

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self._own.rank] = value
        if self._own.rank == 0:
            self.sent.append(value)
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone

    def _all_gather(self, parts: list[Any], value: Any, group: Any = None) -> None:
        del group
        for part, other in zip(parts, self._exchange(value.clone()), strict=True):
            assert (part.shape, part.dtype) == (other.shape, other.dtype), "parts must be equal"
            part.copy_(other)

    def _all_gather_object(self, objects: list[Any], value: Any, group: Any = None) -> None:
        del group
        objects[:] = self._exchange(value)

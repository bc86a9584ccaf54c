"""What the statistics of successive layers share: a workspace, and the last input's Gram."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from proxstep.isopo.forms import MEMORY_BUDGET
from proxstep.typing import Tensor


class Memory:
    """A reused buffer and a cache of one entry per purpose, both empty again after `release`.

    A fresh buffer for every layer would cost more time in page faults than in arithmetic. Layers
    that see the same input (queries, keys and values; gate and up) follow each other in backward,
    so one entry is enough to share its Gram.

    Args:
        budget: Bytes that the statistics of one layer may take at a time.
    """

    def __init__(self, budget: int = MEMORY_BUDGET) -> None:
        self.budget = budget
        self._buffer: Tensor | None = None
        self._shared: dict[str, tuple[tuple[object, ...], object, Any]] = {}

    def buffer(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor that is valid until the next call."""
        size = math.prod(shape)
        old = self._buffer
        fits = old is not None and old.dtype == dtype and old.device == like.device
        if old is None or not fits or old.numel() < size:
            self._buffer = old = None
            self._buffer = old = torch.empty(size, dtype=dtype, device=like.device)
        return old[:size].view(shape)

    def shared(self, purpose: str, of: Tensor, layout: object, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, or what it returned last for the same purpose, tensor and layout.

        The tensor is kept as long as its entry, so that no other one can have its address; and the
        layout, which stands for its microbatch: another one samples other positions.
        """
        key = (of.data_ptr(), of.shape, of.stride(), of._version, id(layout))
        entry = self._shared.get(purpose)
        if entry is None or entry[0] != key:
            self._shared.pop(purpose, None)
            entry = self._shared[purpose] = (key, (of, layout), compute())
        return entry[2]

    def release(self) -> None:
        """Forget both."""
        self._buffer = None
        self._shared.clear()

"""Exponential moving averages over optimizer steps of what the rules damp by."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from proxstep.types import Float, Tensor

Pending = dict[str, dict[str, tuple[Tensor, int]]]
"""The sum of each parameter's moments, and over how many sequences."""


class TrailingMeans:
    """E[x] per parameter and moment: measured during an optimizer step, folded in at its end.

    Within a step the averages stay fixed, so that its microbatches are all treated alike. Every
    sequence of the step counts the same.

    Args:
        decay: Share of the past that is kept at each step. The paper uses 0.9 (figure 7).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._means: dict[str, dict[str, Tensor]] = {}
        self._pending: Pending = {}

    def of(self, key: str) -> Mapping[str, Float[Tensor, ""]]:
        """Return the moments' averages for one parameter; empty before its first step has ended."""
        return self._means.get(key, {})

    def add(self, key: str, moments: Mapping[str, Float[Tensor, " batch"]]) -> None:
        """Measure one microbatch's moments, one value per sequence."""
        pending = self._pending.setdefault(key, {})
        for name, value_B in moments.items():
            total, count = value_B.detach().sum(), value_B.numel()
            if name in pending:
                total, count = pending[name][0] + total, pending[name][1] + count
            pending[name] = (total, count)

    def fold(self, group: dist.ProcessGroup | None = None) -> None:
        """End the optimizer step: fold its measurements into the averages.

        Args:
            group: The ranks over which measurements are averaged, where torch.distributed is
                initialized; None for all. All of them end up with the same averages, whatever each
                of them has measured.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            self._pending = _sum_over_ranks(self._pending, group)
        for key, pending in self._pending.items():
            means = self._means.setdefault(key, {})
            for name, (total, count) in pending.items():
                new = total / count
                means[name] = (
                    self.decay * means[name] + (1 - self.decay) * new if name in means else new
                )
        self._pending = {}

    @property
    def has_pending(self) -> bool:
        """Whether something was measured since the last fold."""
        return bool(self._pending)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages as one flat dictionary, named PARAMETER/MOMENT."""
        return {
            f"{key}/{name}": mean
            for key, means in self._means.items()
            for name, mean in means.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the averages by those of `state_dict` and forget what is pending."""
        self._means, self._pending = {}, {}
        for flat, mean in state.items():
            key, name = flat.rsplit("/", 1)
            self._means.setdefault(key, {})[name] = mean


def _sum_over_ranks(pending: Pending, group: dist.ProcessGroup | None) -> Pending:
    """Return the sums over all ranks, the same numbers in the same order on each of them.

    They are gathered as an object and added here, since a rank may lack what others have measured,
    and a reduction may add in another order on each rank.
    """
    own = {
        (key, name): (total.item(), count, total.dtype)
        for key, moments in pending.items()
        for name, (total, count) in moments.items()
    }
    everyone: list[dict[Any, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    summed: dict[Any, tuple[float, int, torch.dtype]] = {}
    for place, (total, count, dtype) in chain.from_iterable(rank.items() for rank in everyone):
        before, count_before, _ = summed.get(place, (0.0, 0, dtype))
        summed[place] = (before + total, count_before + count, dtype)
    result: Pending = {}
    for (key, name), (total, count, dtype) in summed.items():
        here = pending.get(key, {}).get(name)
        device = None if here is None else here[0].device
        value = torch.tensor(total, dtype=dtype, device=device)
        result.setdefault(key, {})[name] = (value, count)
    return result

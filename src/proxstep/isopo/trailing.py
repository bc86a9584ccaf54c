"""Exponential moving averages over optimizer steps of what the rules damp by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from proxstep.types import Float, Tensor


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
        self._pending: dict[str, dict[str, tuple[Tensor, int]]] = {}

    def of(self, key: str) -> Mapping[str, Float[Tensor, ""]]:
        """Return the moments' averages for one parameter; empty before its first step has ended."""
        return self._means.get(key, {})

    def add(self, key: str, moments: Mapping[str, Float[Tensor, " batch"]]) -> None:
        """Measure one microbatch's moments, one value per sequence."""
        pending = self._pending.setdefault(key, {})
        for name, value_B in moments.items():
            total, count = pending.get(name, (value_B.new_zeros(()), 0))
            pending[name] = (total + value_B.detach().sum(), count + value_B.numel())

    def fold(self, group: dist.ProcessGroup | None = None) -> None:
        """End the optimizer step: fold its measurements into the averages.

        Args:
            group: The ranks whose measurements are averaged, where torch.distributed is
                initialized; None for all. They must have measured the same parameters.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            self._sum_over_ranks(group)
        for key, pending in self._pending.items():
            means = self._means.setdefault(key, {})
            for name, (total, count) in pending.items():
                new = total / count
                means[name] = (
                    self.decay * means[name] + (1 - self.decay) * new if name in means else new
                )
        self._pending.clear()

    def _sum_over_ranks(self, group: dist.ProcessGroup | None) -> None:
        names = [(key, name) for key in sorted(self._pending) for name in self._pending[key]]
        if not names:
            return
        totals = torch.stack([self._pending[key][name][0].double() for key, name in names])
        counts = [float(self._pending[key][name][1]) for key, name in names]
        both = torch.stack([totals, totals.new_tensor(counts)])
        dist.all_reduce(both, group=group)
        for (key, name), total, count in zip(names, both[0], both[1].tolist(), strict=True):
            self._pending[key][name] = (total.to(self._pending[key][name][0].dtype), int(count))

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

"""Means of what a step measured: what it reports, and the averages over steps that rules use."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.typing import Float, Tensor

Pending = dict[str, dict[str, tuple[Tensor, int]]]
"""The sum of each parameter's moments, and over how many sequences."""
Place = tuple[str, str]
"""A parameter and a moment."""


class TrailingMeans:
    """E[x] per parameter and moment: measured during an optimizer step, folded in at its end.

    Within a step the averages stay fixed, so that its microbatches are all treated alike. Every
    sequence of the step counts the same.

    Args:
        decay: Share of the past that is kept at each step. The paper uses 0.9 (figure 7).

    Attributes:
        unmeasured: What was 0 in the last step, and has no average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.means: dict[str, dict[str, Tensor]] = {}
        self.unmeasured: set[Place] = set()
        self._pending: Pending = {}

    def of(self, key: str) -> Mapping[str, Float[Tensor, ""]]:
        """Return the moments' averages for one parameter; empty before its first step has ended."""
        return self.means.get(key, {})

    def add(self, key: str, moments: Mapping[str, Float[Tensor, " batch"]]) -> None:
        """Measure one microbatch's moments, one value per sequence."""
        pending = self._pending.setdefault(key, {})
        for name, value_B in moments.items():
            total, count = value_B.detach().sum(), value_B.numel()
            if name in pending:
                total, count = pending[name][0] + total, pending[name][1] + count
            pending[name] = (total, count)

    def fold(self, group: dist.ProcessGroup | None = None, *, missing: bool = False) -> str | None:
        """End the optimizer step, or a measuring pass: fold its measurements into the averages.

        A sum of exactly 0 is no measurement: no gradient reached the parameter, as with LoRA's A
        while B is still 0. As a past it would be the scale of all that follow.

        Args:
            group: The ranks over which measurements are averaged, where torch.distributed is
                initialized; None for all. All of them end up with the same averages, whatever each
                of them has measured.
            missing: Keep only what has no average yet.

        Returns:
            A parameter of which something measured is not finite, so that nothing was folded; None
            where there is none.
        """
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            self._pending = _sum_over_ranks(self._pending, self.means, group)
        pending, self._pending = self._pending, {}
        broken, empty = _not_measured(pending)
        if broken is not None:
            return broken
        self.unmeasured = {place for place in empty if place[1] not in self.of(place[0])}
        for key, measured in pending.items():
            means = self.means.setdefault(key, {})
            for name, (total, count) in measured.items():
                if not count or (key, name) in empty or (missing and name in means):
                    continue
                new = total / count
                means[name] = (
                    self.decay * means[name] + (1 - self.decay) * new if name in means else new
                )
        return None

    @property
    def has_pending(self) -> bool:
        """Whether something was measured since the last fold."""
        return bool(self._pending)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages as one flat dictionary, named PARAMETER/MOMENT."""
        return {
            f"{key}/{name}": mean
            for key, means in self.means.items()
            for name, mean in means.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the averages by those of `state_dict` and forget what is pending."""
        self.means, self._pending = {}, {}
        for flat, mean in state.items():
            key, name = flat.rsplit("/", 1)
            self.means.setdefault(key, {})[name] = mean


def _not_measured(pending: Pending) -> tuple[str | None, set[Place]]:
    """Return the first parameter of which a sum is not finite, and which sums are 0.

    With one copy from the device.
    """
    places = [(key, name) for key, measured in pending.items() for name in measured]
    totals = [total for measured in pending.values() for total, _ in measured.values()]
    if not totals:
        return None, set()
    every = torch.stack([total.to(totals[0].device) for total in totals])
    found = torch.stack([every.isfinite(), every == 0]).tolist()
    broken = next((key for (key, _), ok in zip(places, found[0], strict=True) if not ok), None)
    return broken, {place for place, zero in zip(places, found[1], strict=True) if zero}


def step_means(records: Sequence[LayerRecord]) -> dict[str, float]:
    """Return what `Isopo.step` reports, averaged over reductions."""

    def reported(name: str) -> list[Tensor]:
        return [record.report[name] for record in records if name in record.report]

    filled = [record.filled_B for record in records if record.filled_B is not None]
    values = {
        "weight_spread": [
            part_NB.std(dim=1, correction=0) / part_NB.mean(dim=1)
            for part_NB in _stacked(reported("scale"))
        ],
        "frac_filled_fisher": [part_NB.float().mean(dim=1) for part_NB in _stacked(filled)],
        "ntk_off_diagonal": [torch.stack(shares)] if (shares := reported("off_diagonal")) else [],
    }
    return {name: torch.cat(parts).mean().item() for name, parts in values.items() if parts}


def _stacked(values: Sequence[Tensor]) -> list[Tensor]:
    """Stack the vectors of equal length, each as (rows, batch)."""
    by_length: dict[int, list[Tensor]] = {}
    for value_B in values:
        by_length.setdefault(len(value_B), []).append(value_B)
    return [torch.stack(part) for part in by_length.values()]


def _sum_over_ranks(
    pending: Pending,
    means: Mapping[str, Mapping[str, Tensor]],
    group: dist.ProcessGroup | None,
) -> Pending:
    """Return the sums over all ranks, the same numbers in the same order on each of them.

    They are gathered and added here, since a reduction may add in another order on each rank. All
    ranks send their numbers in the order of what has an average, which is the same on all of them,
    and of what has none yet; a digest of that order tells whether it is the same as well. What a
    rank has not measured counts 0.
    """
    own = {
        (key, name): value for key, moments in pending.items() for name, value in moments.items()
    }
    dtypes = {(key, name): mean.dtype for key, of in means.items() for name, mean in of.items()}
    dtypes |= {place: total.dtype for place, (total, _) in own.items()}
    digest = hashlib.blake2b(repr(list(dtypes.items())).encode(), digest_size=16).digest()
    numbers = _numbers(own)
    every = dict.fromkeys(dtypes, (0.0, 0)) | numbers
    flat = array("d", chain(*zip(*every.values(), strict=True))).tobytes()
    everyone: list[tuple[bytes, bytes]] = [(b"", b"")] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (digest, flat), group=group)
    if any(other != digest for other, _ in everyone):
        return _restored(own, *_sum_by_place(numbers, dtypes, group))
    if not dtypes:
        return {}
    parts = torch.frombuffer(bytearray().join(flat for _, flat in everyone), dtype=torch.float64)
    sum_2P = torch.zeros(2, len(dtypes), dtype=torch.float64)
    for part_2P in parts.view(-1, *sum_2P.shape):  # one rank after another, as by name
        sum_2P += part_2P
    total_P, count_P = sum_2P
    summed = zip(total_P.tolist(), map(int, count_P.tolist()), strict=True)
    return _restored(own, dict(zip(dtypes, summed, strict=True)), dtypes)


def _sum_by_place(
    numbers: Mapping[Place, tuple[float, int]],
    dtypes: Mapping[Place, torch.dtype],
    group: dist.ProcessGroup | None,
) -> tuple[dict[Place, tuple[float, int]], dict[Place, torch.dtype]]:
    """Sum by name, and return the data types too: ranks have measured different parameters."""
    named = {place: (*value, dtypes[place]) for place, value in numbers.items()}
    everyone: list[dict[Any, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, named, group=group)
    summed: dict[Place, tuple[float, int]] = {}
    all_dtypes: dict[Place, torch.dtype] = {}
    for place, (total, count, dtype) in chain.from_iterable(rank.items() for rank in everyone):
        before, count_before = summed.get(place, (0.0, 0))
        summed[place] = (before + total, count_before + count)
        all_dtypes[place] = dtype
    return summed, all_dtypes


def _numbers(own: Mapping[Place, tuple[Tensor, int]]) -> dict[Place, tuple[float, int]]:
    """Return what was measured as Python numbers, with one copy from the device."""
    totals = [total for total, _ in own.values()]
    values = torch.stack([total.to(totals[0].device) for total in totals]).tolist() if own else []
    return {place: (value, own[place][1]) for place, value in zip(own, values, strict=True)}


def _restored(
    own: Mapping[Place, tuple[Tensor, int]],
    summed: Mapping[Place, tuple[float, int]],
    dtypes: Mapping[Place, torch.dtype],
) -> Pending:
    """Return the sums as tensors, where this rank has measured the same thing on its device."""
    result: Pending = {}
    for (key, name), (total, count) in summed.items():
        device = own[key, name][0].device if (key, name) in own else None
        value = torch.tensor(total, dtype=dtypes[key, name], device=device)
        result.setdefault(key, {})[name] = (value, count)
    return result

"""Which position-wise gradients estimate the Fisher norm: the microbatch's, the ranks', the past's.

Each source hands out, for one microbatch, an object that returns a parameter's sample of position
gradients. With the microbatch's own positions the estimate depends on which sequences share it.
Positions gathered over ranks make it independent of how sequences are spread over ranks; positions
carried over from the previous optimizer step, of how they are spread over microbatches too.

Legend for shape suffixes: T positions, K sampled positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from proxstep.errors import ProxstepError
from proxstep.isopo.embedding import LookupGradients
from proxstep.isopo.gradients import PositionGradients
from proxstep.isopo.layout import smallest
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.vector import VectorGradients
from proxstep.typing import Float, Int, Tensor

Group = dist.ProcessGroup | None
Kept = dict[str, tuple[Tensor, PositionGradients]]
"""Priorities and gradients of some positions, by parameter."""


class Samples(Protocol):
    """One microbatch's samples."""

    @property
    def index_K(self) -> Int[Tensor, " samples"]:
        """The microbatch's own positions that were drawn."""
        ...

    def of(self, key: str, gradients: PositionGradients) -> tuple[PositionGradients, int]:
        """Return a parameter's sample, and how many rows it has."""
        ...

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks that share the sample."""
        ...


class OwnSamples:
    """Positions of the microbatch itself."""

    def __init__(self, index_K: Int[Tensor, " samples"]) -> None:
        self.index_K = index_K

    def of(self, key: str, gradients: PositionGradients) -> tuple[PositionGradients, int]:
        """Return the gradients at the positions that were drawn."""
        del key
        return gradients.at(self.index_K), len(self.index_K)

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the value: nothing is shared."""
        return value


class GatheredSamples:
    """The K positions with the smallest priorities among all ranks' microbatches.

    Every rank must run the same number of microbatches: each layer's backward is a collective.
    """

    def __init__(
        self, priority_T: Float[Tensor, " positions"], count: int | None, group: Group
    ) -> None:
        self._group = group
        own_K = smallest(priority_T, count)
        limit = torch.inf if count is None else _kth_smallest(priority_T[own_K], count, group)
        self.index_K = own_K[priority_T[own_K] <= limit]
        counts = torch.tensor([len(self.index_K)], device=priority_T.device)
        self._counts = torch.cat(_all_gather(counts, group)).tolist()

    def of(self, key: str, gradients: PositionGradients) -> tuple[PositionGradients, int]:
        """Return the ranks' gradients, those of the first rank first."""
        del key
        own = gradients.at(self.index_K)
        return _gather(own, self._counts, self._group), sum(self._counts)

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        total = value.clone()
        dist.all_reduce(total, group=self._group)
        return total


class CarriedSamples:
    """Positions of the previous optimizer step, kept over from it; the first step uses its own."""

    def __init__(self, store: SampleStore, priority_T: Float[Tensor, " positions"]) -> None:
        self._store, self._priority_T = store, priority_T
        self.index_K = smallest(priority_T, store.count)

    def of(self, key: str, gradients: PositionGradients) -> tuple[PositionGradients, int]:
        """Return what was kept of the previous step, and keep this microbatch's for the next."""
        own = gradients.at(self.index_K)
        self._store.add(key, self._priority_T[self.index_K], own)
        sample = _like(self._store.current.get(key, own), own)
        return sample, len(_first(sample))

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the value: nothing is shared within a step."""
        return value


class SampleStore:
    """The samples that are carried from one optimizer step to the next.

    Args:
        count: K.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.current: dict[str, PositionGradients] = {}
        self._pending: Kept = {}

    def add(self, key: str, priority_K: Tensor, gradients: PositionGradients) -> None:
        """Keep the K smallest priorities of those kept before and these."""
        if key in self._pending:
            old_priority_K, old = self._pending[key]
            priority_K = torch.cat([old_priority_K, priority_K])
            gradients = _map2(old, gradients, lambda a, b: torch.cat([a, b]))
        index_K = smallest(priority_K, self.count)
        self._pending[key] = (priority_K[index_K], gradients.at(index_K))

    def fold(self, group: Group) -> None:
        """End the optimizer step: what was kept is the sample from now on.

        Raises:
            ProxstepError: If ranks kept samples of different parameters, or of the same sequence.
        """
        kept = self._pending
        if dist.is_initialized():
            kept = _merge(kept, self.count, group)
        self.current |= {key: gradients for key, (_, gradients) in kept.items()}
        self._pending = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: the tensors of each parameter's sample."""
        return {
            key: {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
            for key, sample in self.current.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sample by that of `state_dict`, and forget what is pending."""
        self._pending = {}
        self.current = {key: _KINDS[frozenset(fields)](**fields) for key, fields in state.items()}


_KINDS: dict[frozenset[str], Any] = {
    frozenset(field.name for field in dataclasses.fields(kind)): kind
    for kind in (OuterGradients, VectorGradients, LookupGradients)
}


def keys_on_all_ranks(keys: list[int], group: Group) -> list[int]:
    """Return the keys of all ranks' sequences; every rank must call it."""
    everyone: list[list[int]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(everyone, keys, group=group)
    return [key for rank in everyone for key in rank]


def _merge(kept: Kept, count: int, group: Group) -> Kept:
    """Return the samples of the smallest priorities among all ranks', the same on each of them."""
    own = {key: len(priority_K) for key, (priority_K, _) in kept.items()}
    everyone: list[dict[str, int]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    rows = {key: max(rank.get(key, -1) for rank in everyone) for rank in everyone for key in rank}
    merged = {}
    for key, longest in sorted(rows.items()):
        if not all(key in rank for rank in everyone):
            raise ProxstepError(
                f'{key} received a gradient on some ranks alone: overlap_source="previous_step" '
                "needs every parameter's on every rank"
            )
        merged[key] = _merge_one(*kept[key], longest, count, group)
    if merged:
        _check_distinct(next(iter(merged.values()))[0])
    return merged


def _merge_one(
    priority_K: Tensor, gradients: PositionGradients, longest: int, count: int, group: Group
) -> tuple[Tensor, PositionGradients]:
    """Merge the samples of one parameter, of which every rank has its smallest priorities first.

    Gradients are gathered only of the rows that are in the result.
    """
    parts = _all_gather(_pad(priority_K, longest, torch.inf), group)
    every = torch.cat(parts)
    chosen_K = every[smallest(every, count)]
    limit = chosen_K[-1] if len(chosen_K) else -torch.inf
    counts = (torch.stack(parts) <= limit).sum(dim=1).tolist()
    own = gradients.at(torch.arange(counts[dist.get_rank(group)], device=priority_K.device))
    index_K = smallest(_join(parts, counts), count)
    return chosen_K, _gather(own, counts, group).at(index_K)


def _check_distinct(priority_K: Tensor) -> None:
    """Refuse equal priorities, which come from equal keys alone."""
    if len(priority_K.unique()) < len(priority_K):
        raise ProxstepError(
            "two ranks have a sequence with the same one of sequence_keys in this optimizer step: "
            "give every sequence a number of its own, on any rank"
        )


def _kth_smallest(own_K: Tensor, count: int, group: Group) -> float:
    """Return the count-th smallest priority of all ranks, or infinity where there are fewer."""
    everyone = torch.cat(_all_gather(_pad(own_K, count, torch.inf), group))
    return everyone.sort().values[count - 1].item()


def _gather(gradients: PositionGradients, counts: list[int], group: Group) -> PositionGradients:
    """Concatenate the ranks' gradients, of which each has so many rows.

    A collective takes equal parts: they are filled up on the way.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _join(_all_gather(_pad(value, max(counts), 0), group), counts)

    return _map(gradients, gathered)


def _join(parts: list[Tensor], counts: list[int]) -> Tensor:
    """Concatenate so many rows of each part."""
    return torch.cat([part[:rows] for part, rows in zip(parts, counts, strict=True)])


def _pad(value: Tensor, rows: int, fill: float) -> Tensor:
    missing = value.new_full((rows - len(value), *value.shape[1:]), fill)
    return torch.cat([value, missing]).contiguous()


def _all_gather(value: Tensor, group: Group) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts


def _like(sample: Any, own: Any) -> Any:
    """Return the sample on the device of a microbatch's own, which may not be a checkpoint's."""
    device = _first(own).device
    return _map(sample, lambda value: value.to(device) if isinstance(value, Tensor) else value)


def _first(gradients: PositionGradients) -> Tensor:
    return gradients.grad_TO if isinstance(gradients, OuterGradients) else gradients.grad_TD


def _map(gradients: Any, function: Any) -> Any:
    fields = dataclasses.fields(gradients)
    return type(gradients)(*(function(getattr(gradients, field.name)) for field in fields))


def _map2(first: Any, second: Any, function: Any) -> Any:
    def both(name: str) -> Any:
        a, b = getattr(first, name), getattr(second, name)
        return function(a, b) if isinstance(a, Tensor) else a

    return type(first)(*(both(field.name) for field in dataclasses.fields(first)))

"""What ranks put together of each other's sampled positions.

Legend for shape suffixes: T positions, K sampled positions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import PositionGradients
from proxstep.isopo.plan import Rows, smallest
from proxstep.typing import Tensor

Group = dist.ProcessGroup | None


Kept = dict[str, tuple[Rows, PositionGradients]]
"""Sampled positions and their gradients, by parameter."""


def keys_on_all_ranks(keys: list[int], group: Group) -> list[int]:
    """Return the keys of all ranks' sequences; every rank must call it."""
    everyone: list[list[int]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(everyone, keys, group=group)
    return [key for rank in everyone for key in rank]


def merge(kept: Kept, count: int, group: Group, keys: frozenset[int] = frozenset()) -> Kept:
    """Return the samples of the smallest priorities among all ranks', the same on each of them.

    Raises:
        ProxstepError: If ranks kept samples of different parameters, or have a sequence's key in
            common.
    """
    own = {key: len(rows.priority_K) for key, (rows, _) in kept.items()}
    gathered: list[tuple[dict[str, int], frozenset[int]]] = [({}, keys)] * dist.get_world_size(
        group
    )
    dist.all_gather_object(gathered, (own, keys), group=group)
    everyone = [counts for counts, _ in gathered]
    rows = {key: max(rank.get(key, -1) for rank in everyone) for rank in everyone for key in rank}
    merged = {}
    for key, longest in sorted(rows.items()):
        if not all(key in rank for rank in everyone):
            raise ProxstepError(
                f'{key} received a gradient on some ranks alone: overlap_source="previous_step" '
                'needs every parameter\'s on every rank; use overlap_source="microbatch"'
            )
        merged[key] = _merge_one(*kept[key], longest, count, group)
    seen = [key for _, own_keys in gathered for key in own_keys]
    if merged and len(set(seen)) < len(seen):
        raise ProxstepError(
            "two ranks have a sequence with the same one of sequence_keys in this optimizer step: "
            "give every sequence a number of its own, on any rank"
        )
    return merged


def _merge_one(
    own_rows: Rows, gradients: PositionGradients, longest: int, count: int, group: Group
) -> tuple[Rows, PositionGradients]:
    """Merge the samples of one parameter, of which every rank has its smallest priorities first.

    Gradients are gathered only of the rows that are in the result.
    """
    priority_K = own_rows.priority_K
    parts = all_gather(_pad(priority_K, longest, torch.inf), group)
    every = torch.cat(parts)
    chosen_K = every[smallest(every, count)]
    limit = chosen_K[-1] if len(chosen_K) else -torch.inf
    counts = (torch.stack(parts) <= limit).sum(dim=1).tolist()
    own = gradients.at(torch.arange(counts[dist.get_rank(group)], device=priority_K.device))
    index_K = smallest(_join(parts, counts), count)
    whose = [
        _join(all_gather(_pad(value[: len(own.first)], max(counts), 0), group), counts)[index_K]
        for value in own_rows[1:]
    ]
    return Rows(chosen_K, *whose), gather(own, counts, group).at(index_K)


def kth_smallest(own_K: Tensor, count: int, group: Group) -> float:
    """Return the count-th smallest priority of all ranks, or infinity where there are fewer."""
    everyone = torch.cat(all_gather(_pad(own_K, count, torch.inf), group))
    return everyone.sort().values[count - 1].item()


def gather(gradients: PositionGradients, counts: list[int], group: Group) -> PositionGradients:
    """Concatenate the ranks' gradients, of which each has so many rows.

    A collective takes equal parts: they are filled up on the way.
    """

    def gathered(value: Tensor) -> Tensor:
        return _join(all_gather(_pad(value, max(counts), 0), group), counts)

    return gradients.map(gathered)


def _join(parts: list[Tensor], counts: list[int]) -> Tensor:
    """Concatenate so many rows of each part."""
    return torch.cat([part[:rows] for part, rows in zip(parts, counts, strict=True)])


def _pad(value: Tensor, rows: int, fill: float) -> Tensor:
    missing = value.new_full((rows - len(value), *value.shape[1:]), fill)
    return torch.cat([value, missing]).contiguous()


def all_gather(value: Tensor, group: Group) -> list[Tensor]:
    """Return each rank's tensor, all of one shape."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts

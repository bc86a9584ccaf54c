"""Which position-wise gradients estimate the Fisher norm: how many, where, and whose.

With the microbatch's own positions the estimate depends on which sequences share it. Positions
gathered over ranks make it independent of how sequences are spread over ranks; positions carried
over from the previous optimizer step, of how they are spread over microbatches too.

Legend for shape suffixes: T positions, B sequences, K sampled positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from proxstep.errors import ProxstepError
from proxstep.isopo.gradients import KINDS, Layout, PositionGradients
from proxstep.isopo.rule import OverRanks
from proxstep.typing import Bool, Float, Int, Tensor

OverlapPositions = Literal["all", "completion"]
OverlapSource = Literal["microbatch", "ranks", "previous_step"]
Group = dist.ProcessGroup | None
Kept = dict[str, tuple[Tensor, PositionGradients]]
"""Priorities and gradients of some positions, by parameter."""


class Samples:
    """One microbatch's samples: of positions of its own.

    Attributes:
        index_K: The microbatch's own positions that were drawn.
        exchanged: Whether `of` gives others than the microbatch's own.
        over_ranks: Sums over the ranks that share the sample; None where none is shared.
    """

    exchanged = False
    over_ranks: OverRanks = None

    def __init__(self, index_K: Int[Tensor, " samples"]) -> None:
        self.index_K = index_K

    def of(self, key: str, own: PositionGradients) -> PositionGradients:
        """Return a parameter's sample, given the gradients at the microbatch's own positions."""
        del key
        return own


class GatheredSamples(Samples):
    """The K positions with the smallest priorities among all ranks' microbatches.

    Every rank must run the same number of microbatches: each layer's backward is a collective.
    """

    exchanged = True

    def __init__(
        self, priority_T: Float[Tensor, " positions"], count: int | None, group: Group
    ) -> None:
        self._group = group
        self.over_ranks = self._sum
        own_K = smallest(priority_T, count)
        limit = torch.inf if count is None else _kth_smallest(priority_T[own_K], count, group)
        self.index_K = own_K[priority_T[own_K] <= limit]
        counts = torch.tensor([len(self.index_K)], device=priority_T.device)
        self._counts = torch.cat(_all_gather(counts, group)).tolist()

    def of(self, key: str, own: PositionGradients) -> PositionGradients:
        """Return the ranks' gradients, those of the first rank first."""
        del key
        return _gather(own, self._counts, self._group)

    def _sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=self._group)
        return total


class CarriedSamples(Samples):
    """Positions of the previous optimizer step, kept over from it; the first step uses its own."""

    exchanged = True

    def __init__(self, store: SampleStore, priority_T: Float[Tensor, " positions"]) -> None:
        super().__init__(smallest(priority_T, store.count))
        self._store, self._priority_K = store, priority_T[self.index_K]

    def of(self, key: str, own: PositionGradients) -> PositionGradients:
        """Return what was kept of the previous step, and keep this microbatch's for the next."""
        self._store.add(key, self._priority_K, own)
        device = own.first.device  # a checkpoint's may be another
        return self._store.current.get(key, own).map(lambda value: value.to(device))


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
            gradients = _both(old, gradients)
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
            key: {"kind": type(sample).__name__, **vars(sample)}
            for key, sample in self.current.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sample by that of `state_dict`, and forget what is pending."""
        self._pending = {}
        self.current = {
            key: KINDS[of["kind"]](**{name: of[name] for name in of if name != "kind"})
            for key, of in state.items()
        }


class Drawing:
    """Draws each microbatch's sample; the options are those of `Isopo`.

    Raises:
        ProxstepError: If the options do not fit each other.
    """

    def __init__(
        self,
        count: int | None,
        positions: OverlapPositions,
        source: OverlapSource,
        seed: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        if count is not None and count < 1:
            raise ProxstepError("num_overlap_positions must be positive, or None for all positions")
        self._count, self._positions, self._source = count, positions, source
        self._seed, self._group = seed, group
        self._seen: set[int] = set()
        self._store: SampleStore | None = None
        if source == "previous_step":
            if count is None:
                raise ProxstepError(
                    'overlap_source="previous_step" needs num_overlap_positions: so many positions '
                    "are kept of every layer"
                )
            self._store = SampleStore(count)

    def draw(
        self,
        layout: Layout,
        completion_mask: Bool[Tensor, "rows columns"] | None,
        sequence_keys: Int[Tensor, " batch"] | None,
        place: tuple[int, int],
    ) -> Samples:
        """Return a microbatch's sample.

        Args:
            layout: Its positions.
            completion_mask: True at completion positions.
            sequence_keys: A number for each sequence that no other one of the step has.
            place: The optimizer step and the microbatch in it.

        Raises:
            ProxstepError: If an argument is missing or wrong, or a sequence was seen before.
        """
        eligible_T = None
        if self._positions == "completion":
            if completion_mask is None or completion_mask.shape != layout.grid:
                raise ProxstepError(
                    'overlap_positions="completion" needs completion_mask in the shape of '
                    "sequence_ids"
                )
            eligible_T = _predicting(completion_mask).reshape(-1)
            eligible_T = eligible_T if layout.order_T is None else eligible_T[layout.order_T]
        seeds = self._seeds(sequence_keys, layout.num_sequences, place)
        priority_T = sample_priorities(layout, seeds, eligible_T)
        if self._store is not None:
            return CarriedSamples(self._store, priority_T)
        if self._source == "ranks" and dist.is_initialized():
            return GatheredSamples(priority_T, self._count, self._group)
        return Samples(smallest(priority_T, self._count))

    def end_step(self) -> None:
        """End the optimizer step: its sample is carried over, its sequences are forgotten."""
        if self._store is not None:
            self._store.fold(self._group)
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried over; empty where nothing is."""
        return {} if self._store is None else self._store.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._seen.clear()
        if self._store is not None:
            self._store.load_state_dict(state)

    def _seeds(self, sequence_keys: Tensor | None, count: int, place: tuple[int, int]) -> list[int]:
        """Return a seed for each sequence; equal keys in equal steps give equal ones."""
        step, microbatch = place
        if sequence_keys is None:
            if self._source != "microbatch":
                raise ProxstepError(
                    f'overlap_source="{self._source}" needs sequence_keys: a number for each '
                    "sequence that no other one of the optimizer step has, on any rank"
                )
            rank = dist.get_rank(self._group) if dist.is_initialized() else 0
            return [_mix(self._seed, step, rank, microbatch, b) for b in range(count)]
        keys = everyone = sequence_keys.tolist()
        if self._source == "ranks" and dist.is_initialized():
            everyone = keys_on_all_ranks(keys, self._group)
        twice = [key for key, times in Counter(everyone).items() if key in self._seen or times > 1]
        if len(keys) != count or twice:
            raise ProxstepError(
                f"sequence_keys must be {count} different numbers"
                + (f", and {twice[0]} was seen before in this optimizer step" if twice else "")
                + ": a sequence must be whole in one microbatch"
            )
        self._seen.update(everyone)
        return [_mix(self._seed, step, key) for key in keys]


def sample_priorities(
    layout: Layout, seeds: Sequence[int], eligible_T: Bool[Tensor, " positions"] | None = None
) -> Float[Tensor, " positions"]:
    """Return a random number per position; the K smallest are a uniform sample of K positions.

    A position's number depends on its sequence's seed and its place in the sequence alone, so that
    the sample of a batch does not depend on how its sequences are spread.

    Args:
        layout: The positions.
        seeds: One per sequence.
        eligible_T: Positions that may be sampled; None for all that belong to a sequence.

    Returns:
        Numbers in [0, 1), and infinity where a position must not be sampled.
    """
    priority_T = torch.full((layout.num_positions,), torch.inf, dtype=torch.float64)
    generator = torch.Generator()
    for seed, (start, end) in zip(seeds, layout.bounds, strict=True):
        generator.manual_seed(seed % 2**63)
        priority_T[start:end] = torch.rand(end - start, generator=generator, dtype=torch.float64)
    priority_T = priority_T.to(layout.sequence_T.device)
    return priority_T if eligible_T is None else priority_T.masked_fill(~eligible_T, torch.inf)


def smallest(priority_T: Float[Tensor, " positions"], count: int | None) -> Int[Tensor, " samples"]:
    """Return the positions of the `count` smallest finite numbers, or of all of them."""
    order_T = priority_T.argsort(stable=True)[: int(priority_T.isfinite().sum())]
    return order_T if count is None else order_T[:count]


def _predicting(completion_mask: Tensor) -> Tensor:
    """Return the positions whose next one belongs to a completion: the prompt's last is one."""
    following = torch.zeros_like(completion_mask)
    following[:, :-1] = completion_mask[:, 1:]
    return following


def _mix(*numbers: int) -> int:
    """Return a seed that depends on all the numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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

    def gathered(value: Tensor) -> Tensor:
        return _join(_all_gather(_pad(value, max(counts), 0), group), counts)

    return gradients.map(gathered)


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


def _both(first: Any, second: Any) -> Any:
    """Return the rows of both."""

    def joined(name: str) -> Any:
        one, other = getattr(first, name), getattr(second, name)
        return torch.cat([one, other]) if isinstance(one, Tensor) else one

    return type(first)(*(joined(field.name) for field in dataclasses.fields(first)))

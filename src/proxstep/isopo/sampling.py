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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from proxstep.errors import ProxstepError
from proxstep.isopo import gathering
from proxstep.isopo.gathering import Group, Kept
from proxstep.isopo.hooks import KINDS, PositionGradients
from proxstep.isopo.plan import Layout, Rows, smallest
from proxstep.isopo.rule import OverRanks
from proxstep.logprobs.tokens import widest_dtype
from proxstep.typing import Bool, Float, Int, Tensor

OverlapPositions = Literal["all", "completion"]
OverlapSource = Literal["microbatch", "ranks", "previous_step"]


_TINY = 1e-300
"""Stands for an importance of 0: such positions are drawn last."""


class Sample(NamedTuple):
    """One parameter's sample.

    Attributes:
        gradients: At the sampled positions.
        own_KB: Where a position must not measure a sequence; None for nowhere.
        weight_K: Positions that each of them stands for, up to a factor; None for equally many.
    """

    gradients: PositionGradients
    own_KB: Bool[Tensor, "samples batch"] | None = None
    weight_K: Float[Tensor, " samples"] | None = None


class Samples:
    """One microbatch's samples: of positions of its own, drawn evenly.

    Attributes:
        index_K: The microbatch's own positions that were drawn.
        over_ranks: Sums over the ranks that share the sample; None where none is shared.
    """

    over_ranks: OverRanks = None
    same_positions = True  # for all parameters

    def __init__(self, index_K: Int[Tensor, " samples"]) -> None:
        self.index_K = index_K

    def of(self, key: str, every: PositionGradients) -> Sample:
        """Return a parameter's sample, given the gradients at all of the microbatch's positions."""
        del key
        return Sample(every.at(self.index_K))


class GatheredSamples(Samples):
    """The K positions with the smallest priorities among all ranks' microbatches.

    Every rank must run the same number of microbatches: each layer's backward is a collective.
    """

    def __init__(
        self, priority_T: Float[Tensor, " positions"], count: int | None, group: Group
    ) -> None:
        self._group = group
        self.over_ranks = self._sum
        own_K = smallest(priority_T, count)
        limit = (
            torch.inf if count is None else gathering.kth_smallest(priority_T[own_K], count, group)
        )
        self.index_K = own_K[priority_T[own_K] <= limit]
        counts = torch.tensor([len(self.index_K)], device=priority_T.device)
        self._counts = torch.cat(gathering.all_gather(counts, group)).tolist()

    def of(self, key: str, every: PositionGradients) -> Sample:
        """Return the ranks' gradients, those of the first rank first."""
        del key
        return Sample(gathering.gather(every.at(self.index_K), self._counts, self._group))

    def _sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=self._group)
        return total


class CarriedSamples(Samples):
    """Positions of the previous optimizer step, kept over from it; without any, its own.

    Every parameter draws positions of its own, with probabilities in proportion to |G_t|^2, since
    few positions make up most of F: 32 are as good as 250 that are drawn evenly.

    A sequence is not measured by its own positions, which lie in its direction more than others do,
    where the sample holds some: where it was drawn beforehand from the step itself, by a measuring
    pass, and where the same sequences make several steps. Drawn beforehand, its prompt's do not
    count either, since in later steps they will not be there.

    Args:
        store: Where they are kept.
        own: The microbatch's positions, with the random numbers that their priorities come from.
        count: How many of them may be drawn.
        whose: The microbatch's sequences.
    """

    same_positions = False

    def __init__(self, store: SampleStore, own: Rows, count: int, whose: Rows) -> None:
        self._store, self._own, self._count = store, own, min(count, store.count)
        self._whose = whose

    def of(self, key: str, every: PositionGradients) -> Sample:
        """Return what was kept of the previous step, and keep this microbatch's for the next."""
        kept, device = self._store.current.get(key), self._own.priority_K.device
        if kept is not None and kept[0].priority_K.device != device:
            kept = self._store.move(key, device)
        weight_T = every.importance().to(self._own.priority_K.dtype)
        priority_T = self._own.priority_K / (weight_T + _TINY)
        index_K = priority_T.topk(self._count, largest=False).indices
        rows = self._own._replace(priority_K=priority_T, weight_K=weight_T).at(index_K)
        own = every.at(index_K)
        self._store.add(key, rows, own)
        if kept is None:
            return Sample(own, None, self._store.weights(rows))
        own_KB = self._own_rows(kept[0], of_step=key in self._store.of_step)
        return Sample(kept[1], own_KB, self._store.weights(kept[0]))

    def _own_rows(self, rows: Rows, *, of_step: bool) -> Bool[Tensor, "samples batch"]:
        """Return which sampled position is which sequence's own."""
        own_KB = rows.key_K[:, None] == self._whose.key_K
        if of_step:
            own_KB |= rows.group_K[:, None] == self._whose.group_K
        return own_KB & ~own_KB.all(dim=0)  # where there are no others, its own have to do


class SampleStore:
    """The samples that are carried from one optimizer step to the next.

    Args:
        count: K.

    Attributes:
        of_step: Whose sample is of the step that is to come, by a measuring pass.
        unmeasured: Whose gradients were 0 in the last step, and who have no sample.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.current: Kept = {}
        self.pending: Kept = {}
        self.of_step: frozenset[str] = frozenset()
        self.unmeasured: frozenset[str] = frozenset()

    def add(self, key: str, rows: Rows, gradients: PositionGradients) -> None:
        """Keep the K smallest priorities of those kept before and these."""
        if key in self.pending:
            old, kept = self.pending[key]
            rows = Rows(*(torch.cat(pair) for pair in zip(old, rows, strict=True)))
            gradients = _both(kept, gradients)
        if key in self.pending or len(rows.priority_K) > self.count:
            index_K = rows.priority_K.argsort(stable=True)[: self.count]
            rows, gradients = rows.at(index_K), gradients.at(index_K)
        self.pending[key] = (rows, gradients)

    def weights(self, rows: Rows) -> Float[Tensor, " samples"]:
        """Return how many positions each of the rows stands for.

        With priorities u / w, u even in [0, 1), a sum over positions is estimated without bias by
        the K - 1 of the smallest priorities, each over its probability min(1, w c), with c the
        K-th priority. Fewer than K are all that there are.

        Source: Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset
            sums", 2007.
        """
        if len(rows.priority_K) < max(self.count, 2):
            return torch.ones_like(rows.weight_K)
        probability_K = ((rows.weight_K + _TINY) * rows.priority_K[-1]).clamp(max=1.0)
        weight_K = probability_K.reciprocal()
        weight_K[-1] = 0.0
        return weight_K

    def move(self, key: str, device: torch.device) -> tuple[Rows, PositionGradients]:
        """Move what a checkpoint brought of a parameter to a device, and return it."""
        rows, sample = self.current[key]
        moved = Rows(*(value.to(device) for value in rows))
        self.current[key] = (moved, sample.map(lambda value: value.to(device)))
        return self.current[key]

    def fold(
        self, group: Group, keys: frozenset[int] = frozenset(), *, missing: bool = False
    ) -> None:
        """End the optimizer step, or a measuring pass: what was kept is the sample from now on.

        A sample of zeros would measure every sequence as 0: an earlier one stays, or there is none.

        Args:
            group: The ranks.
            keys: The sequences that this rank had, where the caller numbered them.
            missing: Keep only those of parameters that have no sample yet.

        Raises:
            ProxstepError: If ranks kept samples of different parameters, or of the same sequence.
        """
        kept = self.pending
        if missing:
            kept = {key: sample for key, sample in kept.items() if key not in self.current}
        if dist.is_initialized():
            kept = gathering.merge(kept, self.count, group, keys)
        found = {key: kept[key] for key in _not_zero(kept)}
        self.current |= found
        self.pending = {}
        self.unmeasured = frozenset(kept.keys() - self.current.keys())
        self.of_step = self.of_step | found.keys() if missing else frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: each parameter's sample, as tensors and numbers."""
        return {
            key: {
                "kind": type(sample).__name__,
                "rows": tuple(rows),
                **{field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)},
            }
            for key, (rows, sample) in self.current.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sample by that of `state_dict`, and forget what is pending."""
        self.pending, self.current = {}, {}
        self.of_step = self.unmeasured = frozenset()
        for key, of in state.items():
            fields = {name: value for name, value in of.items() if name not in ("kind", "rows")}
            self.current[key] = (Rows(*of["rows"]), KINDS[of["kind"]](**fields))


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
        self._count_of_step = 0
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
        groups: Int[Tensor, " batch"] | None,
        step: int,
    ) -> Samples:
        """Return a microbatch's sample.

        Args:
            layout: Its positions.
            completion_mask: True at completion positions.
            sequence_keys: A number for each sequence that no other one of the step has.
            groups: Each sequence's prompt.
            step: Number of the optimizer step.

        Raises:
            ProxstepError: If an argument is missing or wrong, or a sequence was seen before.
        """
        eligible_T = None
        if self._positions == "completion":
            if completion_mask is None:
                raise ProxstepError('overlap_positions="completion" needs completion_mask')
            eligible_T = _predicting(completion_mask).reshape(-1)
            eligible_T = eligible_T if layout.order_T is None else eligible_T[layout.order_T]
        keys = self._keys(sequence_keys, layout.num_sequences, step)
        seeds = [_mix(self._seed, step, key) for key in keys]
        priority_T = sample_priorities(layout, seeds, eligible_T)
        if self._store is not None:
            key_B = torch.tensor(keys, device=priority_T.device)
            group_B = key_B if groups is None else groups.to(key_B)
            padding = key_B.new_full((1,), -1)
            key_T, group_T = (
                torch.cat([of_B, padding])[layout.sequence_T] for of_B in (key_B, group_B)
            )
            none = priority_T[:0]
            own = Rows(priority_T, key_T, group_T, none)
            whose = Rows(none, key_B, group_B, none)
            count = int(priority_T.isfinite().sum())
            return CarriedSamples(self._store, own, count, whose)
        if self._source == "ranks" and dist.is_initialized():
            return GatheredSamples(priority_T, self._count, self._group)
        return Samples(smallest(priority_T, self._count))

    @property
    def carries(self) -> bool:
        """Whether samples are carried over from one step to the next."""
        return self._store is not None

    @property
    def unmeasured(self) -> frozenset[str]:
        """Parameters whose gradients were 0 in the last step, and that have no sample."""
        return frozenset() if self._store is None else self._store.unmeasured

    def end_step(self, *, keep: bool = True, missing: bool = False) -> None:
        """End the optimizer step, or a measuring pass, which adds only what is `missing`.

        Its sample is carried over, its sequences are forgotten.
        """
        if self._store is not None and keep:
            self._store.fold(self._group, frozenset(self._seen), missing=missing)
        elif self._store is not None:
            self._store.pending = {}
        self._seen.clear()
        self._count_of_step = 0

    def bookmark(self) -> Callable[[], None]:
        """Return what forgets the sequences and the samples that come from now on."""
        seen, count = set(self._seen), self._count_of_step
        pending = None if self._store is None else dict(self._store.pending)

        def undo() -> None:
            self._seen, self._count_of_step = seen, count
            if self._store is not None and pending is not None:
                self._store.pending = pending

        return undo

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried over; empty where nothing is."""
        return {} if self._store is None else self._store.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._seen.clear()
        self._count_of_step = 0
        if self._store is not None:
            self._store.load_state_dict(state)

    def _keys(self, sequence_keys: Tensor | None, count: int, step: int) -> list[int]:
        """Return a number for each sequence; by default they are counted, on each rank."""
        if sequence_keys is None:
            if self._source == "ranks":
                raise ProxstepError(
                    'overlap_source="ranks" needs sequence_keys: a number for each sequence that '
                    "no other one of the optimizer step has, on any rank"
                )
            rank = dist.get_rank(self._group) if dist.is_initialized() else 0
            first = ((step % 2**20) << 42) + (rank << 26) + self._count_of_step
            self._count_of_step += count
            return list(range(first, first + count))
        if sequence_keys.dim() != 1:
            raise ProxstepError(f"sequence_keys must be {count} numbers, one per sequence")
        keys = everyone = sequence_keys.tolist()
        if self._source == "ranks" and dist.is_initialized():
            everyone = gathering.keys_on_all_ranks(keys, self._group)
        twice = [key for key, times in Counter(everyone).items() if key in self._seen or times > 1]
        if len(keys) != count or twice:
            raise ProxstepError(
                f"sequence_keys must be {count} different numbers"
                + (f", and {twice[0]} was seen before in this optimizer step" if twice else "")
                + ": a sequence must be whole in one microbatch"
            )
        self._seen.update(everyone)
        return keys


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
    device = layout.sequence_T.device
    priority_T = priority_T.to(device, widest_dtype(device))
    return priority_T if eligible_T is None else priority_T.masked_fill(~eligible_T, torch.inf)


def _predicting(completion_mask: Tensor) -> Tensor:
    """Return the positions whose next one belongs to a completion: the prompt's last is one."""
    following = torch.zeros_like(completion_mask)
    following[:, :-1] = completion_mask[:, 1:]
    return following


def _not_zero(kept: Kept) -> list[str]:
    """Return the parameters whose sample is not all zeros, with one copy from the device."""
    any_K = [rows.weight_K.any() for rows, _ in kept.values()]
    if not any_K:
        return []
    found = torch.stack([one.to(any_K[0].device) for one in any_K]).tolist()
    return [key for key, some in zip(kept, found, strict=True) if some]


def _mix(*numbers: int) -> int:
    """Return a seed that depends on all the numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _both(first: Any, second: Any) -> Any:
    """Return the rows of both."""

    def joined(name: str) -> Any:
        one, other = getattr(first, name), getattr(second, name)
        return torch.cat([one, other]) if isinstance(one, Tensor) else one

    return type(first)(*(joined(field.name) for field in dataclasses.fields(first)))

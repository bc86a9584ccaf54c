"""Which positions estimate the Fisher norm in each microbatch: how many, where, and from whom.

Legend for shape suffixes: T positions, B sequences, K sampled positions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from proxstep.errors import ProxstepError
from proxstep.isopo.layout import Layout, sample_priorities, smallest
from proxstep.isopo.samples import (
    CarriedSamples,
    GatheredSamples,
    OwnSamples,
    Samples,
    SampleStore,
    keys_on_all_ranks,
)
from proxstep.typing import Bool, Int, Tensor

OverlapPositions = Literal["all", "completion"]
OverlapSource = Literal["microbatch", "ranks", "previous_step"]


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
        return OwnSamples(smallest(priority_T, self._count))

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


def _predicting(completion_mask: Tensor) -> Tensor:
    """Return the positions whose next one belongs to a completion: the prompt's last is one."""
    following = torch.zeros_like(completion_mask)
    following[:, :-1] = completion_mask[:, 1:]
    return following


def _mix(*numbers: int) -> int:
    """Return a seed that depends on all the numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

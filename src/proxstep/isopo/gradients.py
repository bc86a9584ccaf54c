"""What every kind of layer says of its parameters: position-wise gradients, and their statistics.

And what it is told: the layout of the positions, and the workspace that layers share.

A parameter's gradient is a sum over token positions, G = sum_t G_t. Each kind of layer has a class
that holds the G_t of one parameter in one backward pass, in the smallest form that it knows.

Legend for shape suffixes: T positions, B sequences, K sampled positions, D features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from proxstep.errors import ProxstepError
from proxstep.isopo.plan import MEMORY_BUDGET, Needs, Part
from proxstep.typing import Float, Int, Tensor


@dataclass(frozen=True)
class Layout:
    """The token positions of a microbatch.

    Positions are those of the flattened grid, except where the positions of a sequence do not
    follow each other in it: then they are gathered, sequence by sequence.

    Attributes:
        grid: Shape of the token grid, (rows, columns).
        order_T: Where positions are gathered, each one's index in the flattened grid; else None.
        sequence_T: Each position's sequence; `num_sequences` at padding.
        bounds: First and last-plus-one position of each sequence.
        one_hot_TB: 1 where a position belongs to a sequence, float32.
    """

    grid: tuple[int, int]
    order_T: Int[Tensor, " positions"] | None
    sequence_T: Int[Tensor, " positions"]
    bounds: tuple[tuple[int, int], ...]
    one_hot_TB: Float[Tensor, "positions batch"]

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.bounds)

    @property
    def num_positions(self) -> int:
        """T, padding included where nothing is gathered."""
        return len(self.sequence_T)

    def sum_by_sequence(
        self, value_NT: Float[Tensor, "rows positions"]
    ) -> Float[Tensor, "rows batch"]:
        """Sum the columns of each sequence."""
        return value_NT @ self.one_hot_TB.to(value_NT.dtype)

    def spread(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " positions"]:
        """Return each position's sequence's value, 0 at padding."""
        return torch.cat([value_B, value_B.new_zeros(1)])[self.sequence_T]

    def only(self, index: Int[Tensor, " kept"]) -> Layout:
        """Return the layout of the positions in `index`, which must be in ascending order."""
        sequence_T = self.sequence_T[index]
        bounds = _bounds(sequence_T, self.num_sequences)
        return Layout(self.grid, None, sequence_T, bounds, self.one_hot_TB[index])


KINDS: dict[str, type[PositionGradients]] = {}
"""Every class of position-wise gradients, by its name."""


@dataclass(frozen=True)
class PositionGradients(ABC):
    """One parameter's G_t: a frozen dataclass of tensors with a row per position, then numbers.

    A subclass is registered by its name, under which the backward of its layer finds it.

    Attributes:
        is_matrix: Whether the parameter is a linear layer's weight, rather than one of the "other
            parameters" of `Isopo`.
    """

    is_matrix: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register the class.

        Raises:
            TypeError: If another class has its name.
        """
        known = KINDS.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"there is a class of position-wise gradients named {cls.__name__}")
        KINDS[cls.__name__] = cls

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return len(self.first)

    @property
    def first(self) -> Tensor:
        """The first tensor, the gradient of the layer's output: for its dtype and device."""
        return getattr(self, fields(self)[0].name)

    def map(self, function: Callable[[Tensor], Tensor]) -> PositionGradients:
        """Return the same with a function applied to each tensor."""
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        return type(self)(*(function(v) if isinstance(v, Tensor) else v for v in values))

    @abstractmethod
    def at(self, index: Int[Tensor, " samples"]) -> PositionGradients:
        """Return those of some positions."""

    @abstractmethod
    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""

    @abstractmethod
    def contract(self, weight_T: Float[Tensor, " positions"]) -> Tensor:
        """Return sum_t weight_t G_t, in the parameter's shape."""

    def along(self, direction: Tensor) -> Float[Tensor, " positions"]:
        """Return <G_t, direction>, with a direction in the parameter's shape; for PROMA."""
        raise ProxstepError(f"PROMA does not cover {type(self).__name__}: freeze its parameters")

    def factors(self, index_T: Int[Tensor, " kept"]) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield the matrices whose G_t are g_t a_t^T, for Intra-PROMA; none by default.

        Args:
            index_T: The positions that count.

        Yields:
            Where in the parameter a matrix is, its g_t, (rows, out), and its a_t, (rows, in).
        """
        del index_T
        yield from ()

    def sums(self, layout: Layout) -> SequenceGradients:
        """Return each sequence's gradient; not for a class that measures its own `parts`."""
        raise NotImplementedError(f"{type(self).__name__}.sums")

    def parts(
        self,
        layout: Layout,
        needs: Needs,
        sample: Any,
        memory: Memory,
        *,
        separable: bool,
    ) -> Iterator[Part]:
        """Measure the sequences: all at once, or where that is cheaper some at a time.

        Args:
            layout: Which position belongs to which sequence.
            needs: The statistics.
            sample: Gradients at the positions that estimate the Fisher norm, where it is needed.
            memory: The workspace, which a part may use until the next is asked for.
            separable: Whether some sequences may be weighed before the others are measured.
        """
        del memory, separable
        sums = self.sums(layout)
        yield Part(
            slice(None),
            lambda weight_B, _: sums.contract(weight_B),
            None if sample is None else sums.cross(sample),
            sums.norm_squares() if needs.norm else None,
            sums.ntk() if needs.ntk else None,
        )


class SequenceGradients(ABC):
    """The gradients G_b of one parameter."""

    @abstractmethod
    def cross(self, sample: Any) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b> with the G_k of a sample of positions, in the same class's form."""

    @abstractmethod
    def norm_squares(self) -> Float[Tensor, " batch"]:
        """Return |G_b|^2."""

    @abstractmethod
    def ntk(self) -> Float[Tensor, "batch batch"]:
        """Return <G_b, G_c>."""

    @abstractmethod
    def contract(self, weight_B: Float[Tensor, " batch"]) -> Tensor:
        """Return sum_b weight_b G_b, in the parameter's shape."""


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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype itself where it has more digits."""
    return torch.promote_types(dtype, torch.float32)


def wide(value: Tensor) -> Tensor:
    """Return the value in float32, or as it is where it has more digits."""
    return value.to(wide_dtype(value.dtype))


def make_layout(sequence_ids: Tensor, num_sequences: int) -> Layout:
    """Return the layout of a (rows, columns) grid of sequence ids, -1 for padding.

    Raises:
        ProxstepError: If the ids are not integers 0 to num_sequences - 1, each of them present, or
            a sequence lies in more than one row.
    """
    if sequence_ids.dim() != 2 or sequence_ids.is_floating_point():
        raise ProxstepError(
            "sequence_ids must be integers of shape (rows, columns), -1 for padding"
        )
    rows, columns = sequence_ids.shape
    flat_T = sequence_ids.reshape(-1).long()
    _check_ids(sequence_ids, num_sequences)
    sequence_T = torch.where(flat_T < 0, num_sequences, flat_T)
    bounds, order_T = _bounds(sequence_T, num_sequences), None
    if sum(end - start for start, end in bounds) != int((flat_T >= 0).sum()):
        order_T = sequence_T.argsort(stable=True)
        order_T = order_T[: int((flat_T >= 0).sum())]
        sequence_T = sequence_T[order_T]
        bounds = _bounds(sequence_T, num_sequences)
    one_hot_TB = torch.nn.functional.one_hot(sequence_T, num_sequences + 1)[:, :num_sequences]
    return Layout((rows, columns), order_T, sequence_T, bounds, one_hot_TB.float())


def _check_ids(sequence_ids: Tensor, num_sequences: int) -> None:
    highest = int(sequence_ids.max()) if sequence_ids.numel() else -1
    present_RB = torch.zeros(
        sequence_ids.shape[0], max(highest, num_sequences - 1) + 2, device=sequence_ids.device
    ).scatter_(1, sequence_ids.long().clamp(min=-1) + 1, 1.0)[:, 1:]
    rows_of_B = present_RB.sum(dim=0)
    if highest >= num_sequences or bool((rows_of_B == 0).any()):
        raise ProxstepError(
            f"sequence_ids must name each of the {num_sequences} sequences that have a "
            f"coefficient, 0 to {num_sequences - 1}, and no other"
        )
    if bool((rows_of_B > 1).any()):
        raise ProxstepError(
            f"sequence {int((rows_of_B > 1).long().argmax())} lies in more than one row of "
            "sequence_ids: a sequence must be whole, in one row, in one microbatch (sequence and "
            "context parallelism split sequences, and cannot be combined with ISOPO)"
        )


def _bounds(sequence_T: Tensor, num_sequences: int) -> tuple[tuple[int, int], ...]:
    """Return the run of each sequence that starts at its first position; (0, 0) for none."""
    num = len(sequence_T)
    position_T = torch.arange(num, device=sequence_T.device)
    differs_T = sequence_T[1:] != sequence_T[:-1]
    next_T = torch.full_like(position_T, num)
    next_T[:-1] = torch.where(differs_T, position_T[1:], num)
    end_T = next_T.flip(0).cummin(0).values.flip(0)  # where the run of each position ends
    first_B = torch.full((num_sequences + 1,), num, device=sequence_T.device)
    first_B = first_B.scatter_reduce(0, sequence_T, position_T, "amin")[:num_sequences]
    present_B = first_B < num
    first_B = first_B.masked_fill(~present_B, 0)
    end_B = end_T[first_B].masked_fill(~present_B, 0) if num else first_B
    pairs = torch.stack([first_B, end_B], dim=1).tolist()
    return tuple((start, end) for start, end in pairs)

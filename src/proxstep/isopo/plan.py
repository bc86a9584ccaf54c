"""What one reduction needs besides the gradients: their layout, its cost, and the workspace.

The plan of one layer's reduction says which exact form of its statistics is the cheapest. For a
matrix of O x I features, with T positions of which K are sampled, B sequences of L positions each,
the forms cost (multiplications and additions count two):

    the gradient, one product over all positions      2 T I O
    F_b, ghost: two Grams of K x T positions          2 K T (I + O)
    F_b from the sequences' gradients                 2 K B I O
    |G_b|, ghost: two Grams of L x L per sequence     2 T L (I + O)
    K_bc, ghost: two Grams over pairs of sequences    T (T + L) (I + O)
    the sequences' gradients, a buffer                2 T I O, and 3 B I O numbers through memory
    the same in blocks of output features             4 T I O, and 2 B I O numbers through memory

A buffer of gradients yields norms, kernel and the layer's gradient (their weighted sum), so that
the product is not needed on top; blocks are formed, measured and forgotten, so that it is. Where
the rule can weigh one sequence without knowing the others, a smaller buffer holds some of them at
a time. Vectors and embeddings have gradients that are small enough to be formed.

Legend for shape suffixes: B sequences, K sampled positions, O and I output and input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from proxstep.errors import ProxstepError
from proxstep.typing import Bool, Float, Int, Tensor

FLOPS_PER_BYTE = {"cpu": 6.0, "cuda": 150.0}
"""Operations that take as long as moving one byte, roughly: on one core of a server, and with the
tensor cores and HBM of a data-center GPU. Other devices are taken for a GPU. It decides which of
several exact forms is used, and changes no result.
"""

MEMORY_BUDGET = 128 * 2**20
"""Bytes that the statistics of one layer may take at a time, beyond its inputs."""


# -- the layout ------------------------------------------------------------------------------------


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
        mask_BL: Where row b of the grid is sequence b: 1 at its positions, 0 at padding, float32.
            Else None.
        trimmed: Whether positions without a gradient were taken for padding.
    """

    grid: tuple[int, int]
    order_T: Int[Tensor, " positions"] | None
    sequence_T: Int[Tensor, " positions"]
    bounds: tuple[tuple[int, int], ...]
    mask_BL: Float[Tensor, "batch columns"] | None = None
    trimmed: bool = False

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.bounds)

    @property
    def num_positions(self) -> int:
        """T, padding included where nothing is gathered."""
        return len(self.sequence_T)

    @cached_property
    def is_full(self) -> bool:
        """Whether there is no padding."""
        return sum(self.lengths) == self.num_positions

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each sequence."""
        return tuple(end - start for start, end in self.bounds)

    @cached_property
    def _one_hot_TB(self) -> Float[Tensor, "positions batch"]:
        """1 where a position belongs to a sequence, float32."""
        one_hot_TB = torch.nn.functional.one_hot(self.sequence_T, self.num_sequences + 1)
        return one_hot_TB[:, : self.num_sequences].float()

    def sum_by_sequence(
        self, value_NT: Float[Tensor, "rows positions"]
    ) -> Float[Tensor, "rows batch"]:
        """Sum the columns of each sequence."""
        if self.mask_BL is None:
            return value_NT @ self._one_hot_TB.to(value_NT.dtype)
        value_BNL = value_NT.unflatten(1, self.mask_BL.shape).transpose(0, 1)
        return torch.bmm(value_BNL, self.mask_BL.to(value_NT.dtype)[..., None]).squeeze(2).mT

    def sum_rows(
        self, value_TN: Float[Tensor, "positions columns"]
    ) -> Float[Tensor, "batch columns"]:
        """Sum the rows of each sequence."""
        if self.mask_BL is None:
            return self._one_hot_TB.to(value_TN.dtype).mT @ value_TN
        value_BLN = value_TN.unflatten(0, self.mask_BL.shape)
        return torch.bmm(self.mask_BL.to(value_TN.dtype)[:, None], value_BLN).squeeze(1)

    def only(self, index: Int[Tensor, " kept"]) -> Layout:
        """Return the layout of the positions in `index`, which must be in ascending order."""
        sequence_T = self.sequence_T[index]
        return Layout(self.grid, None, sequence_T, _bounds(sequence_T, self.num_sequences))

    def trim(self, kept_T: Bool[Tensor, " positions"]) -> Layout:
        """Return the layout with each sequence cut to its first to last position that is kept."""
        place = torch.arange(self.num_positions, device=kept_T.device)
        code_T = torch.where(kept_T, self.sequence_T, self.num_sequences)
        first_B = torch.full((self.num_sequences + 1,), self.num_positions, device=kept_T.device)
        first_B = first_B.scatter_reduce(0, code_T, place, "amin")
        end_B = torch.zeros_like(first_B).scatter_reduce(0, code_T, place + 1, "amax")
        first_B = torch.minimum(first_B, end_B)
        inside_T = (place >= first_B[self.sequence_T]) & (place < end_B[self.sequence_T])
        sequence_T = torch.where(inside_T, self.sequence_T, self.num_sequences)
        bounds = torch.stack([first_B, end_B], dim=1)[: self.num_sequences].tolist()
        pairs = tuple((start, end) for start, end in bounds)
        return Layout(self.grid, None, sequence_T, pairs, trimmed=True)


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
    mask_BL = None
    if rows == num_sequences and order_T is None:
        own_BL = sequence_ids == torch.arange(rows, device=sequence_ids.device)[:, None]
        mask_BL = own_BL.float() if bool((own_BL | (sequence_ids < 0)).all()) else None
    return Layout((rows, columns), order_T, sequence_T, bounds, mask_BL)


def _check_ids(sequence_ids: Tensor, num_sequences: int) -> None:
    lowest, highest = -1, -1
    if sequence_ids.numel():
        lowest, highest = torch.stack(sequence_ids.aminmax()).tolist()
    present_RB = torch.zeros(
        sequence_ids.shape[0], max(highest, num_sequences - 1) + 2, device=sequence_ids.device
    ).scatter_(1, sequence_ids.long().clamp(min=-1) + 1, 1.0)[:, 1:]
    rows_of_B = present_RB.sum(dim=0)
    if lowest < -1 or highest >= num_sequences or bool((rows_of_B == 0).any()):
        raise ProxstepError(
            f"coefficients has {num_sequences} numbers and sequence_ids {lowest} to {highest}: it "
            f"must name each sequence that has a coefficient, 0 to {num_sequences - 1}, and no "
            "other; -1 is padding. "
            "sequence_ids(attention_mask) makes them from a mask"
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


class Rows(NamedTuple):
    """Sampled positions: their priorities, whose they are, and their importance."""

    priority_K: Float[Tensor, " samples"]
    key_K: Int[Tensor, " samples"]
    group_K: Int[Tensor, " samples"]
    weight_K: Float[Tensor, " samples"]

    def at(self, index: Int[Tensor, " some"]) -> Rows:
        """Return some of them."""
        return Rows(*(value[index] for value in self))


def smallest(value_T: Float[Tensor, " positions"], count: int | None) -> Int[Tensor, " samples"]:
    """Return the positions of the `count` smallest finite numbers, or of all of them."""
    order_T = value_T.argsort(stable=True)[: int(value_T.isfinite().sum())]
    return order_T if count is None else order_T[:count]


# -- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Which statistics of each sequence's gradient a rule needs."""

    fisher: bool = False
    norm: bool = False
    ntk: bool = False
    along: bool = False
    """The inner product with the step's gradient so far."""


@dataclass(frozen=True)
class Statistics:
    """What is known of some sequences in one layer; None for what no rule needs.

    Attributes:
        coefficient_B: -dL / d log pi(y_b); for REINFORCE the advantage.
        fisher_sq_B: F_b^2, the squared length of G_b in the Fisher metric.
        norm_sq_B: |G_b|^2.
        ntk_BB: The layer's kernel, K_bc = <G_b, G_c>.
        along_B: <G_b, M> with the gradient M that earlier microbatches accumulated, to maximize.
    """

    coefficient_B: Float[Tensor, " batch"]
    fisher_sq_B: Float[Tensor, " batch"] | None = None
    norm_sq_B: Float[Tensor, " batch"] | None = None
    ntk_BB: Float[Tensor, "batch batch"] | None = None
    along_B: Float[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer's reduction.

    Attributes:
        out_features: O.
        in_features: I.
        lengths: Positions of each sequence.
        num_samples: K.
        itemsize: Bytes of a number in the buffer.
        device: Type of the device, for `FLOPS_PER_BYTE`.
    """

    out_features: int
    in_features: int
    lengths: tuple[int, ...]
    num_samples: int
    itemsize: int = 4
    device: str = "cpu"

    @property
    def area(self) -> int:
        """Numbers in one gradient."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Plan:
    """How one layer's reduction is done.

    Attributes:
        gradients: "none" leaves all gradients of single sequences implicit (ghost), "sequences"
            forms them for `size` sequences at a time, "blocks" for `size` output features at a
            time.
        size: See above; 0 for "none".
        ghost_fisher: Whether F_b comes from Grams rather than from the gradients.
    """

    gradients: Literal["none", "sequences", "blocks"]
    size: int = 0
    ghost_fisher: bool = True


def choose(
    shape: Shape, needs: Needs, *, separable: bool, memory_budget: int = MEMORY_BUDGET
) -> Plan:
    """Return the plan that the cost model finds the cheapest within the memory budget.

    Where none is within it, the one that takes the least.

    Args:
        shape: Sizes of the layer and the microbatch.
        needs: What the rule needs.
        separable: Whether each sequence's weight can be known before the others' statistics.
        memory_budget: Bytes.
    """
    num_sequences, positions = len(shape.lengths), sum(shape.lengths)
    one_gradient = shape.area * shape.itemsize
    whole = num_sequences * one_gradient <= memory_budget
    size = num_sequences if whole else max(1, memory_budget // one_gradient)
    product = 2.0 * positions * shape.area
    traffic = shape.itemsize * FLOPS_PER_BYTE.get(shape.device, FLOPS_PER_BYTE["cuda"])
    formed = traffic * num_sequences * shape.area
    gram = 3 * 2.0 * num_sequences**2 * shape.area * needs.ntk  # a third of the speed: it is thin
    ghost_fisher = 2.0 * shape.num_samples * positions * (shape.in_features + shape.out_features)
    direct_fisher = 2.0 * shape.num_samples * num_sequences * shape.area
    fisher = min(ghost_fisher, direct_fisher) * needs.fisher
    costs = {Plan("none"): product + ghost_fisher * needs.fisher + _ghost_pairs(shape, needs)}
    if whole or (separable and not needs.ntk):
        in_parts = ghost_fisher * needs.fisher if not whole else fisher
        plan = Plan("sequences", size, in_parts >= ghost_fisher or not whole)
        costs[plan] = product + 3 * formed + gram + in_parts
    if needs.norm or needs.ntk:
        features = max(1, memory_budget // (num_sequences * shape.in_features * shape.itemsize))
        block = min(features, shape.out_features)
        plan = Plan("blocks", block, fisher >= ghost_fisher)
        costs[plan] = 2 * product + 2 * formed + gram + fisher
    fitting = [plan for plan in costs if held(shape, needs, plan) <= memory_budget]
    if fitting:
        return min(fitting, key=lambda plan: costs[plan])
    return min(costs, key=lambda plan: held(shape, needs, plan))


def held(shape: Shape, needs: Needs, plan: Plan) -> int:
    """Return the bytes that a plan takes at a time; Grams for F_b come in parts that fit."""
    if plan.gradients == "sequences":
        return plan.size * shape.area * shape.itemsize
    if plan.gradients == "blocks":
        return plan.size * len(shape.lengths) * shape.in_features * shape.itemsize
    pairs = 2 * max(shape.lengths, default=0) ** 2  # the two Grams of the longest sequence
    return pairs * shape.itemsize * (needs.norm or needs.ntk)


def _ghost_pairs(shape: Shape, needs: Needs) -> float:
    """Return the cost of norms or kernel in ghost form."""
    width = shape.in_features + shape.out_features
    squares = 2.0 * sum(length**2 for length in shape.lengths) * width
    if needs.ntk:
        return float(sum(shape.lengths)) ** 2 * width + squares / 2
    return squares * needs.norm


Add = Callable[[Float[Tensor, " batch"], Tensor | None], Tensor]


@dataclass(frozen=True)
class Part:
    """Some sequences of a layer: what was measured, and what is done with their weights.

    Attributes:
        sequences: Which they are.
        add: Adds sum_b weight_b G_b to the total of the parts before, None for the first.
        cross_KB: <G_k, G_b> with the sample's positions; None where it is not needed.
        norm_sq_B: |G_b|^2; None where it is not needed.
        ntk_BB: K_bc; None where it is not needed.
    """

    sequences: slice
    add: Add
    cross_KB: Float[Tensor, "samples batch"] | None = None
    norm_sq_B: Float[Tensor, " batch"] | None = None
    ntk_BB: Float[Tensor, "batch batch"] | None = None


# -- the workspace ---------------------------------------------------------------------------------


class Memory:
    """A reused buffer and a cache of one entry per purpose, both empty again after `release`.

    A fresh buffer for every layer would cost more time in page faults than in arithmetic. Layers
    that see the same input (queries, keys and values; gate and up) follow each other in backward,
    so one entry is enough to share its Gram.

    Args:
        budget: Bytes that the statistics of one layer may take at a time.

    Attributes:
        same_positions: Whether the microbatch's parameters are all measured on the same positions.
    """

    def __init__(self, budget: int = MEMORY_BUDGET) -> None:
        self.budget = budget
        self.same_positions = True
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

"""What ISOPO needs of one layer's backward: statistics per sequence, the contraction.

A parameter's gradient is a sum over token positions, G = sum_t G_t, and each kind of layer has its
own G_t. All statistics are sums of the pair kernel <G_s, G_t> over positions, so each kind supplies
three small functions (the pair kernel, its diagonal, the contraction), and the statistics are
written once. No per-sequence gradient is materialized.

Legend for shape suffixes: T positions that belong to a sequence (padding left out), B sequences, K
sampled positions, O and I output and input features, D features of a vector parameter, V rows of an
embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from proxstep.types import Bool, Float, Int, Tensor

Index = Tensor | slice
ALL = slice(None)


@dataclass(frozen=True)
class Layout:
    """Which token position of a microbatch belongs to which sequence.

    Attributes:
        grid: Shape of the token grid, (rows, columns).
        position_T: Index in the flattened grid of every position that belongs to a sequence.
        sequence_T: The sequence of each of those positions, 0 to num_sequences - 1.
        sample_K: Indices into position_T: the positions on which the Fisher norm is estimated.
        num_sequences: B.
    """

    grid: tuple[int, int]
    position_T: Int[Tensor, " positions"]
    sequence_T: Int[Tensor, " positions"]
    sample_K: Int[Tensor, " samples"]
    num_sequences: int

    def rows(self) -> tuple[Int[Tensor, " length"], ...]:
        """Return each sequence's indices into position_T."""
        order_T = self.sequence_T.argsort(stable=True)
        lengths = self.sequence_T.bincount(minlength=self.num_sequences).tolist()
        return order_T.split(lengths)

    def sum_by_sequence(
        self, value_NT: Float[Tensor, "rows positions"]
    ) -> Float[Tensor, "rows batch"]:
        """Sum the columns of each sequence."""
        zeros_NB = value_NT.new_zeros(value_NT.shape[0], self.num_sequences)
        return zeros_NB.index_add_(1, self.sequence_T, value_NT)


@runtime_checkable
class PositionGradients(Protocol):
    """The gradients G_t of one parameter at the positions of a layout, in factored form."""

    def pairs(self, row: Index, column: Index) -> Float[Tensor, "rows columns"]:
        """Return <G_s, G_t> for the positions s in `row` and t in `column`."""
        ...

    def squares(self, row: Index) -> Float[Tensor, " rows"]:
        """Return |G_t|^2 for the positions t in `row`."""
        ...

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Tensor:
        """Return sum_t weight_t G_t in the parameter's shape."""
        ...


@dataclass(frozen=True)
class OuterGradients:
    """A matrix: G_t = g_t a_t^T with g the gradient of the layer's output and a its input."""

    grad_TO: Float[Tensor, "positions out"]
    input_TI: Float[Tensor, "positions in"]

    def pairs(self, row: Index, column: Index) -> Float[Tensor, "rows columns"]:
        """Return (g_s . g_t) (a_s . a_t)."""
        return _gram(self.grad_TO, row, column) * _gram(self.input_TI, row, column)

    def squares(self, row: Index) -> Float[Tensor, " rows"]:
        """Return |g_t|^2 |a_t|^2."""
        return _squares(self.grad_TO[row]) * _squares(self.input_TI[row])

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "out in"]:
        """Return (weight g)^T a: one product, as dear as the ordinary weight gradient."""
        return (self.grad_TO * weight_T.to(self.grad_TO.dtype)[:, None]).mT @ self.input_TI


@dataclass(frozen=True)
class LookupGradients:
    """An embedding: a matrix whose input is one-hot, so a_s . a_t = [token_s = token_t]."""

    grad_TD: Float[Tensor, "positions features"]
    token_T: Int[Tensor, " positions"]
    num_embeddings: int

    def pairs(self, row: Index, column: Index) -> Float[Tensor, "rows columns"]:
        """Return (g_s . g_t) [token_s = token_t]."""
        same = self.token_T[row][:, None] == self.token_T[column][None, :]
        return _gram(self.grad_TD, row, column) * same

    def squares(self, row: Index) -> Float[Tensor, " rows"]:
        """Return |g_t|^2."""
        return _squares(self.grad_TD[row])

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "vocab features"]:
        """Add each position's weighted gradient to its token's row."""
        weighted_TD = self.grad_TD * weight_T.to(self.grad_TD.dtype)[:, None]
        zeros_VD = self.grad_TD.new_zeros(self.num_embeddings, self.grad_TD.shape[1])
        return zeros_VD.index_add_(0, self.token_T, weighted_TD)


@dataclass(frozen=True)
class VectorGradients:
    """A vector (a normalization's weight, a bias): G_t is a vector itself."""

    grad_TD: Float[Tensor, "positions features"]

    def pairs(self, row: Index, column: Index) -> Float[Tensor, "rows columns"]:
        """Return G_s . G_t."""
        return _gram(self.grad_TD, row, column)

    def squares(self, row: Index) -> Float[Tensor, " rows"]:
        """Return |G_t|^2."""
        return _squares(self.grad_TD[row])

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, " features"]:
        """Return the weighted sum."""
        return weight_T.to(self.grad_TD.dtype) @ self.grad_TD


def fisher_squares(
    gradients: PositionGradients, layout: Layout
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Return F_b^2 = sum_k <G_k, G_b>^2 / sum_k |G_k|^2 over the sampled positions k.

    Args:
        gradients: The parameter's position-wise gradients.
        layout: The microbatch, with its sample.

    Returns:
        F_b^2 in float32 or better, and which of the estimates were exactly zero and were filled in.

    Source: arXiv 2512.23353, equations 3 to 6.

    Differs: a sequence that is orthogonal to every sampled position has the estimate 0 although its
        gradient is not 0
    (an embedding whose sampled tokens it does not contain); figure 3 would scale it by 1e4. It gets
    the mean of the other sequences instead.
    """
    cross_KB = layout.sum_by_sequence(gradients.pairs(layout.sample_K, ALL))
    total = gradients.squares(layout.sample_K).sum()
    square_B = cross_KB.square().sum(dim=0) / torch.where(total > 0, total, torch.ones_like(total))
    empty_B = square_B == 0
    mean = square_B.sum() / (~empty_B).sum().clamp(min=1)
    return torch.where(empty_B, mean, square_B), empty_B


def norm_squares(gradients: PositionGradients, layout: Layout) -> Float[Tensor, " batch"]:
    """Return |G_b|^2, the squared Euclidean norm of each sequence's gradient."""
    squares = []
    for row in layout.rows():
        squares.append(gradients.pairs(row, row).sum())
    return torch.stack(squares).clamp(min=0)


def ntk(gradients: PositionGradients, layout: Layout) -> Float[Tensor, "batch batch"]:
    """Return the kernel K_bc = <G_b, G_c>, one row of sequences at a time."""
    rows = []
    for row in layout.rows():
        rows.append(layout.sum_by_sequence(gradients.pairs(row, ALL)).sum(dim=0))
    kernel_BB = torch.stack(rows)
    return (kernel_BB + kernel_BB.mT) / 2


def _gram(value_TD: Tensor, row: Index, column: Index) -> Tensor:
    wide_TD = _at_least_float32(value_TD)
    return wide_TD[row] @ wide_TD[column].mT


def _squares(value_TD: Tensor) -> Tensor:
    return _at_least_float32(value_TD).square().sum(dim=1)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))

"""What ISOPO needs of one parameter's backward: statistics per sequence, and the contraction.

A parameter's gradient is a sum over token positions, G = sum_t G_t. A matrix has G_t = g_t a_t^T,
so that the inner product of two positions is (g_s . g_t)(a_s . a_t) and all statistics can be had
without forming any gradient (the ghost form); `forms` says when it pays. Embeddings and vectors
have gradients per sequence that are small, and are formed.

Legend for shape suffixes: T positions, B sequences, K sampled positions, O and I output and input
features, D features of a vector parameter, V rows of an embedding, U rows of an embedding's
gradient that are not zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from proxstep.isopo.layout import Layout
from proxstep.isopo.plan import Memory
from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class OuterGradients:
    """A matrix: G_t = g_t a_t^T with g the gradient of the layer's output and a its input."""

    grad_TO: Float[Tensor, "positions out"]
    input_TI: Float[Tensor, "positions in"]

    def at(self, index: Int[Tensor, " samples"]) -> OuterGradients:
        """Return those of some positions."""
        return type(self)(self.grad_TO[index], self.input_TI[index])

    @property
    def _gram_itemsize(self) -> int:
        """Bytes of a number in a Gram."""
        return _wide_dtype(self.grad_TO.dtype).itemsize

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""
        return _wide(self.grad_TO).square().sum(1) * _wide(self.input_TI).square().sum(1)

    def nonzero(self) -> Bool[Tensor, " positions"]:
        """Return where g_t is not zero: a head sees no gradient at the prompt."""
        return torch.linalg.vector_norm(self.grad_TO, dim=1) != 0

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "out in"]:
        """Return sum_t weight_t G_t: one product, as dear as the ordinary weight gradient."""
        grad_TO, input_TI = self.grad_TO, self.input_TI
        column_T1 = weight_T.to(grad_TO.dtype)[:, None]
        if grad_TO.shape[1] <= input_TI.shape[1]:
            return (grad_TO * column_T1).mT @ input_TI
        return grad_TO.mT @ (input_TI * column_T1)

    def cross(
        self, sample: OuterGradients, layout: Layout, memory: Memory
    ) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b> in ghost form, so many samples at a time that memory suffices."""
        row_bytes = self._gram_itemsize * max(layout.num_positions, 1)
        chunk = max(1, memory.budget // (2 * row_bytes))
        if len(sample.grad_TO) <= chunk:
            gram_KT = memory.shared(
                "cross",
                self.input_TI,
                layout,
                lambda: product(sample.input_TI, self.input_TI.mT),
            )
            return layout.sum_by_sequence(product(sample.grad_TO, self.grad_TO.mT) * gram_KT)
        parts = []
        for grad_KO, input_KI in zip(
            sample.grad_TO.split(chunk), sample.input_TI.split(chunk), strict=True
        ):
            gram_KT = product(grad_KO, self.grad_TO.mT)
            gram_KT *= product(input_KI, self.input_TI.mT)
            parts.append(layout.sum_by_sequence(gram_KT))
        return torch.cat(parts)

    def norm_squares(self, layout: Layout, memory: Memory) -> Float[Tensor, " batch"]:
        """Return |G_b|^2 in ghost form."""

        def input_gram(part: tuple[int, int]) -> Tensor:
            input_LI = self.input_TI[slice(*part)]
            return product(input_LI, input_LI.mT)

        grams: Iterable[Tensor] = map(input_gram, layout.bounds)
        numbers = sum((end - start) ** 2 for start, end in layout.bounds)
        if self._gram_itemsize * numbers <= memory.budget:
            grams = memory.shared(
                "norm", self.input_TI, layout, lambda: [input_gram(part) for part in layout.bounds]
            )
        pairs = zip(layout.bounds, grams, strict=True)
        squares = []
        for (start, end), gram_LL in pairs:
            grad_LO = self.grad_TO[start:end]
            squares.append((product(grad_LO, grad_LO.mT) * gram_LL).sum())
        return torch.stack(squares).clamp(min=0)

    def ntk(self, layout: Layout) -> Float[Tensor, "batch batch"]:
        """Return K_bc = <G_b, G_c> in ghost form."""
        size = layout.num_sequences
        kernel = [[self.grad_TO.new_zeros(())] * size for _ in range(size)]
        for b, (b0, b1) in enumerate(layout.bounds):
            for c, (c0, c1) in list(enumerate(layout.bounds))[b:]:
                gram = product(self.grad_TO[b0:b1], self.grad_TO[c0:c1].mT)
                gram *= product(self.input_TI[b0:b1], self.input_TI[c0:c1].mT)
                kernel[b][c] = kernel[c][b] = gram.sum()
        return torch.stack([torch.stack(row) for row in kernel])

    def by_sequence(
        self, bounds: tuple[tuple[int, int], ...], memory: Memory, features: slice = slice(None)
    ) -> Float[Tensor, "some out in"]:
        """Return G_b of some sequences, in the workspace, restricted to some output features."""
        width = len(range(*features.indices(self.grad_TO.shape[1])))
        shape = (len(bounds), width, self.input_TI.shape[1])
        buffer = memory.buffer(shape, self.grad_TO, _wide_dtype(self.grad_TO.dtype))
        for out, (start, end) in zip(buffer, bounds, strict=True):
            product(self.grad_TO[start:end, features].mT, self.input_TI[start:end], out=out)
        return buffer

    def cross_with(
        self, gradient_BOI: Float[Tensor, "batch out in"], features: slice = slice(None)
    ) -> Float[Tensor, "samples batch"]:
        """Return g_k . G_b a_k for these positions as samples, from gradients that are formed."""
        dtype = gradient_BOI.dtype
        moved_BOK = gradient_BOI @ self.input_TI.to(dtype).mT
        return (moved_BOK * self.grad_TO[:, features].to(dtype).mT).sum(dim=1).mT


@dataclass(frozen=True)
class VectorGradients:
    """A vector (a normalization's weight, a bias): G_t is a vector itself."""

    grad_TD: Float[Tensor, "positions features"]

    def at(self, index: Int[Tensor, " samples"]) -> VectorGradients:
        """Return those of some positions."""
        return type(self)(self.grad_TD[index])

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""
        return _wide(self.grad_TD).square().sum(1)

    def sums(self, layout: Layout) -> VectorSums:
        """Return each sequence's gradient."""
        wide_TD = _wide(self.grad_TD)
        return VectorSums(layout.one_hot_TB.to(wide_TD.dtype).mT @ wide_TD)

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, " features"]:
        """Return sum_t weight_t G_t."""
        return weight_T.to(_wide_dtype(self.grad_TD.dtype)) @ _wide(self.grad_TD)


@dataclass(frozen=True)
class VectorSums:
    """The gradients G_b of a vector parameter."""

    sum_BD: Float[Tensor, "batch features"]

    def cross(self, sample: VectorGradients) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b>."""
        return sample.grad_TD.to(self.sum_BD.dtype) @ self.sum_BD.mT

    def norm_squares(self) -> Float[Tensor, " batch"]:
        """Return |G_b|^2."""
        return self.sum_BD.square().sum(1)

    def ntk(self) -> Float[Tensor, "batch batch"]:
        """Return <G_b, G_c>."""
        return self.sum_BD @ self.sum_BD.mT

    def contract(self, weight_B: Float[Tensor, " batch"]) -> Float[Tensor, " features"]:
        """Return sum_b weight_b G_b."""
        return weight_B.to(self.sum_BD.dtype) @ self.sum_BD


@dataclass(frozen=True)
class LookupGradients:
    """An embedding: a matrix whose input is one-hot, so G_t has one row, that of its token."""

    grad_TD: Float[Tensor, "positions features"]
    token_T: Int[Tensor, " positions"]
    num_embeddings: int

    def at(self, index: Int[Tensor, " samples"]) -> LookupGradients:
        """Return those of some positions."""
        return type(self)(self.grad_TD[index], self.token_T[index], self.num_embeddings)

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""
        return _wide(self.grad_TD).square().sum(1)

    def sums(self, layout: Layout) -> LookupSums:
        """Return each sequence's gradient: its rows that are not zero."""
        stride = layout.num_sequences + 1  # padding is a sequence of its own here, and left out
        code_T = self.token_T.long() * stride + layout.sequence_T
        code_U, row_T = code_T.unique(return_inverse=True)
        wide_TD = _wide(self.grad_TD)
        sum_UD = wide_TD.new_zeros(len(code_U), wide_TD.shape[1]).index_add_(0, row_T, wide_TD)
        kept = code_U % stride != layout.num_sequences
        sequences = (self.num_embeddings, layout.num_sequences)
        return LookupSums(sum_UD[kept], code_U[kept], sequences)

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "vocab features"]:
        """Return sum_t weight_t G_t."""
        weighted_TD = self.grad_TD * weight_T.to(self.grad_TD.dtype)[:, None]
        zeros_VD = self.grad_TD.new_zeros(self.num_embeddings, self.grad_TD.shape[1])
        return zeros_VD.index_add_(0, self.token_T, weighted_TD)


@dataclass(frozen=True)
class LookupSums:
    """The gradients G_b of an embedding, as rows.

    Attributes:
        sum_UD: The rows, ordered by token and then by sequence.
        code_U: token * (num_sequences + 1) + sequence of each row.
        sizes: Number of embeddings, and of sequences.
    """

    sum_UD: Float[Tensor, "rows features"]
    code_U: Int[Tensor, " rows"]
    sizes: tuple[int, int]

    @cached_property
    def token_U(self) -> Int[Tensor, " rows"]:
        """Each row's token."""
        return self.code_U // (self.sizes[1] + 1)

    @cached_property
    def sequence_U(self) -> Int[Tensor, " rows"]:
        """Each row's sequence."""
        return self.code_U % (self.sizes[1] + 1)

    def cross(self, sample: LookupGradients) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b>: the sample's gradient times the sequence's row of the same token."""
        num_sequences = self.sizes[1]
        if not len(self.code_U):
            return self.sum_UD.new_zeros(len(sample.token_T), num_sequences)
        columns = []
        for sequence in range(num_sequences):
            code_K = sample.token_T.long() * (num_sequences + 1) + sequence
            row_K = torch.searchsorted(self.code_U, code_K).clamp(max=len(self.code_U) - 1)
            product_K = (sample.grad_TD.to(self.sum_UD.dtype) * self.sum_UD[row_K]).sum(1)
            columns.append(torch.where(self.code_U[row_K] == code_K, product_K, 0.0))
        return torch.stack(columns, dim=1)

    def norm_squares(self) -> Float[Tensor, " batch"]:
        """Return |G_b|^2."""
        zeros_B = self.sum_UD.new_zeros(self.sizes[1])
        return zeros_B.index_add_(0, self.sequence_U, self.sum_UD.square().sum(1))

    def ntk(self) -> Float[Tensor, "batch batch"]:
        """Return <G_b, G_c>, from the tokens that both contain; some tokens at a time."""
        num_sequences = self.sizes[1]
        kernel_BB = self.sum_UD.new_zeros(num_sequences, num_sequences)
        _, place_U = self.token_U.unique(return_inverse=True)
        for first in range(0, int(place_U.max()) + 1 if len(place_U) else 0, 256):
            here = (place_U >= first) & (place_U < first + 256)
            dense_BCD = self.sum_UD.new_zeros(num_sequences, 256, self.sum_UD.shape[1])
            dense_BCD[self.sequence_U[here], place_U[here] - first] = self.sum_UD[here]
            flat_BN = dense_BCD.flatten(1)
            kernel_BB += flat_BN @ flat_BN.mT
        return kernel_BB

    def contract(self, weight_B: Float[Tensor, " batch"]) -> Float[Tensor, "vocab features"]:
        """Return sum_b weight_b G_b."""
        weighted_UD = self.sum_UD * weight_B.to(self.sum_UD.dtype)[self.sequence_U][:, None]
        zeros_VD = self.sum_UD.new_zeros(self.sizes[0], self.sum_UD.shape[1])
        return zeros_VD.index_add_(0, self.token_U, weighted_UD)


PositionGradients = OuterGradients | VectorGradients | LookupGradients


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right, accumulated and kept in float32 or better."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out=out)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def gram(gradient_BN: Float[Tensor, "batch numbers"]) -> Float[Tensor, "batch batch"]:
    """Return all inner products of B long rows, in column blocks that stay in the cache."""
    batch, numbers = gradient_BN.shape
    block = 8192
    whole = numbers - numbers % block
    blocks = gradient_BN[:, :whole].view(batch, whole // block, block).transpose(0, 1)
    rest_BN = gradient_BN[:, whole:]
    return torch.bmm(blocks, blocks.mT).sum(dim=0) + rest_BN @ rest_BN.mT


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(value: Tensor) -> Tensor:
    return value.to(_wide_dtype(value.dtype))

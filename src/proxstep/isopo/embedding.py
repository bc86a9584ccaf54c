"""Embeddings: a matrix whose input is one-hot, so that G_t has one row, that of its token.

The gradients of sequences are small, and are formed.

Legend for shape suffixes: T positions, B sequences, K sampled positions, D features, V rows of an
embedding, U rows of an embedding's gradient that are not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from proxstep.isopo.hooks import (
    Owner,
    PositionGradients,
    SequenceGradients,
    covers,
    owner_of,
    parameter_gradient,
)
from proxstep.isopo.plan import Layout, Memory, Needs, Part
from proxstep.logprobs.tokens import wide
from proxstep.typing import Float, Int, Tensor


class _Embedding(torch.autograd.Function):
    """A table's rows, whose gradient comes from the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        microbatch_id: Tensor,
        owner: int,
        key: str,
        lead: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(token)  # as it is given: a second forward may not know the grid
        ctx.lead = lead
        ctx.shape, ctx.place = list(weight.shape), (microbatch_id, owner, key)
        ctx.padding_idx = padding_idx
        return nn.functional.embedding(token.expand(lead), weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token = ctx.saved_tensors[0].expand(ctx.lead)
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((token == ctx.padding_idx)[..., None], 0.0)
        values, numbers = [grad, token[..., None]], [ctx.shape[0]]
        grad_weight = parameter_gradient("LookupGradients", values, numbers, ctx.shape, *ctx.place)
        return None, grad_weight, None, None, None, None, None


def _is_embedding(module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding):
        return False
    cls = type(module)
    scaled = cls.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    ordinary = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return ordinary and (cls.forward is nn.Embedding.forward or scaled)


@covers(_is_embedding)
def _forward(self: Any, input: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, input)
    owner, site = found
    rows = routed_embedding(input, self.weight, self.padding_idx, owner, site.key("weight"))
    if type(self).forward is nn.Embedding.forward:
        return rows
    scale = self.embed_scale  # a tensor in Gemma's classes, a number in others
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def routed_embedding(
    token: Tensor, weight: Tensor, padding_idx: int | None, owner: Owner, key: str
) -> Tensor:
    """Return the tokens' rows, with a gradient that goes to the owner.

    Positions are often looked up once, as (1, columns) or (columns,), and broadcast over the rows
    of the grid; each row needs its own, and the result has them.
    """
    lead = tuple(token.shape)
    if owner.grid is not None and lead in (owner.grid[1:], (1, *owner.grid[1:])):
        lead = owner.grid
    place = (owner.microbatch_id, owner.number, key)
    return _Embedding.apply(token, weight, padding_idx, *place, lead)


@dataclass(frozen=True)
class LookupGradients(PositionGradients):
    """An embedding: a matrix whose input is one-hot, so G_t has one row, that of its token."""

    grad_TD: Float[Tensor, "positions features"]
    token_T: Int[Tensor, " positions"]
    num_embeddings: int

    def at(self, index: Int[Tensor, " samples"]) -> LookupGradients:
        """Return those of some positions."""
        return type(self)(self.grad_TD[index], self.token_T[index], self.num_embeddings)

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""
        return wide(self.grad_TD).square().sum(1)

    def parts(
        self,
        layout: Layout,
        needs: Needs,
        sample: LookupGradients | None,
        memory: Memory,
        *,
        separable: bool,
    ) -> Iterator[Part]:
        """Measure the sequences: F_b alone in ghost form, else from each sequence's gradient."""
        if sample is None or needs.norm or needs.ntk or self.grad_TD.itemsize < 4:
            yield from super().parts(layout, needs, sample, memory, separable=separable)
            return
        crosses, row_bytes = [], 2 * self.grad_TD.itemsize * max(self.num_rows, 1)
        for index_K in torch.arange(sample.num_rows).split(max(1, memory.budget // row_bytes)):
            gram_KT = sample.grad_TD[index_K] @ self.grad_TD.mT
            gram_KT *= sample.token_T[index_K, None] == self.token_T
            crosses.append(layout.sum_by_sequence(gram_KT))

        def add(weight_B: Tensor, _: Tensor | None) -> Tensor:
            return self.contract(nn.functional.pad(weight_B, (0, 1))[layout.sequence_T])

        yield Part(slice(None), add, torch.cat(crosses))

    def sums(self, layout: Layout) -> LookupSums:
        """Return each sequence's gradient: its rows that are not zero."""
        stride = layout.num_sequences + 1  # padding is a sequence of its own here, and left out
        code_T = self.token_T.long() * stride + layout.sequence_T
        code_U, row_T = code_T.unique(return_inverse=True)
        wide_TD = wide(self.grad_TD)
        sum_UD = wide_TD.new_zeros(len(code_U), wide_TD.shape[1]).index_add_(0, row_T, wide_TD)
        kept = code_U % stride != layout.num_sequences
        sequences = (self.num_embeddings, layout.num_sequences)
        return LookupSums(sum_UD[kept], code_U[kept], sequences)

    def along(self, direction: Float[Tensor, "vocab features"]) -> Float[Tensor, " positions"]:
        """Return <G_t, direction>: with the row of the position's token."""
        return (wide(self.grad_TD) * wide(direction)[self.token_T]).sum(dim=1)

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "vocab features"]:
        """Return sum_t weight_t G_t."""
        weighted_TD = self.grad_TD * weight_T.to(self.grad_TD.dtype)[:, None]
        zeros_VD = self.grad_TD.new_zeros(self.num_embeddings, self.grad_TD.shape[1])
        return zeros_VD.index_add_(0, self.token_T, weighted_TD)


@dataclass(frozen=True)
class LookupSums(SequenceGradients):
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
        sequence_B = torch.arange(num_sequences, device=sample.token_T.device)
        code_KB = sample.token_T.long()[:, None] * (num_sequences + 1) + sequence_B
        row_KB = torch.searchsorted(self.code_U, code_KB).clamp(max=len(self.code_U) - 1)
        product_KU = sample.grad_TD.to(self.sum_UD.dtype) @ self.sum_UD.mT
        return torch.where(self.code_U[row_KB] == code_KB, product_KU.gather(1, row_KB), 0.0)

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

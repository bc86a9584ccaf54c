"""The output layer under the isometric rule, without T x V logits: chunked, in ghost form.

The gradient of the log-probabilities with respect to a row of logits is onehot(token) - softmax, so
backward computes it again from the hidden states, one sequence after another, and each sequence's
statistics, weight and contraction follow while its rows are there.

Legend for shape suffixes: N rows (positions with a log-probability), n rows of one chunk, K sampled
positions, B sequences, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import OWNERS, SKIPPED, PositionGradients, owner_of
from proxstep.isopo.linear import OuterGradients, product
from proxstep.isopo.microbatch import Microbatch
from proxstep.isopo.plan import Layout, Memory, Needs, Part
from proxstep.isopo.proma import IntraProjectingRule
from proxstep.logprobs.chunked import (
    ChunkedLogProbs,
    autocast_head,
    chunked_log_probs,
    default_chunk_size,
    logit_gradient,
    logits_of,
    wide_dtype,
)
from proxstep.typing import Float, Int, Tensor


def head_log_probs(
    head: nn.Linear,
    hidden_ND: Float[Tensor, "rows features"],
    token_N: Int[Tensor, " rows"],
    position_N: Int[Tensor, " rows"],
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log pi(token) at each row, with the head's gradient under ISOPO where it is installed.

    Args:
        head: The output layer.
        hidden_ND: Its inputs at the positions that predict the tokens.
        token_N: The tokens.
        position_N: Index in the flattened token grid of each row's hidden state.
        temperature: Of the sampling.
        chunk_size: As in `proxstep.logprobs.chunked.chunked_log_probs`.
        with_entropy: Return the entropies as well.

    Returns:
        As `chunked_log_probs`.

    Raises:
        ProxstepError: In backward, if the rule needs the head's kernel (the natural rule, PROMA,
            fisher="sequences") or all its gradients (Intra-PROMA).
    """
    found = owner_of(head)
    if found is None:
        scores = chunked_log_probs(
            hidden_ND,
            head.weight,
            token_N,
            bias_V=head.bias,
            temperature=temperature,
            chunk_size=chunk_size,
            with_entropy=True,
        )
        return scores if with_entropy else scores[0]
    owner, site = found
    key = site.key("weight")
    if head.bias is not None and head.bias.requires_grad:
        raise ProxstepError(
            f"{site.key('bias')}: the chunked head does not cover a bias under ISOPO; use the full "
            "head, or freeze the bias"
        )
    hidden_ND, weight_VD, bias_V = autocast_head(hidden_ND, head.weight, head.bias)
    size = chunk_size or default_chunk_size(weight_VD)
    log_prob_N, entropy_N = _GhostHead.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        token_N,
        temperature,
        size,
        with_entropy,
        position_N,
        owner.microbatch_id,
        owner.number,
        key,
    )
    return (log_prob_N, entropy_N) if with_entropy else log_prob_N


class _GhostHead(torch.autograd.Function):
    """`ChunkedLogProbs`, whose weight's gradient comes from the microbatch's rule."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *plain, ctx.position_N, ctx.microbatch_id, ctx.owner, ctx.key = inputs
        return ChunkedLogProbs.forward(ctx, *plain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor, upstream_entropy: Tensor | None) -> Any:
        sink = None
        if ctx.owner not in SKIPPED:
            sink = OWNERS[ctx.owner].resolve(int(ctx.microbatch_id), ctx.key)
        if not isinstance(sink, Microbatch) or not ctx.needs_input_grad[1]:
            return *ChunkedLogProbs.backward(ctx, upstream_N, upstream_entropy), *(None,) * 4
        if sink.settings.needs.ntk or isinstance(sink.settings.rule, IntraProjectingRule):
            raise ProxstepError(
                f'{ctx.key}: the natural rule, PROMA and fisher="sequences" need the head\'s '
                "kernel or all its gradients, which the chunked head does not form; use the full "
                "head, or an isometric rule"
            )
        hidden_ND, weight_VD, bias_V, token_N = ctx.saved_tensors
        rows = _Rows(hidden_ND, weight_VD, bias_V, token_N, upstream_N, ctx.temperature)
        row_of_T = _row_of_each_position(ctx.position_N, sink.layout)
        gradients = HeadGradients(rows, row_of_T, ctx.chunk_size, torch.zeros_like(hidden_ND))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            grad_VD = sink.reduce(ctx.key, gradients)
        return gradients.grad_ND, grad_VD.to(weight_VD.dtype), *(None,) * 9


def _row_of_each_position(position_N: Tensor, layout: Layout) -> Int[Tensor, " positions"]:
    """Return the row of each of the layout's positions, -1 where it has none."""
    place_T = torch.full((layout.grid[0] * layout.grid[1],), -1, device=position_N.device)
    place_T[position_N] = torch.arange(len(position_N), device=position_N.device)
    return place_T if layout.order_T is None else place_T[layout.order_T]


@dataclass(frozen=True)
class _Rows:
    """What the gradients of all rows are computed from again."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    token_N: Tensor
    upstream_N: Tensor
    temperature: float

    def gradient(self, rows: Tensor | slice) -> OuterGradients:
        """Return the gradients of some rows, as those of a linear layer."""
        hidden_nD = self.hidden_ND[rows]
        logits_nV = logits_of(hidden_nD, self.weight_VD, self.bias_V, self.temperature)
        token_n, upstream_n = self.token_N[rows], self.upstream_N[rows]
        grad_nV = logit_gradient(logits_nV, token_n, upstream_n, self.temperature)
        return OuterGradients(grad_nV.to(self.weight_VD.dtype), hidden_nD)


@dataclass(frozen=True)
class HeadGradients(PositionGradients):
    """The head's weight: G_t = (onehot(token_t) - softmax_t) h_t^T, formed when it is asked for.

    Attributes:
        rows: What they follow from.
        row_of_T: The row of each position; most positions have none, -1.
        chunk_size: Rows whose logits exist at a time.
        grad_ND: The hidden states' gradients, filled in on the way.
    """

    is_matrix = True

    rows: _Rows
    row_of_T: Tensor
    chunk_size: int
    grad_ND: Tensor

    def at(self, index: Int[Tensor, " samples"]) -> OuterGradients:
        """Return those of some positions, as a linear layer's."""
        row_K = self.row_of_T[index]
        outer = self.rows.gradient(row_K.clamp(min=0))
        return OuterGradients(outer.grad_TO.masked_fill((row_K < 0)[:, None], 0.0), outer.input_TI)

    def squares(self) -> Float[Tensor, " positions"]:
        """Not for all positions at a time."""
        raise NotImplementedError

    def importance(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2, for which the logits are computed once more."""
        chunks = torch.arange(len(self.grad_ND), device=self.row_of_T.device).split(self.chunk_size)
        square_N = torch.cat([self.rows.gradient(row_n).squares() for row_n in chunks])
        return functional.pad(square_N, (0, 1))[self.row_of_T]  # -1 is the one that was added

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "vocab features"]:
        """Return sum_t weight_t G_t."""
        work, row_T = _Work(self, None, needs_norm=False), self.row_of_T
        for chunk_t in (row_T >= 0).nonzero().squeeze(1).split(self.chunk_size):
            for outer in work.gradients(row_T[chunk_t], keep_hidden=True):
                work.add(outer, weight_T[chunk_t, None])
        return work.grad_VD

    def parts(
        self, layout: Layout, needs: Needs, sample: Any, memory: Memory, *, separable: bool
    ) -> Iterator[Part]:
        """Measure one sequence at a time, or all before any of them is weighed."""
        del memory
        work = _Work(self, sample, needs_norm=needs.norm)
        own_rows = [self.row_of_T[start:end] for start, end in layout.bounds]
        own_rows = [row_n[row_n >= 0] for row_n in own_rows]
        if separable:
            for sequence, row_n in enumerate(own_rows):
                yield work.part(slice(sequence, sequence + 1), row_n)
            return

        def add(weight_B: Tensor, _: Tensor | None) -> Tensor:
            for row_n, weight in zip(own_rows, weight_B, strict=True):
                for outer in work.gradients(row_n, keep_hidden=True):
                    work.add(outer, weight)
            return work.grad_VD

        found = [work.measure(row_n) for row_n in own_rows]
        cross = [cross_K for cross_K, _ in found if cross_K is not None]
        norms = [norm_sq for _, norm_sq in found if norm_sq is not None]
        cross_KB = torch.stack(cross, dim=1) if cross else None
        yield Part(slice(None), add, cross_KB, torch.stack(norms) if norms else None)


class _Work:
    """Measures sequences, and accumulates the gradients of the hidden states and of the weight."""

    def __init__(
        self, head: HeadGradients, sample: OuterGradients | None, *, needs_norm: bool
    ) -> None:
        self._rows, self._chunk_size, self._grad_ND = head.rows, head.chunk_size, head.grad_ND
        self._sample, self._needs_norm = sample, needs_norm
        wide = wide_dtype(self._rows.weight_VD.dtype)
        self.grad_VD = torch.zeros_like(self._rows.weight_VD, dtype=wide)
        self._whole_VD: Tensor | None = None

    def part(self, sequence: slice, row_n: Tensor) -> Part:
        """Measure a sequence, and keep what its weight is waited for with."""
        if len(row_n) <= self._chunk_size:
            (outer,) = self.gradients(row_n, keep_hidden=True)
            cross_K, norm_sq = self._measure_chunk(outer)

            def add(weight_B: Tensor, _: Tensor | None) -> Tensor:
                return self.add(outer, weight_B[0])
        else:
            cross_K, whole_VD = None, self._workspace()
            for chunk in self.gradients(row_n, keep_hidden=True):
                self._accumulate(whole_VD, chunk.grad_TO, chunk.input_TI)
                cross_K = self._cross(chunk, cross_K)
            norm_sq = whole_VD.square().sum() if self._needs_norm else None

            def add(weight_B: Tensor, _: Tensor | None) -> Tensor:
                return self.grad_VD.addcmul_(whole_VD, weight_B[0].to(whole_VD.dtype))

        cross_KB = None if cross_K is None else cross_K[:, None]
        return Part(sequence, add, cross_KB, None if norm_sq is None else norm_sq[None])

    def measure(self, row_n: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return one sequence's <G_k, G_b> and |G_b|^2."""
        if len(row_n) <= self._chunk_size:
            (outer,) = self.gradients(row_n, keep_hidden=False)
            return self._measure_chunk(outer)
        cross_K, whole_VD = None, self._workspace() if self._needs_norm else None
        for outer in self.gradients(row_n, keep_hidden=False):
            cross_K = self._cross(outer, cross_K)
            if whole_VD is not None:
                self._accumulate(whole_VD, outer.grad_TO, outer.input_TI)
        return cross_K, None if whole_VD is None else whole_VD.square().sum()

    def gradients(self, row_n: Tensor, *, keep_hidden: bool) -> Iterator[OuterGradients]:
        """Yield each chunk's gradients; the hidden states' follow from them."""
        for chunk_n in row_n.split(self._chunk_size):
            outer = self._rows.gradient(chunk_n)
            if keep_hidden:
                self._grad_ND[chunk_n] = outer.grad_TO @ self._rows.weight_VD
            yield outer

    def add(self, outer: OuterGradients, weight: Tensor) -> Tensor:
        """Add a chunk's gradients times a weight, or one for each row."""
        scaled_nD = outer.input_TI * weight.to(outer.input_TI.dtype)
        self._accumulate(self.grad_VD, outer.grad_TO, scaled_nD)
        return self.grad_VD

    def _measure_chunk(self, outer: OuterGradients) -> tuple[Tensor | None, Tensor | None]:
        norm_sq = None
        if self._needs_norm:
            gram_nn = product(outer.grad_TO, outer.grad_TO.mT)
            norm_sq = (gram_nn * product(outer.input_TI, outer.input_TI.mT)).sum().clamp(min=0)
        return self._cross(outer, None), norm_sq

    def _cross(self, outer: OuterGradients, total_K: Tensor | None) -> Tensor | None:
        """Add <G_k, G_t> over the positions t of a chunk."""
        if self._sample is None:
            return None
        gram_Kn = product(self._sample.grad_TO, outer.grad_TO.mT)
        cross_K = (gram_Kn * product(self._sample.input_TI, outer.input_TI.mT)).sum(dim=1)
        return cross_K if total_K is None else total_K + cross_K

    def _accumulate(self, total_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
        if total_VD.dtype == grad_nV.dtype:
            total_VD.addmm_(grad_nV.mT, hidden_nD)
        else:
            total_VD.add_(product(grad_nV.mT, hidden_nD))

    def _workspace(self) -> Tensor:
        if self._whole_VD is None:
            self._whole_VD = torch.empty_like(self.grad_VD)
        return self._whole_VD.zero_()

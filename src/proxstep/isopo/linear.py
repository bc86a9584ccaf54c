"""Linear layers, Conv1D included: G_t = g_t a_t^T, from the output's gradient and the input.

The inner product of two positions is (g_s . g_t)(a_s . a_t), so that all statistics follow
without forming any gradient (the ghost form); `plan` says when it pays.

Legend for shape suffixes: T positions, B sequences, K sampled positions, O and I output and input
features, L positions of one sequence, N numbers of one gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from proxstep.isopo.hooks import (
    Owner,
    PositionGradients,
    covers,
    is_class,
    owner_of,
    parameter_gradient,
)
from proxstep.isopo.plan import Layout, Memory, Needs, Part, Shape, choose
from proxstep.typing import Float, Int, Tensor

_ROWS = 256
"""Positions of a head that are copied at a time: fewer would be slower, more would take memory."""


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, whose parameters' gradients come from the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        microbatch_id: Tensor,
        owner: int,
        keys: tuple[str, str],
        columns_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.microbatch_id, ctx.owner, ctx.keys, ctx.columns_first = (
            microbatch_id,
            owner,
            keys,
            columns_first,
        )
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_key, bias_key = ctx.keys
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.columns_first:
            grad, x = grad.transpose(0, 1), x.transpose(0, 1)
        if ctx.needs_input_grad[1]:
            shape = list(weight.shape)
            place = (ctx.microbatch_id, ctx.owner, weight_key)
            grad_weight = parameter_gradient("OuterGradients", [grad, x], [], shape, *place)
        if ctx.needs_input_grad[2]:
            shape = [weight.shape[0]]
            place = (ctx.microbatch_id, ctx.owner, bias_key)
            grad_bias = parameter_gradient("VectorGradients", [grad], [], shape, *place)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _is_conv1d(module: nn.Module) -> bool:
    return is_class(module, "Conv1D", "transformers.")


@covers(
    lambda module: type(module).forward is nn.Linear.forward or _is_conv1d(module),
    matrices=("weight",),
)
def _forward(self: Any, x: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, x)
    owner, site = found
    weight = self.weight.mT if _is_conv1d(self) else self.weight
    return routed_linear(x, weight, self.bias, owner, (site.key("weight"), site.key("bias")))


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    owner: Owner,
    keys: tuple[str, str],
    *,
    columns_first: bool = False,
) -> Tensor:
    """Return x @ weight.T + bias, as autocast has it, with gradients that go to the owner.

    Args:
        x: Inputs at every token position, (..., features).
        weight: (out, in); a parameter, or a view of one.
        bias: (out,), or None.
        owner: Whose microbatch it is.
        keys: Names of the weight and of the bias.
        columns_first: Whether x is (columns, rows, features).
    """
    if torch.is_autocast_enabled(x.device.type):
        # Cast outside the function: the casts' own backward returns the gradients to the
        # parameters' dtype.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, owner.microbatch_id, owner.number, keys, columns_first)


@dataclass(frozen=True)
class OuterGradients(PositionGradients):
    """A matrix: G_t = g_t a_t^T with g the gradient of the layer's output and a its input."""

    is_matrix = True

    grad_TO: Float[Tensor, "positions out"]
    input_TI: Float[Tensor, "positions in"]

    def at(self, index: Int[Tensor, " samples"]) -> OuterGradients:
        """Return those of some positions."""
        return type(self)(self.grad_TO[index], self.input_TI[index])

    @cached_property
    def _lengths_T(self) -> Float[Tensor, " positions"]:
        """|g_t|."""
        return _lengths(self.grad_TO)

    def _run(self, start: int, end: int) -> OuterGradients:
        return OuterGradients(self.grad_TO[start:end], self.input_TI[start:end])

    def _trimmed(self, layout: Layout) -> Layout:
        """Leave out positions without a gradient where that saves a lot: the prompts in a head."""
        if self.grad_TO.shape[1] < 4 * self.input_TI.shape[1]:
            return layout
        trimmed = layout.trim(self._lengths_T != 0)
        return trimmed if sum(trimmed.lengths) <= 0.9 * layout.num_positions else layout

    @property
    def _wide(self) -> torch.dtype:
        """What sums and Grams are kept in: float32 or better."""
        return torch.promote_types(self.grad_TO.dtype, torch.float32)

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""
        return (self._lengths_T * _lengths(self.input_TI)).square()

    def contract(
        self, weight: Float[Tensor, " positions"], layout: Layout | None = None
    ) -> Float[Tensor, "out in"]:
        """Return sum_t weight_t G_t: one product, at the cost of the ordinary weight gradient.

        With a layout there is one weight per sequence.
        """
        grad_TO, input_TI = self.grad_TO, self.input_TI
        if layout is not None and layout.trimmed:
            return self._contract_runs(weight, layout)
        weight_T = weight
        if layout is not None:
            weight_T = nn.functional.pad(weight, (0, 1))[layout.sequence_T]  # 0 at padding
        column_T1 = weight_T.to(grad_TO.dtype)[:, None]
        if grad_TO.shape[1] <= input_TI.shape[1]:
            return (grad_TO * column_T1).mT @ input_TI
        return grad_TO.mT @ (input_TI * column_T1)

    def _contract_runs(
        self, weight_B: Float[Tensor, " batch"], layout: Layout
    ) -> Float[Tensor, "out in"]:
        """Return sum_b weight_b G_b from the layout's positions, copying some of them at a time.

        Half precision takes them all at once, for one product is rounded once.
        """
        weight_B, total = weight_B.to(self.grad_TO.dtype), None
        rows = _ROWS if self.grad_TO.itemsize >= 4 else self.num_rows
        for part in _in_turn(layout.bounds, rows):
            bounds = layout.bounds[part]
            grad_RO = _joined([self.grad_TO[start:end] for start, end in bounds])
            input_RI = _joined(
                [
                    self.input_TI[start:end] * weight
                    for weight, (start, end) in zip(weight_B[part], bounds, strict=True)
                ]
            )
            if total is None:
                total = grad_RO.mT @ input_RI
            else:
                total.addmm_(grad_RO.mT, input_RI)
        assert total is not None
        return total

    def along(self, direction: Float[Tensor, "out in"]) -> Float[Tensor, " positions"]:
        """Return <G_t, direction> = g_t . direction a_t."""
        moved_TO = product(self.input_TI, direction.to(self.input_TI.dtype).mT)
        return (moved_TO * self.grad_TO.to(moved_TO.dtype)).sum(dim=1)

    def factors(self, index_T: Int[Tensor, " kept"]) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield the one matrix."""
        outer = self if len(index_T) == self.num_rows else self.at(index_T)
        yield ..., outer.grad_TO, outer.input_TI

    def parts(
        self,
        layout: Layout,
        needs: Needs,
        sample: OuterGradients | None,
        memory: Memory,
        *,
        separable: bool,
    ) -> Iterator[Part]:
        """Measure the sequences in the form that is the cheapest."""
        outer, layout = self, self._trimmed(layout)
        shape = _shape(outer, layout, sample)
        plan = choose(shape, needs, separable=separable, memory_budget=memory.budget)
        cross_KB = None
        if sample is not None and plan.ghost_fisher:
            cross_KB, sample = outer.cross(sample, layout, memory), None
        if plan.gradients == "sequences":
            yield from _by_sequences(outer, layout, needs, sample, memory, plan.size, cross_KB)
            return

        def add(weight_B: Tensor, _: Tensor | None) -> Tensor:
            return outer.contract(weight_B, layout)

        if plan.gradients == "blocks":
            found = _in_blocks(outer, layout, needs, sample, memory, plan.size)
            yield Part(slice(None), add, found[0] if cross_KB is None else cross_KB, *found[1:])
            return
        norm_B = outer.norm_squares(layout, memory) if needs.norm else None
        yield Part(slice(None), add, cross_KB, norm_B, outer.ntk(layout) if needs.ntk else None)

    def cross(
        self, sample: OuterGradients, layout: Layout, memory: Memory
    ) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b> in ghost form, so many samples at a time that memory suffices."""
        if layout.trimmed:  # without a copy of what is left
            runs = [self._run(*run) for run in layout.bounds]
            return torch.stack([_pairs(sample, run).sum(dim=1) for run in runs], dim=1)
        row_bytes = self._wide.itemsize * max(len(self.grad_TO), 1)
        chunk = max(1, memory.budget // (2 * row_bytes))
        if len(sample.grad_TO) <= chunk:
            grad_KT = product(sample.grad_TO, self.grad_TO.mT)
            gram = partial(product, sample.input_TI, self.input_TI.mT)
            alike = memory.same_positions
            gram_KT = memory.shared("cross", self.input_TI, layout, gram) if alike else gram()
            return layout.sum_by_sequence(grad_KT.mul_(gram_KT))
        some = (sample._run(start, start + chunk) for start in range(0, sample.num_rows, chunk))
        return torch.cat([layout.sum_by_sequence(_pairs(part, self)) for part in some])

    def norm_squares(self, layout: Layout, memory: Memory) -> Float[Tensor, " batch"]:
        """Return |G_b|^2 in ghost form."""

        def input_gram(part: tuple[int, int]) -> Tensor:
            input_LI = self.input_TI[slice(*part)]
            return product(input_LI, input_LI.mT)

        grams: Iterable[Tensor] = map(input_gram, layout.bounds)
        numbers = sum((end - start) ** 2 for start, end in layout.bounds)
        if self._wide.itemsize * numbers <= memory.budget:
            grams = memory.shared(
                "norm", self.input_TI, layout, lambda: [input_gram(part) for part in layout.bounds]
            )
        squares = []
        for (start, end), gram_LL in zip(layout.bounds, grams, strict=True):
            grad_LO = self.grad_TO[start:end]
            squares.append((product(grad_LO, grad_LO.mT) * gram_LL).sum())
        return torch.stack(squares).clamp(min=0)

    def ntk(self, layout: Layout) -> Float[Tensor, "batch batch"]:
        """Return K_bc = <G_b, G_c> in ghost form."""
        size = layout.num_sequences
        kernel = [[self.grad_TO.new_zeros(())] * size for _ in range(size)]
        for b, (b0, b1) in enumerate(layout.bounds):
            for c, (c0, c1) in list(enumerate(layout.bounds))[b:]:
                kernel[b][c] = kernel[c][b] = _pairs(self._run(b0, b1), self._run(c0, c1)).sum()
        return torch.stack([torch.stack(row) for row in kernel])

    def by_sequence(
        self, part: slice, layout: Layout, memory: Memory, features: slice = slice(None)
    ) -> Float[Tensor, "some out in"]:
        """Return G_b of some sequences, in the workspace, restricted to some output features."""
        bounds, width = layout.bounds[part], len(range(*features.indices(self.grad_TO.shape[1])))
        shape = (len(bounds), width, self.input_TI.shape[1])
        buffer = memory.buffer(shape, self.grad_TO, self._wide)
        if layout.mask_BL is not None and self.grad_TO.dtype == buffer.dtype:
            sizes, mask_bL = layout.mask_BL.shape, layout.mask_BL[part]
            grad_bLO = self.grad_TO[:, features].unflatten(0, sizes)[part]
            if not layout.is_full:
                grad_bLO = grad_bLO * mask_bL.to(buffer.dtype)[..., None]
            return torch.bmm(grad_bLO.mT, self.input_TI.unflatten(0, sizes)[part], out=buffer)
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


def _by_sequences(
    outer: OuterGradients,
    layout: Layout,
    needs: Needs,
    sample: OuterGradients | None,
    memory: Memory,
    size: int,
    cross_KB: Tensor | None,
) -> Iterator[Part]:
    """The gradients of `size` sequences at a time."""
    for start in range(0, layout.num_sequences, size):
        part = slice(start, min(start + size, layout.num_sequences))
        part_BOI = outer.by_sequence(part, layout, memory)
        part_BN = part_BOI.flatten(1)

        def add(weight_B: Tensor, total: Tensor | None, part_BOI: Tensor = part_BOI) -> Tensor:
            part_BN, weight_B = part_BOI.flatten(1), weight_B.to(part_BOI.dtype)
            if total is None:
                return (weight_B @ part_BN).view(part_BOI.shape[1:])
            total.view(-1).addmv_(part_BN.mT, weight_B)
            return total

        if sample is not None:  # then all sequences are one part
            cross_KB = sample.cross_with(part_BOI)
        ntk_BB = gram(part_BN) if needs.ntk else None
        norm_B = None
        if needs.norm:
            norm_B = _squares(part_BN) if ntk_BB is None else ntk_BB.diagonal().clone()
        yield Part(part, add, None if cross_KB is None else cross_KB[:, part], norm_B, ntk_BB)


def _in_blocks(
    outer: OuterGradients,
    layout: Layout,
    needs: Needs,
    sample: OuterGradients | None,
    memory: Memory,
    size: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cross products, norms and kernel, from `size` output features at a time."""
    num_features = outer.grad_TO.shape[1]
    norm_B = ntk_BB = cross_KB = None
    for start in range(0, num_features, size):
        features = slice(start, min(start + size, num_features))
        part_BOI = outer.by_sequence(slice(None), layout, memory, features)
        part_BN = part_BOI.flatten(1)
        if sample is not None:
            cross_KB = _add(cross_KB, sample.cross_with(part_BOI, features))
        if needs.ntk:
            ntk_BB = _add(ntk_BB, gram(part_BN))
        elif needs.norm:
            norm_B = _add(norm_B, _squares(part_BN))
    if needs.norm and ntk_BB is not None:
        norm_B = ntk_BB.diagonal().clone()
    return cross_KB, norm_B, ntk_BB


def _lengths(value_TN: Tensor) -> Float[Tensor, " positions"]:
    wide = torch.promote_types(value_TN.dtype, torch.float32)
    return torch.linalg.vector_norm(value_TN, dim=1, dtype=wide)


def _in_turn(bounds: tuple[tuple[int, int], ...], rows: int) -> Iterator[slice]:
    """Yield sequences that follow each other, so many at a time that they have `rows` positions."""
    first, count = 0, 0
    for last, (start, end) in enumerate(bounds, 1):
        count += end - start
        if count >= rows or last == len(bounds):
            yield slice(first, last)
            first, count = last, 0


def _joined(runs: list[Tensor]) -> Tensor:
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _pairs(left: OuterGradients, right: OuterGradients) -> Float[Tensor, "left right"]:
    """Return <G_s, G_t> of all pairs."""
    pairs = product(left.grad_TO, right.grad_TO.mT)
    return pairs.mul_(product(left.input_TI, right.input_TI.mT))


def _shape(outer: OuterGradients, layout: Layout, sample: OuterGradients | None) -> Shape:
    return Shape(
        out_features=outer.grad_TO.shape[1],
        in_features=outer.input_TI.shape[1],
        lengths=layout.lengths,
        num_samples=0 if sample is None else len(sample.grad_TO),
        itemsize=max(outer.grad_TO.itemsize, 4),
        device=outer.grad_TO.device.type,
    )


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _squares(value_BN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value_BN, dim=1).square()


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

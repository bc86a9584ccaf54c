"""From position-wise gradients to statistics, and with weights to a parameter's gradient.

Legend for shape suffixes: B sequences, K sampled positions, O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from proxstep.isopo.layers import OuterGradients, PositionGradients, gram
from proxstep.isopo.layout import Layout
from proxstep.isopo.plan import Memory, Needs, Part, Plan, Shape, choose
from proxstep.typing import Tensor


def parts(
    gradients: PositionGradients,
    layout: Layout,
    needs: Needs,
    sample: PositionGradients | None,
    memory: Memory,
    *,
    separable: bool,
) -> Iterator[Part]:
    """Measure a layer's sequences: all at once, or where that is cheaper some at a time.

    Args:
        gradients: Of each position.
        layout: Which position belongs to which sequence.
        needs: The statistics.
        sample: Gradients at the positions that estimate the Fisher norm, where it is needed.
        memory: The workspace, which a part may use until the next is asked for.
        separable: Whether some sequences may be weighed before the others are measured.
    """
    if isinstance(gradients, OuterGradients):
        assert sample is None or isinstance(sample, OuterGradients)
        yield from _matrix_parts(gradients, layout, needs, sample, memory, separable)
        return
    sums = gradients.sums(layout)
    yield Part(
        slice(None),
        lambda weight_B, _: sums.contract(weight_B),
        None if sample is None else sums.cross(sample),  # type: ignore[arg-type]
        sums.norm_squares() if needs.norm else None,
        sums.ntk() if needs.ntk else None,
    )


def _matrix_parts(
    gradients: OuterGradients,
    layout: Layout,
    needs: Needs,
    sample: OuterGradients | None,
    memory: Memory,
    separable: bool,
) -> Iterator[Part]:
    gradients, layout = _without_zeros(gradients, layout)
    shape = _shape(gradients, layout, sample)
    plan = choose(shape, needs, separable=separable, memory_budget=memory.budget)
    cross_KB = norm_B = ntk_BB = None
    if sample is not None and plan.ghost_fisher:
        cross_KB = gradients.cross(sample, layout, memory)
    if plan.gradients == "sequences":
        yield from _by_sequences(gradients, layout, needs, sample, memory, plan, cross_KB)
        return
    if plan.gradients == "blocks":
        formed = None if plan.ghost_fisher else sample
        from_blocks = _in_blocks(gradients, layout, needs, formed, memory, plan)
        cross_KB = from_blocks[0] if cross_KB is None else cross_KB
        norm_B, ntk_BB = from_blocks[1:]
    else:
        norm_B = gradients.norm_squares(layout, memory) if needs.norm else None
        ntk_BB = gradients.ntk(layout) if needs.ntk else None

    def add(weight_B: Tensor, _: Tensor | None) -> Tensor:
        return gradients.contract(layout.spread(weight_B))

    yield Part(slice(None), add, cross_KB, norm_B, ntk_BB)


def _by_sequences(
    gradients: OuterGradients,
    layout: Layout,
    needs: Needs,
    sample: OuterGradients | None,
    memory: Memory,
    plan: Plan,
    cross_KB: Tensor | None,
) -> Iterator[Part]:
    """The gradients of `plan.size` sequences at a time."""
    for start in range(0, layout.num_sequences, plan.size):
        part = slice(start, min(start + plan.size, layout.num_sequences))
        part_BOI = gradients.by_sequence(layout.bounds[part], memory)
        part_BN = part_BOI.flatten(1)

        def add(weight_B: Tensor, total: Tensor | None, part_BOI: Tensor = part_BOI) -> Tensor:
            part_BN, weight_B = part_BOI.flatten(1), weight_B.to(part_BOI.dtype)
            if total is None:
                return (weight_B @ part_BN).view(part_BOI.shape[1:])
            total.view(-1).addmv_(part_BN.mT, weight_B)
            return total

        if sample is not None and not plan.ghost_fisher:  # then all sequences are one part
            cross_KB = sample.cross_with(part_BOI)
        ntk_BB = gram(part_BN) if needs.ntk else None
        norm_B = None
        if needs.norm:
            norm_B = _squares(part_BN) if ntk_BB is None else ntk_BB.diagonal().clone()
        yield Part(part, add, None if cross_KB is None else cross_KB[:, part], norm_B, ntk_BB)


def _in_blocks(
    gradients: OuterGradients,
    layout: Layout,
    needs: Needs,
    sample: OuterGradients | None,
    memory: Memory,
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Cross products, norms and kernel, from `plan.size` output features at a time."""
    num_features = gradients.grad_TO.shape[1]
    norm_B = ntk_BB = cross_KB = None
    for start in range(0, num_features, plan.size):
        features = slice(start, min(start + plan.size, num_features))
        part_BOI = gradients.by_sequence(layout.bounds, memory, features)
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


def _without_zeros(gradients: OuterGradients, layout: Layout) -> tuple[OuterGradients, Layout]:
    """Leave out positions without a gradient where that saves more than it costs: in a head."""
    num_out, num_in = gradients.grad_TO.shape[1], gradients.input_TI.shape[1]
    if num_out < 4 * num_in:
        return gradients, layout
    index = gradients.nonzero().nonzero().squeeze(1)
    if len(index) > 0.9 * layout.num_positions:
        return gradients, layout
    return gradients.at(index), layout.only(index)


def _shape(gradients: OuterGradients, layout: Layout, sample: OuterGradients | None) -> Shape:
    return Shape(
        out_features=gradients.grad_TO.shape[1],
        in_features=gradients.input_TI.shape[1],
        lengths=tuple(end - start for start, end in layout.bounds),
        num_samples=0 if sample is None else len(sample.grad_TO),
        itemsize=max(gradients.grad_TO.itemsize, 4),
        device=gradients.grad_TO.device.type,
    )


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _squares(value_BN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value_BN, dim=1).square()

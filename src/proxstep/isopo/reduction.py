"""From position-wise gradients to a parameter's gradient, in the form that `forms` chose.

Legend for shape suffixes: B sequences, K sampled positions, O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from proxstep.isopo.embedding import LookupGradients
from proxstep.isopo.forms import Needs, Plan, Shape, choose
from proxstep.isopo.gradients import PositionGradients
from proxstep.isopo.layout import Layout
from proxstep.isopo.linear import OuterGradients, gram
from proxstep.isopo.memory import Memory
from proxstep.isopo.vector import VectorGradients
from proxstep.typing import Float, Tensor


@dataclass(frozen=True)
class Measured:
    """Statistics of some sequences' gradients, None where they were not needed."""

    fisher_sq_B: Float[Tensor, " batch"] | None = None
    norm_sq_B: Float[Tensor, " batch"] | None = None
    ntk_BB: Float[Tensor, "batch batch"] | None = None


FisherOf = Callable[[Float[Tensor, "samples batch"]], Float[Tensor, " batch"]]
Weigh = Callable[[slice, Measured], Float[Tensor, " batch"]]
EVERY = slice(None)


@dataclass(frozen=True)
class Request:
    """What is asked of a reduction.

    Attributes:
        needs: The statistics that `weigh` uses.
        sample: Gradients at the positions on which the Fisher norm is estimated, where it is.
        fisher_of: F_b^2 of all sequences from <G_k, G_b>.
        weigh: The weights of some sequences (a slice of them) from their statistics.
        separable: Whether `weigh` may be called on some sequences at a time.
    """

    needs: Needs
    sample: PositionGradients | None
    fisher_of: FisherOf
    weigh: Weigh
    separable: bool


def reduce(
    gradients: PositionGradients, layout: Layout, request: Request, memory: Memory
) -> Tensor:
    """Return sum_b weight_b G_b with the weights that `request.weigh` gives."""
    if isinstance(gradients, OuterGradients):
        return _reduce_matrix(gradients, layout, request, memory)
    return _reduce_sums(gradients, layout, request)


def _reduce_sums(
    gradients: VectorGradients | LookupGradients, layout: Layout, request: Request
) -> Tensor:
    """Embeddings and vectors: the sequences' gradients are small enough to be formed."""
    sums, needs = gradients.sums(layout), request.needs
    fisher_B = None
    if request.sample is not None and needs.fisher:
        fisher_B = request.fisher_of(sums.cross(request.sample))  # type: ignore[arg-type]
    measured = Measured(
        fisher_B,
        sums.norm_squares() if needs.norm else None,
        sums.ntk() if needs.ntk else None,
    )
    return sums.contract(request.weigh(EVERY, measured))


def _reduce_matrix(
    gradients: OuterGradients, layout: Layout, request: Request, memory: Memory
) -> Tensor:
    gradients, layout = _without_zeros(gradients, layout)
    sample = request.sample if request.needs.fisher else None
    assert sample is None or isinstance(sample, OuterGradients)
    plan = choose(
        _shape(gradients, layout, sample),
        request.needs,
        separable=request.separable,
        memory_budget=memory.budget,
    )
    fisher_B = None
    if sample is not None and plan.ghost_fisher:
        fisher_B = request.fisher_of(gradients.cross(sample, layout, memory))
    if plan.gradients == "sequences":
        return _by_sequences(gradients, layout, request, plan, fisher_B, memory)
    if plan.gradients == "blocks":
        measured = _in_blocks(gradients, layout, request, plan, fisher_B, memory)
    else:
        needs = request.needs
        measured = Measured(
            fisher_B,
            gradients.norm_squares(layout, memory) if needs.norm else None,
            gradients.ntk(layout) if needs.ntk else None,
        )
    return gradients.contract(layout.spread(request.weigh(EVERY, measured)))


def _by_sequences(
    gradients: OuterGradients,
    layout: Layout,
    request: Request,
    plan: Plan,
    fisher_B: Tensor | None,
    memory: Memory,
) -> Tensor:
    """The gradients of `plan.size` sequences at a time: statistics, weights, weighted sum."""
    needs, total_N = request.needs, None
    for start in range(0, layout.num_sequences, plan.size):
        part = slice(start, min(start + plan.size, layout.num_sequences))
        part_BOI = gradients.by_sequence(layout.bounds[part], memory)
        part_BN = part_BOI.flatten(1)
        if needs.fisher and not plan.ghost_fisher:  # all sequences at once
            fisher_B = request.fisher_of(_as_outer(request.sample).cross_with(part_BOI))
        ntk_BB = gram(part_BN) if needs.ntk else None
        norm_B = None
        if needs.norm:
            norm_B = ntk_BB.diagonal() if ntk_BB is not None else _squares(part_BN)
        measured = Measured(None if fisher_B is None else fisher_B[part], norm_B, ntk_BB)
        weight_B = request.weigh(part, measured).to(part_BN.dtype)
        total_N = weight_B @ part_BN if total_N is None else total_N.addmv_(part_BN.mT, weight_B)
    assert total_N is not None
    return total_N.view(gradients.grad_TO.shape[1], gradients.input_TI.shape[1])


def _in_blocks(
    gradients: OuterGradients,
    layout: Layout,
    request: Request,
    plan: Plan,
    fisher_B: Tensor | None,
    memory: Memory,
) -> Measured:
    """Statistics from the gradients of `plan.size` output features at a time."""
    needs, num_features = request.needs, gradients.grad_TO.shape[1]
    norm_B = ntk_BB = cross_KB = None
    for start in range(0, num_features, plan.size):
        features = slice(start, min(start + plan.size, num_features))
        part_BOI = gradients.by_sequence(layout.bounds, memory, features)
        part_BN = part_BOI.flatten(1)
        if needs.fisher and not plan.ghost_fisher:
            cross_KB = _add(cross_KB, _as_outer(request.sample).cross_with(part_BOI, features))
        if needs.ntk:
            ntk_BB = _add(ntk_BB, gram(part_BN))
        elif needs.norm:
            norm_B = _add(norm_B, _squares(part_BN))
    if cross_KB is not None:
        fisher_B = request.fisher_of(cross_KB)
    if needs.norm and ntk_BB is not None:
        norm_B = ntk_BB.diagonal()
    return Measured(fisher_B, norm_B, ntk_BB)


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


def _as_outer(sample: PositionGradients | None) -> OuterGradients:
    assert isinstance(sample, OuterGradients)
    return sample


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _squares(value_BN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value_BN, dim=1).square()

"""The plan of one layer's reduction: which exact form of its statistics is the cheapest.

For a matrix of O x I features, with T positions of which K are sampled, B sequences of L positions
each, the forms cost (multiplications and additions count two):

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from proxstep.typing import Float, Tensor

FLOPS_PER_BYTE = {"cpu": 6.0, "cuda": 150.0}
"""Arithmetic that takes as long as moving one byte: 90 GFLOP/s over 15 GB/s on one core of an EPYC
server; tensor cores over HBM on a data-center GPU. Other devices are taken for a GPU.
"""

MEMORY_BUDGET = 128 * 2**20
"""Bytes that the statistics of one layer may take at a time, beyond its inputs."""


@dataclass(frozen=True)
class Needs:
    """Which statistics of each sequence's gradient a rule needs."""

    fisher: bool = False
    norm: bool = False
    ntk: bool = False


@dataclass(frozen=True)
class Statistics:
    """What is known of some sequences in one layer; None for what no rule needs.

    Attributes:
        coefficient_B: -dL / d log pi(y_b); for REINFORCE the advantage.
        fisher_sq_B: F_b^2, the squared length of G_b in the Fisher metric.
        norm_sq_B: |G_b|^2.
        ntk_BB: The layer's kernel, K_bc = <G_b, G_c>.
    """

    coefficient_B: Float[Tensor, " batch"]
    fisher_sq_B: Float[Tensor, " batch"] | None = None
    norm_sq_B: Float[Tensor, " batch"] | None = None
    ntk_BB: Float[Tensor, "batch batch"] | None = None


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

"""PROMA: what a microbatch's sequences, or its positions, span is taken out of a gradient.

The accumulating rule takes it out of the running gradient. In a layer with the gradient M that
earlier microbatches of the optimizer step have accumulated, the microbatch of the sequences'
gradients G_b and the coefficients A_b makes

    M <- (I - P) M + sum_b A_b G_b,    P the orthogonal projection onto the span of the G_b

which is a weight of each sequence again, with the kernel K_bc = <G_b, G_c>:

    weight_b = A_b - (K^+ <G, M>)_b

The other one, Intra-PROMA, takes something out of the microbatch's own gradient, by the layer's
inputs and the gradients of its outputs: no weight of each sequence, but a product of matrices.

Legend for shape suffixes: B sequences of the microbatch, T positions, R those of them that a matrix
saw, O and I output and input features, D features of either, K directions, P directions with spare
ones, N the shorter of R and D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from proxstep.algorithms.aggregate import check_number
from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import PositionGradients
from proxstep.isopo.plan import Layout, Needs, Statistics
from proxstep.logprobs.tokens import wide, widest_dtype
from proxstep.typing import Float, Tensor

_EXACT = 512
"""The longest side of a Gram matrix that is decomposed."""
_SPARE, _ITERATIONS = 10, 3
"""Of the subspace iteration beyond that: directions on top of the wanted ones, and rounds."""
_BLOCK = 8192


@dataclass(frozen=True)
class ProjectingRule:
    """What was accumulated so far does not move the log-probabilities of this microbatch.

    The order of the microbatches matters: what came first is projected most. One microbatch per
    step is REINFORCE. A tied weight has a running gradient for each use, as everywhere in ISOPO;
    one gradient per layer is kept until the step's end.

    Attributes:
        ridge: Added to the kernel of the normalized gradients, whose diagonal is 1; 0 for the exact
            projection. The author's code has 0.01.

    Source: arXiv 2601.10498, section 2 (the accumulating variant).

    Differs: the projection is exact by default. The author's code also bounds the projection's
        norm by that of the microbatch's gradient, skips some projections, and covers linear layers
        alone. Order and span follow the paper's text and that code; the paper's algorithm boxes
        and ablations could not be checked. `IntraProjectingRule` is the Intra variant.
    """

    ridge: float = 0.0
    interacting, needs, averages = True, Needs(ntk=True, along=True), ()

    def __post_init__(self) -> None:
        check_number("ridge", self.ridge)

    def weigh(
        self, found: Statistics, past: Any, over_ranks: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights of all sequences, no moments, and how much of M was taken away.

        Args:
            found: Statistics of the layer's sequences.
            past: Not used.
            over_ranks: Not used.
        """
        del past, over_ranks
        if found.along_B is None or found.ntk_BB is None:  # the first microbatch of the step
            return found.coefficient_B, {}, {}
        # As in the natural rule, a matter of small eigenvalues.
        precise = widest_dtype(found.ntk_BB.device)
        ntk_BB, along_B = found.ntk_BB.to(precise), found.along_B.to(precise)
        norm_B = ntk_BB.diagonal().clamp(min=0).sqrt()
        inverse_B = torch.where(norm_B > 0, 1 / norm_B, 0.0)
        normalized_BB = inverse_B[:, None] * ntk_BB * inverse_B
        eigenvalue_B, eigenvector_BB = torch.linalg.eigh(normalized_BB)
        # What rounding makes of an eigenvalue of 0, in the precision that K was summed in.
        noise = len(norm_B) * torch.finfo(found.ntk_BB.dtype).eps * eigenvalue_B[-1].clamp(min=0)
        kept_B = eigenvalue_B > noise
        filter_B = torch.where(kept_B, 1 / (eigenvalue_B + self.ridge), 0.0)
        solved_B = eigenvector_BB @ (filter_B * (eigenvector_BB.mT @ (inverse_B * along_B)))
        return found.coefficient_B - inverse_B * solved_B, {}, {}


@dataclass(frozen=True)
class IntraProjectingRule:
    """A microbatch's gradient without its part between the layer's main directions; Intra-PROMA.

    In every matrix, with the microbatch's policy gradient M = sum_b A_b G_b,

        M <- M - s Q_g (Q_g^T M Q_a) Q_a^T

    where Q_a (I x K) and Q_g (O x K) are the first K right singular vectors of the inputs
    (positions x I) and of the output's gradients (positions x O). Those are gradients of the
    log-probabilities, without advantages, over all positions of the microbatch's sequences, the
    prompts' too, uncentered; K = min(rank, positions, I, O). Every expert is a matrix, whose
    positions are those that chose it. What is no matrix (embeddings, normalizations, biases) gets
    the plain policy gradient.

    Microbatches do not interact: their gradients are added up, on several ranks (DDP, FSDP2) too.
    The result depends on how the sequences are split into them. Where K is the number of positions,
    the gradient is 0: `rank` must be far below the positions of a microbatch, and an expert that
    few of them chose learns nothing from them. A LoRA factor whose own rank is at most `rank` keeps
    only what lies outside the main directions of its other side.

    Cost per matrix and microbatch, for each of the two sides of T x D numbers: where the shorter
    one, N, is at most 512, the decomposition is exact, by the eigenvectors of the Gram matrix in
    float64, 2 T D N operations and an eigenproblem of N x N. Beyond, 3 rounds of subspace
    iteration from a fixed start with 10 spare directions, 12 T D (rank + 10) operations and a
    copy in float32. Either is the same every time it is computed.

    Attributes:
        rank: K, where there are enough positions and features. 0 is REINFORCE.
        shrinkage: s, from 0, which is REINFORCE, to 1, the whole part.

    Source: arXiv 2601.10498 (the factored variant within a microbatch); the formula and the
        defaults are those of the author's public code (github.com/nilin/proma, February 2026) and
        of its launch scripts.

    Differs: the author's code computes the singular vectors by one randomized power iteration
        without oversampling, drawn anew each time. Embeddings, norms and biases get the policy
        gradient here; in that code embeddings and norms keep a gradient without advantages, and
        biases get 0. Its variants that sample positions, or project the accumulated gradient, are
        not implemented. The code was read, but not run for comparison; the paper's algorithm boxes
        were not read.
    """

    rank: int = 10
    shrinkage: float = 1.0
    interacting, needs, averages = False, Needs(), ()

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise ProxstepError(f"rank must be an integer, 0 or more, got {self.rank!r}")
        check_number("shrinkage", self.shrinkage)
        if self.shrinkage > 1:
            raise ProxstepError(f"shrinkage must be between 0 and 1, got {self.shrinkage}")

    def weigh(
        self, found: Statistics, past: Any, over_ranks: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the coefficients: what is taken out comes from their sum, in `project`.

        Args:
            found: Statistics of the layer's sequences.
            past: Not used.
            over_ranks: Not used.
        """
        del past, over_ranks
        return found.coefficient_B, {}, {}

    def project(self, total: Tensor, gradients: PositionGradients, layout: Layout) -> Tensor:
        """Return a parameter's gradient without its part between the main directions.

        Args:
            total: The gradient, which may be changed in place.
            gradients: Its position-wise gradients.
            layout: Which positions are padding.
        """
        if self.rank == 0 or self.shrinkage == 0:
            return total
        total = wide(total)
        index_T = (layout.sequence_T < layout.num_sequences).nonzero().squeeze(1)  # no padding
        for place, grad_RO, input_RI in gradients.factors(index_T):
            rank = min(self.rank, len(grad_RO), grad_RO.shape[1], input_RI.shape[1])
            grad_OK, input_IK = (
                main_directions(value, rank).to(total.dtype) for value in (grad_RO, input_RI)
            )
            core_KK = grad_OK.mT @ total[place] @ input_IK
            total[place] -= (self.shrinkage * grad_OK) @ core_KK @ input_IK.mT
        return total


def main_directions(value_RD: Float[Tensor, "rows features"], rank: int) -> Tensor:
    """Return the first `rank` right singular vectors, (features, rank), in float32 or better.

    Those of singular values that are 0 are columns of zeros. Where both sides are longer than 512
    they are approximate, and the better the faster the singular values fall.
    """
    if min(value_RD.shape) <= _EXACT:
        return _exact_directions(value_RD, rank)
    value_RD = wide(value_RD)
    generator = torch.Generator(value_RD.device).manual_seed(0)
    basis_DP = torch.randn(
        (value_RD.shape[1], min(rank + _SPARE, *value_RD.shape)),
        generator=generator,
        dtype=value_RD.dtype,
        device=value_RD.device,
    )
    for _ in range(_ITERATIONS):
        basis_DP = torch.linalg.qr(value_RD.mT @ (value_RD @ basis_DP)).Q
    return basis_DP @ _exact_directions(value_RD @ basis_DP, rank).to(basis_DP.dtype)


def _exact_directions(value_RD: Tensor, rank: int) -> Tensor:
    """By the eigenvectors of the Gram matrix of the shorter side."""
    precise = widest_dtype(value_RD.device)
    is_tall = value_RD.shape[0] >= value_RD.shape[1]
    blocks = (value_RD if is_tall else value_RD.mT).split(_BLOCK)
    gram_NN = torch.stack([block.to(precise).mT @ block.to(precise) for block in blocks]).sum(0)
    eigenvalue_N, eigenvector_NN = torch.linalg.eigh(gram_NN)
    eigenvalue_K, direction_NK = eigenvalue_N.flip(0)[:rank], eigenvector_NN.flip(1)[:, :rank]
    # What rounding makes of a singular value of 0.
    noise = len(eigenvalue_N) * torch.finfo(precise).eps * eigenvalue_N[-1]
    if not is_tall:
        moved_DK = torch.cat([block.to(precise) @ direction_NK for block in blocks])
        direction_NK = torch.linalg.qr(moved_DK).Q  # those of 0 come last, and are dropped
    return direction_NK * (eigenvalue_K > noise.clamp(min=0))

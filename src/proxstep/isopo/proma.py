"""PROMA: the running gradient loses what lies in the span of the next microbatch's sequences.

A third rule. In a layer with the gradient M that earlier microbatches of the optimizer step have
accumulated, the microbatch of the sequences' gradients G_b and the coefficients A_b makes

    M <- (I - P) M + sum_b A_b G_b,    P the orthogonal projection onto the span of the G_b

which is a weight of each sequence again, with the kernel K_bc = <G_b, G_c>:

    weight_b = A_b - (K^+ <G, M>)_b

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from proxstep.errors import ProxstepError
from proxstep.isopo.plan import Needs, Statistics
from proxstep.typing import Tensor


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
        and ablations could not be checked. The Intra variant is not here.
    """

    ridge: float = 0.0
    interacting, needs, averages = True, Needs(ntk=True, along=True), ()

    def __post_init__(self) -> None:
        if self.ridge < 0:
            raise ProxstepError(f"ridge must be 0 or more, got {self.ridge}")

    def weigh(
        self, found: Statistics, past: Any, over_ranks: Any = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights of all sequences, no moments, and how much of M was taken away."""
        del past, over_ranks
        if found.along_B is None or found.ntk_BB is None:  # the first microbatch of the step
            return found.coefficient_B, {}, {}
        # As in the natural rule, a matter of small eigenvalues.
        wide = torch.float32 if found.ntk_BB.device.type == "mps" else torch.float64
        ntk_BB, along_B = found.ntk_BB.to(wide), found.along_B.to(wide)
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

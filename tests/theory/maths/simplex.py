"""Positivity: when OPO's update is a policy, and the optimum that always is one.

Shapes: V outcomes. A deviation v belongs to a policy if E_{pi_k}[v] = 0 and v >= -1.
"""

from __future__ import annotations

from proxstep.algorithms.aggregate import check_positive
from proxstep.typing import Float, Tensor
from tests.theory.maths.categorical import check_positive_policy


def smallest_mu(weight_V: Float[Tensor, " outcomes"]) -> Float[Tensor, ""]:
    """Return the smallest mu at which v* = (omega - 1) / mu is at least -1 everywhere.

    mu >= 1 - min omega, which is at most 1

    Args:
        weight_V: The escort weight, 0 or more and of mean 1.

    Returns:
        The bound, necessary and sufficient; 0 for a weight of 1 everywhere.

    Source: arXiv 2601.12415, proposition 8.4.
    Differs: the paper prints mu >= max omega - 1, which bounds v* by 1 from above.
    """
    return 1 - weight_V.min()


def printed_smallest_mu(weight_V: Float[Tensor, " outcomes"]) -> Float[Tensor, ""]:
    """Return max omega - 1, the bound on mu that the paper prints; it does not suffice.

    Args:
        weight_V: The escort weight.

    Returns:
        The smallest mu at which v* <= 1 everywhere.

    Source: arXiv 2601.12415, proposition 8.4.

    >>> import torch
    >>> weight_V = torch.tensor([0.0, 1.5, 1.5])
    >>> float(printed_smallest_mu(weight_V)), float(smallest_mu(weight_V))
    (0.5, 1.0)
    """
    return weight_V.max() - 1


def project(
    value_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, " outcomes"]:
    """Return the deviation of a policy that is nearest to a function in L2(pi_k).

    v = max(u - shift, -1), with the shift such that E[v] = 0. If the outcomes of the k largest u
    stay above -1 and m is their probability, shift = (E[u; those] - (1 - m)) / m; k is the largest
    for which the k-th of them does stay above.

    Args:
        value_V: u, any function of the outcomes.
        anchor_V: The anchor.

    Returns:
        The deviation, of mean 0 and nowhere below -1: safeguard (iii).

    Raises:
        ProxstepError: The anchor is no policy without zeros.

    Source: arXiv 2601.12415, section 8.5, which names the projection only.
    """
    check_positive_policy("anchor_V", anchor_V)
    sorted_V, order_V = value_V.sort(descending=True)
    mass_V = anchor_V[order_V].cumsum(dim=0)
    shift_V = ((anchor_V * value_V)[order_V].cumsum(dim=0) - (1 - mass_V)) / mass_V
    kept = int((sorted_V - shift_V > -1).sum())
    return (value_V - shift_V[kept - 1]).clamp(min=-1)


def constrained_optimum(
    weight_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, " outcomes"]:
    """Return the optimum of OPO's objective among policies, v = max((omega - lambda) / mu, -1).

    It is the projection of omega / mu, and of theorem 4.3's v* just as well: projecting the update
    onto the simplex is no approximation but the exact optimum under v >= -1.

    Args:
        weight_V: The escort weight.
        anchor_V: The anchor.
        mu: Curvature of the penalty, above 0.

    Returns:
        The optimum; theorem 4.3's wherever that is a policy.

    Raises:
        ProxstepError: mu is not above 0, or the anchor is no policy without zeros.

    Source: arXiv 2601.12415, equation 9 with the constraint of section 8.5.
    """
    check_positive("mu", mu)
    return project(weight_V / mu, anchor_V)

"""The Fisher metric and the natural policy gradient of a small policy, by enumeration.

Shapes: V outcomes (for several questions the pairs of question and output, with `prob_V` their
joint probability), P parameters. `score_VP` holds d log pi(y) / d theta.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from proxstep.errors import ProxstepError
from proxstep.typing import Float, Tensor
from tests.theory.maths.categorical import expectation


def scores(
    log_prob_of: Callable[[Tensor], Tensor], theta_P: Float[Tensor, " parameters"]
) -> Float[Tensor, "outcomes parameters"]:
    """Return d log pi(y) / d theta of every outcome, by automatic differentiation.

    Args:
        log_prob_of: From the parameters to the log-probability of every outcome, in nats.
        theta_P: Where to differentiate.

    Returns:
        One score per outcome; their mean under the policy is 0.
    """
    return torch.func.jacrev(log_prob_of)(theta_P)


def fisher_matrix(
    score_VP: Float[Tensor, "outcomes parameters"], prob_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, "parameters parameters"]:
    """Return F = E[s s^T], the covariance of the scores.

    Args:
        score_VP: The scores.
        prob_V: The policy.

    Returns:
        The matrix, in nats per unit of the parameters squared.

    Source: arXiv 2512.23353, section 1.2.
    """
    return score_VP.mT @ (prob_V[:, None] * score_VP)


def fisher_square(
    direction_P: Float[Tensor, " parameters"],
    score_VP: Float[Tensor, "outcomes parameters"],
    prob_V: Float[Tensor, " outcomes"],
) -> Float[Tensor, ""]:
    """Return the squared length of a direction in the Fisher metric, v.F v = E[(s.v)^2].

    Args:
        direction_P: v, a step of the parameters.
        score_VP: The scores.
        prob_V: The policy.

    Returns:
        |v|_F^2 in nats: to leading order the chi-square divergence that the step v causes, and
        twice the KL divergence, either way round.

    Source: arXiv 2512.23353, equation 1.
    Differs: the paper prints |v|_F = v.F v without the square, and calls it the KL divergence to
    leading order, which is half of it.
    """
    return expectation((score_VP @ direction_P).square(), prob_V)


def policy_gradient(
    score_VP: Float[Tensor, "outcomes parameters"],
    prob_V: Float[Tensor, " outcomes"],
    advantage_V: Float[Tensor, " outcomes"],
) -> Float[Tensor, " parameters"]:
    """Return g = E[A s], the gradient of the expected reward.

    Args:
        score_VP: The scores.
        prob_V: The policy.
        advantage_V: The advantage of each outcome: its reward up to a constant.

    Returns:
        The gradient, to ascend.

    Source: arXiv 2512.23353, section 1.2.
    """
    return score_VP.mT @ (prob_V * advantage_V)


def natural_gradient(
    score_VP: Float[Tensor, "outcomes parameters"],
    prob_V: Float[Tensor, " outcomes"],
    advantage_V: Float[Tensor, " outcomes"],
    damping: float = 0.0,
) -> Float[Tensor, " parameters"]:
    """Return the natural policy gradient (F + c I)^-1 g.

    It maximizes g.v - (v.F v + c |v|^2) / 2. Without damping it is the shortest such v, the
    pseudo-inverse: directions that do not move the policy are left at 0.

    Args:
        score_VP: The scores.
        prob_V: The policy.
        advantage_V: The advantage of each outcome.
        damping: c, in the unit of F; 0 for none.

    Returns:
        The direction, to ascend.

    Raises:
        ProxstepError: The damping is negative.

    Source: arXiv 2512.23353, section 1.2.
    """
    if not damping >= 0:
        raise ProxstepError(f"damping is {damping}; it must be 0 or more.")
    gradient_P = policy_gradient(score_VP, prob_V, advantage_V)
    eigenvalue_P, eigenvector_PP = torch.linalg.eigh(fisher_matrix(score_VP, prob_V))
    resolution = len(eigenvalue_P) * torch.finfo(eigenvalue_P.dtype).eps * eigenvalue_P[-1]
    flat_P = eigenvalue_P <= resolution
    shifted_P = eigenvalue_P.masked_fill(flat_P, 0.0) + damping
    inverse_P = torch.where(shifted_P > 0, 1 / shifted_P, 0.0)
    return eigenvector_PP @ (inverse_P * (eigenvector_PP.mT @ gradient_P))

"""Policies over finitely many outcomes: expectations, ratio coordinates, distances.

Shapes: V outcomes. All functions sum over the last dimension and take leading dimensions along;
`anchor_V` is pi_k, positive everywhere.
"""

from __future__ import annotations

import torch

from proxstep.errors import ProxstepError
from proxstep.typing import Float, Tensor


def expectation(
    value_V: Float[Tensor, "... outcomes"], prob_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, ...]:
    """Return E_pi[f] = sum_y pi(y) f(y).

    Args:
        value_V: f of each outcome.
        prob_V: The policy.

    Returns:
        The expectation, in f's unit.
    """
    return (prob_V * value_V).sum(dim=-1)


def inner(
    left_V: Float[Tensor, "... outcomes"],
    right_V: Float[Tensor, "... outcomes"],
    prob_V: Float[Tensor, "... outcomes"],
) -> Float[Tensor, ...]:
    """Return the inner product of L2(pi), <f, g> = E_pi[f g].

    Args:
        left_V: f of each outcome.
        right_V: g of each outcome.
        prob_V: The policy.

    Returns:
        The inner product; of a function with itself, its squared norm.

    Source: arXiv 2601.12415, section 6.1.
    """
    return expectation(left_V * right_V, prob_V)


def centered(
    value_V: Float[Tensor, "... outcomes"], prob_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, "... outcomes"]:
    """Return f - E_pi[f], the orthogonal projection of f onto the functions of mean zero.

    Args:
        value_V: f of each outcome.
        prob_V: The policy.

    Returns:
        The projection: the element of H_0 = {v : E_pi[v] = 0} that is nearest to f in L2(pi).

    Source: arXiv 2601.12415, equations 3 and 18.
    """
    return value_V - expectation(value_V, prob_V)[..., None]


def ratio(
    prob_V: Float[Tensor, "... outcomes"], anchor_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, "... outcomes"]:
    """Return t = pi / pi_k.

    Args:
        prob_V: The policy.
        anchor_V: The anchor.

    Returns:
        The ratio of each outcome.

    Source: arXiv 2601.12415, equation 1.
    """
    return prob_V / anchor_V


def deviation(
    prob_V: Float[Tensor, "... outcomes"], anchor_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, "... outcomes"]:
    """Return v = pi / pi_k - 1; a policy has E_{pi_k}[v] = 0 and v >= -1.

    Args:
        prob_V: The policy.
        anchor_V: The anchor.

    Returns:
        The deviation of each outcome.

    Source: arXiv 2601.12415, equations 1 and 2.
    """
    return ratio(prob_V, anchor_V) - 1


def log_ratio(
    prob_V: Float[Tensor, "... outcomes"], anchor_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, "... outcomes"]:
    """Return Delta = log pi - log pi_k.

    Args:
        prob_V: The policy.
        anchor_V: The anchor.

    Returns:
        The log-ratio of each outcome, in nats; minus infinity where the policy is 0.

    Source: arXiv 2601.12415, equation 1.
    """
    return prob_V.log() - anchor_V.log()


def policy_of(
    deviation_V: Float[Tensor, "... outcomes"], anchor_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, "... outcomes"]:
    """Return pi = pi_k (1 + v), the inverse of `deviation`.

    Args:
        deviation_V: v of each outcome.
        anchor_V: The anchor.

    Returns:
        A probability vector if E_{pi_k}[v] = 0 and v >= -1, else no policy.

    Source: arXiv 2601.12415, equation 12.
    """
    return anchor_V * (1 + deviation_V)


def chi_square(
    prob_V: Float[Tensor, "... outcomes"], anchor_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, ...]:
    """Return the Pearson divergence chi2(pi || pi_k) = E_{pi_k}[v^2].

    Args:
        prob_V: The policy.
        anchor_V: The anchor.

    Returns:
        The divergence, 0 or more.

    Source: arXiv 2601.12415, equation 8 and proposition 8.3.
    """
    v_V = deviation(prob_V, anchor_V)
    return inner(v_V, v_V, anchor_V)


def total_variation(
    prob_V: Float[Tensor, "... outcomes"], anchor_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, ...]:
    """Return TV(pi, pi_k) = E_{pi_k}[|v|] / 2, at most sqrt(chi2) / 2.

    Args:
        prob_V: The policy.
        anchor_V: The anchor.

    Returns:
        The distance, in [0, 1].

    Source: arXiv 2601.12415, proposition A.3.
    """
    return expectation(deviation(prob_V, anchor_V).abs(), anchor_V) / 2


def kl(
    prob_V: Float[Tensor, "... outcomes"], other_V: Float[Tensor, "... outcomes"]
) -> Float[Tensor, ...]:
    """Return KL(pi || other) = sum_y pi(y) log(pi(y) / other(y)).

    Args:
        prob_V: The policy whose outcomes are averaged; it may be 0 somewhere.
        other_V: The other policy.

    Returns:
        The divergence in nats; infinite where only the other policy is 0.
    """
    xlogy = torch.special.xlogy
    return (xlogy(prob_V, prob_V) - xlogy(prob_V, other_V)).sum(dim=-1)


def check_positive_policy(name: str, prob_V: Tensor) -> None:
    """Raise ProxstepError unless the vector is a policy without zeros.

    Args:
        name: What the message calls it.
        prob_V: One probability per outcome.

    Raises:
        ProxstepError: A probability is not above 0, or they do not add up to 1.
    """
    if not bool((prob_V > 0).all()):
        raise ProxstepError(
            f"{name} must be above 0 for every outcome: leave out those that it never takes."
        )
    total = prob_V.sum(dim=-1)
    if not torch.allclose(total, torch.ones_like(total), rtol=0.0, atol=1e-6):
        raise ProxstepError(f"{name} must add up to 1: divide it by its sum.")

"""The log-ratio surrogate, how far it is from the objective, and where its optimum lies.

Shapes: V outcomes. Delta is the log-ratio to the anchor and v = exp(Delta) - 1 the deviation.
"""

from __future__ import annotations

import math

import torch

from proxstep.algorithms.aggregate import check_positive
from proxstep.errors import ProxstepError
from proxstep.typing import Float, Tensor
from tests.theory.maths.categorical import check_positive_policy, expectation, inner

_LOWEST = -80.0  # a multiplier of mu e^-80 is 0 in float64
_HALVINGS = 64
_NEWTON_STEPS = 10
_RESOLUTION = 1e-6


def log_loss(
    log_ratio_V: Float[Tensor, " outcomes"],
    drive_V: Float[Tensor, " outcomes"],
    anchor_V: Float[Tensor, " outcomes"],
    mu: float,
) -> Float[Tensor, ""]:
    """Return the surrogate -E[drive Delta] + (mu / 2) E[Delta^2], expectations under the anchor.

    For a policy, E[Delta] = -KL(pi_k || pi). With the drive omega, as printed, the loss is
    therefore that of the drive omega - 1 plus KL(pi_k || pi), which adds 1 to the curvature.

    Args:
        log_ratio_V: Delta, in nats.
        drive_V: omega, or omega - 1.
        anchor_V: The anchor.
        mu: Curvature of the penalty.

    Returns:
        The surrogate's value.

    Source: arXiv 2601.12415, equation 19.
    """
    penalty = mu / 2 * inner(log_ratio_V, log_ratio_V, anchor_V)
    return penalty - inner(drive_V, log_ratio_V, anchor_V)


def deviation_error_bound(largest: float) -> float:
    """Return the bound delta^2 e^delta / 2 of |v - Delta|.

    Args:
        largest: delta, the largest |Delta|, in nats.

    Returns:
        The bound, which holds for every delta >= 0.

    Source: arXiv 2601.12415, lemma A.1.
    """
    return largest**2 * math.exp(largest) / 2


def square_error_bound(largest: float) -> float:
    """Return the bound delta^3 e^(2 delta) of |v^2 - Delta^2|.

    Args:
        largest: delta, the largest |Delta|, in nats.

    Returns:
        The bound, which holds for every delta >= 0.

    Source: arXiv 2601.12415, lemma A.1.
    """
    return largest**3 * math.exp(2 * largest)


def loss_error(
    log_ratio_V: Float[Tensor, " outcomes"],
    drive_V: Float[Tensor, " outcomes"],
    anchor_V: Float[Tensor, " outcomes"],
) -> Float[Tensor, ""]:
    """Return the leading term E[drive Delta^2] / 2 of the surrogate less the exact objective.

    Args:
        log_ratio_V: Delta, in nats.
        drive_V: omega, or omega - 1.
        anchor_V: The anchor.

    Returns:
        The term of second order in Delta; what is left is of third order.

    Source: arXiv 2601.12415, lemma A.1.
    Differs: the lemma concludes that the losses differ at third order. The penalties do; the drives
    differ at second order, unless the drive itself is as small as Delta.
    """
    return inner(drive_V, log_ratio_V.square(), anchor_V) / 2


def optimum(
    drive_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, " outcomes"]:
    """Return the log-ratio of the policy at which the surrogate is smallest.

    mu Delta(y) + lambda exp(Delta(y)) = drive(y), with lambda >= 0 such that E[exp(Delta)] = 1.
    With w = lambda exp(Delta) / mu and kappa = log(lambda / mu) that is w + log w = kappa +
    drive / mu, solved for w by Newton's method, and E[w] = exp(kappa), for kappa by bisection.

    To first order in the drive's spread v = (omega - 1) / (mu + E[drive]): the optimum of theorem
    4.3 for the centered drive, and a shorter step for omega as printed.

    Args:
        drive_V: omega or omega - 1; its mean under the anchor is 0 or more.
        anchor_V: The anchor.
        mu: Curvature of the penalty, above 0.

    Returns:
        Delta of each outcome, in nats, to rounding error.

    Raises:
        ProxstepError: mu is not above 0, the anchor is no policy without zeros, or the drive's mean
            is negative.

    Source: arXiv 2601.12415, equation 19.
    """
    check_positive("mu", mu)
    check_positive_policy("anchor_V", anchor_V)
    if expectation(drive_V, anchor_V) < -_RESOLUTION:
        raise ProxstepError("drive_V has a negative mean under the anchor: center it.")
    low, high = drive_V.new_tensor(_LOWEST), (drive_V.max().clamp(min=0) / mu).log1p()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_small = expectation(_wright_omega(middle + drive_V / mu), anchor_V) > middle.exp()
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    return drive_V / mu - _wright_omega((low + high) / 2 + drive_V / mu)


def _wright_omega(value_V: Tensor) -> Tensor:
    """Return w with w + log w = the value, by Newton's method for log w."""
    log_w = torch.where(value_V > 1, value_V.clamp(min=1).log(), value_V)
    for _ in range(_NEWTON_STEPS):
        w = log_w.exp()
        log_w = log_w - (log_w + w - value_V) / (1 + w)
    return log_w.exp()

"""Gradient descent on OPO's objective in v-space, and its rate.

Shapes: V outcomes, N steps.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.aggregate import check_positive
from proxstep.typing import Float, Tensor
from tests.theory.maths.opo import gradient


def path(
    start_V: Float[Tensor, " outcomes"],
    drive_V: Float[Tensor, " outcomes"],
    mu: float,
    step_size: float,
    num_steps: int,
) -> Float[Tensor, "iterates outcomes"]:
    """Return the iterates v <- v - eta (mu v - drive).

    With the centered drive omega - 1 they stay in H_0 and approach v* = (omega - 1) / mu.

    Args:
        start_V: v at the start, of mean 0 for a policy.
        drive_V: omega - 1; or omega, as printed.
        mu: Curvature of the penalty, above 0.
        step_size: eta; the iterates converge if it is below 2 / mu.
        num_steps: N.

    Returns:
        N + 1 iterates, the start first.

    Raises:
        ProxstepError: mu or the step size is not above 0.

    Source: arXiv 2601.12415, section 8.2.
    Differs: with omega, as printed, the iterates leave H_0 and approach omega / mu.
    """
    check_positive("mu", mu)
    check_positive("step_size", step_size)
    iterates = [start_V]
    for _ in range(num_steps):
        iterates.append(iterates[-1] - step_size * gradient(iterates[-1], drive_V, mu))
    return torch.stack(iterates)


def contraction(mu: float, step_size: float) -> float:
    """Return |1 - eta mu|, by which the distance to the optimum shrinks in every step.

    Args:
        mu: Curvature of the penalty.
        step_size: eta.

    Returns:
        The factor; below 1 for 0 < eta < 2 / mu.

    Source: arXiv 2601.12415, equation 20 and corollary 8.2.
    """
    return abs(1 - step_size * mu)

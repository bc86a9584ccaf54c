"""OPO's objective in the deviation v, and three derivations of its optimum.

Shapes: V outcomes. `anchor_V` is pi_k, `weight_V` the escort weight omega, `deviation_V` is
v = pi / pi_k - 1. Gradients and curvatures are those of the Hilbert space L2(pi_k): what automatic
differentiation returns for outcome y is pi_k(y) times as large.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.aggregate import check_positive
from proxstep.algorithms.safeguards import regression_target
from proxstep.typing import Float, Tensor
from tests.theory.maths.categorical import centered, check_positive_policy, inner, policy_of


def objective(
    deviation_V: Float[Tensor, " outcomes"],
    weight_V: Float[Tensor, " outcomes"],
    anchor_V: Float[Tensor, " outcomes"],
    mu: float,
) -> Float[Tensor, ""]:
    """Return the loss L(v) = -E[omega v] + (mu / 2) E[v^2], expectations under the anchor.

    Args:
        deviation_V: v, of mean 0 for a policy.
        weight_V: The escort weight.
        anchor_V: The anchor.
        mu: Curvature of the penalty.

    Returns:
        The dissipation less the work.

    Source: arXiv 2601.12415, equation 10; its negative is equation 9.
    """
    work = inner(weight_V, deviation_V, anchor_V)
    return dissipation(deviation_V, anchor_V, mu) - work


def dissipation(
    deviation_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, ""]:
    """Return the dissipation (mu / 2) E[v^2], mu / 2 times the Pearson divergence.

    Args:
        deviation_V: v.
        anchor_V: The anchor.
        mu: Curvature of the penalty.

    Returns:
        The energy, 0 or more.

    Source: arXiv 2601.12415, equation 8.
    """
    return mu / 2 * inner(deviation_V, deviation_V, anchor_V)


def gradient(
    deviation_V: Float[Tensor, " outcomes"], drive_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, " outcomes"]:
    """Return the gradient in L2(pi_k), -drive + mu v.

    With the centered drive omega - 1 this is the gradient within H_0, which vanishes at the
    optimum. With omega itself, as printed, it is the gradient in all of L2, which is -1 there.

    Args:
        deviation_V: v.
        drive_V: omega, or omega - 1.
        mu: Curvature of the penalty.

    Returns:
        The gradient at each outcome.

    Source: arXiv 2601.12415, theorem 8.1.
    """
    return mu * deviation_V - drive_V


def closed_form(
    weight_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, " outcomes"]:
    """Return the optimum v* = (omega - E[omega]) / mu, where E[omega] is 1 for an escort weight.

    Args:
        weight_V: The escort weight, or any other drive.
        anchor_V: The anchor.
        mu: Curvature of the penalty, above 0.

    Returns:
        The optimum among the functions of mean 0; it can fall below -1 (`simplex`).

    Raises:
        ProxstepError: mu is not above 0.

    Source: arXiv 2601.12415, theorem 4.3.
    """
    return regression_target(centered(weight_V, anchor_V), mu=mu)


def update(
    weight_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, " outcomes"]:
    """Return pi_{k+1} = pi_k (1 + (omega - 1) / mu).

    Args:
        weight_V: The escort weight.
        anchor_V: The anchor.
        mu: Curvature of the penalty, above 0; from 1 on the result is a policy.

    Returns:
        Numbers that add up to 1, negative where omega < 1 - mu.

    Raises:
        ProxstepError: mu is not above 0.

    Source: arXiv 2601.12415, equation 12.
    """
    return policy_of(closed_form(weight_V, anchor_V, mu), anchor_V)


def lagrange(
    weight_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> tuple[Float[Tensor, " outcomes"], Float[Tensor, ""]]:
    """Return optimum and multiplier of the constrained problem, by solving its linear system.

    mu pi_k(y) v(y) + pi_k(y) lambda = pi_k(y) omega(y) for every y, and E[v] = 0

    Args:
        weight_V: The escort weight.
        anchor_V: The anchor.
        mu: Curvature of the penalty, above 0.

    Returns:
        v* and the multiplier lambda = E[omega].

    Raises:
        ProxstepError: mu is not above 0, or the anchor is no policy without zeros.

    Source: arXiv 2601.12415, theorem 4.3 and its proof.
    """
    check_positive("mu", mu)
    check_positive_policy("anchor_V", anchor_V)
    column_V1 = anchor_V[:, None]
    corner = anchor_V.new_zeros(1, 1)
    top = torch.cat([mu * torch.diag(anchor_V), column_V1], dim=1)
    system = torch.cat([top, torch.cat([column_V1.mT, corner], dim=1)])
    right = torch.cat([anchor_V * weight_V, corner[0]])
    solution = torch.linalg.solve(system, right)
    return solution[:-1], solution[-1]


def mirror_divergence(
    left_V: Float[Tensor, " outcomes"],
    right_V: Float[Tensor, " outcomes"],
    anchor_V: Float[Tensor, " outcomes"],
) -> Float[Tensor, ""]:
    """Return the Bregman divergence of the mirror map Psi(v) = |v|^2 / 2.

    D(v, w) = Psi(v) - Psi(w) - <grad Psi(w), v - w>, where grad Psi(w) = w

    Args:
        left_V: v.
        right_V: w, the point of expansion; 0 is the anchor.
        anchor_V: The anchor.

    Returns:
        The divergence, |v - w|^2 / 2: from the anchor, half the Pearson divergence.

    Source: arXiv 2601.12415, equation 13.
    """
    energies = inner(left_V, left_V, anchor_V) - inner(right_V, right_V, anchor_V)
    return energies / 2 - inner(right_V, left_V - right_V, anchor_V)


def mirror_step(
    start_V: Float[Tensor, " outcomes"],
    drive_V: Float[Tensor, " outcomes"],
    anchor_V: Float[Tensor, " outcomes"],
    mu: float,
) -> Float[Tensor, " outcomes"]:
    """Return the mirror-descent step with step size 1 / mu from a starting point.

    It minimizes -<drive, v> + mu D(v, start) over v of mean 0. The mirror map's gradient is the
    identity, so the step adds drive / mu and projects.

    Args:
        start_V: Where the step starts; 0 is the anchor, which gives OPO's update.
        drive_V: The escort weight.
        anchor_V: The anchor.
        mu: Inverse step size, above 0.

    Returns:
        The point after the step.

    Raises:
        ProxstepError: mu is not above 0.

    Source: arXiv 2601.12415, equation 14.
    """
    check_positive("mu", mu)
    return centered(start_V + drive_V / mu, anchor_V)


def hilbert_projection(
    value_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, " outcomes"]:
    """Return the projection onto H_0, from an orthonormal basis of it.

    The basis comes from a QR factorization of the constant function and the indicators; nothing
    here knows that the projection is the subtraction of the mean. OPO's optimum is the projection
    of omega / mu.

    Args:
        value_V: The function to project.
        anchor_V: The anchor.

    Returns:
        The nearest function of mean 0, in L2(pi_k).

    Raises:
        ProxstepError: The anchor is no policy without zeros.

    Source: arXiv 2601.12415, equations 17 and 18.
    """
    check_positive_policy("anchor_V", anchor_V)
    root_V = anchor_V.sqrt()
    indicators = torch.eye(len(root_V), dtype=root_V.dtype, device=root_V.device)[:, 1:]
    basis_VV, _ = torch.linalg.qr(torch.cat([root_V[:, None], indicators], dim=1))
    mean_zero = basis_VV[:, 1:]
    return mean_zero @ (mean_zero.mT @ (root_V * value_V)) / root_V

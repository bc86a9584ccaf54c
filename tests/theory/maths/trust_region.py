"""The trust region of radius epsilon in chi-square, and the mu that stands for it.

Shapes: V outcomes. With `drive_V` the centered weight omega - 1 the solution is a tangent of the
simplex (proposition 8.3); with omega it is the problem that proposition A.2 prints.
"""

from __future__ import annotations

from proxstep.algorithms.aggregate import check_positive
from proxstep.typing import Float, Tensor
from tests.theory.maths.categorical import inner


def optimum(
    drive_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], radius: float
) -> Float[Tensor, " outcomes"]:
    """Return the v that maximizes <drive, v> subject to |v|^2 <= epsilon.

    v = sqrt(epsilon) drive / |drive|, and 0 for a drive of 0

    Args:
        drive_V: omega - 1, or omega.
        anchor_V: The anchor.
        radius: epsilon, the largest Pearson divergence; above 0.

    Returns:
        The maximizer.

    Raises:
        ProxstepError: The radius is not above 0.

    Source: arXiv 2601.12415, proposition 8.3 and equation 22.
    """
    mu = multiplier(drive_V, anchor_V, radius)
    return drive_V / mu.where(mu > 0, 1.0)


def multiplier(
    drive_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], radius: float
) -> Float[Tensor, ""]:
    """Return the mu whose penalized optimum lies on the trust region's border.

    mu = |drive| / sqrt(epsilon)

    Args:
        drive_V: omega - 1, or omega.
        anchor_V: The anchor.
        radius: epsilon; above 0.

    Returns:
        mu; 0 for a drive of 0, which no radius holds back.

    Raises:
        ProxstepError: The radius is not above 0.

    Source: arXiv 2601.12415, proposition 8.3.
    Differs: mu is twice the Lagrange multiplier of |v|^2 <= epsilon as printed; it is the
    multiplier of |v|^2 / 2 <= epsilon / 2.
    """
    check_positive("radius", radius)
    return (inner(drive_V, drive_V, anchor_V) / radius).sqrt()


def radius_of(
    drive_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"], mu: float
) -> Float[Tensor, ""]:
    """Return the radius that a mu stands for, epsilon = |drive|^2 / mu^2.

    Args:
        drive_V: omega - 1, or omega.
        anchor_V: The anchor.
        mu: Curvature of the penalty, above 0.

    Returns:
        The Pearson divergence of the penalized optimum.

    Raises:
        ProxstepError: mu is not above 0.

    Source: arXiv 2601.12415, proposition 8.3.
    """
    check_positive("mu", mu)
    return inner(drive_V, drive_V, anchor_V) / mu**2

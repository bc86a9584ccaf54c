"""ISOPO's scalings of a single sequence, and the interacting rule as MinSR.

Shapes: B sequences, P parameters of one layer. `score_BP` holds the gradients of the sequences'
log-probabilities, the rows of the paper's J.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.aggregate import check_positive
from proxstep.typing import Float, Tensor


def isometric_scale(
    fisher_square_B: Float[Tensor, " batch"], regularization: float
) -> Float[Tensor, " batch"]:
    """Return the scale 1 / sqrt(|v|_F^2 + reg) that bounds each sequence's share.

    The scaled gradient's length in the Fisher metric is below 1, and within a factor sqrt(2) of
    min(1, |v|_F / sqrt(reg)): a soft clip at sqrt(reg).

    Args:
        fisher_square_B: |v|_F^2 of each sequence's gradient.
        regularization: reg, in the same unit; 0 for none.

    Returns:
        The scale of each sequence, before its advantage.

    Source: arXiv 2512.23353, section 2.0.1.
    """
    return (fisher_square_B + regularization).rsqrt()


def closest_scale(
    direction_P: Float[Tensor, " parameters"],
    gradient_P: Float[Tensor, " parameters"],
    fisher_PP: Float[Tensor, "parameters parameters"],
) -> Float[Tensor, ""]:
    """Return the multiple of v that is nearest to F^-1 g in the Fisher metric, v.g / v.F v.

    For one sequence's g = A v that is A |v|^2 / |v|_F^2.

    Args:
        direction_P: v, a sequence's gradient.
        gradient_P: g, the policy gradient (one sequence's, or all of it).
        fisher_PP: F.

    Returns:
        The minimizing lambda.

    Source: arXiv 2512.23353, equation 7 and section 2.0.3.
    """
    return direction_P @ gradient_P / (direction_P @ fisher_PP @ direction_P)


def distance_to_natural(
    scale: Float[Tensor, ""],
    direction_P: Float[Tensor, " parameters"],
    gradient_P: Float[Tensor, " parameters"],
    fisher_PP: Float[Tensor, "parameters parameters"],
) -> Float[Tensor, ""]:
    """Return |lambda v - F^-1 g|_F^2.

    Args:
        scale: lambda.
        direction_P: v.
        gradient_P: g.
        fisher_PP: F, positive definite.

    Returns:
        The squared distance in the Fisher metric.

    Source: arXiv 2512.23353, equation 7.
    """
    difference_P = scale * direction_P - torch.linalg.solve(fisher_PP, gradient_P)
    return difference_P @ fisher_PP @ difference_P


def minsr(
    score_BP: Float[Tensor, "batch parameters"],
    advantage_B: Float[Tensor, " batch"],
    damping: float,
) -> Float[Tensor, " parameters"]:
    """Return the interacting update J^T (K + c I)^-1 A, with the kernel K = J J^T.

    It equals (J^T J + c I)^-1 J^T A, the natural gradient with the sample's Fisher matrix J^T J / B
    and damping c / B: the solve has the size of the batch, not of the parameters.

    Args:
        score_BP: J.
        advantage_B: A.
        damping: c, above 0, in the unit of K.

    Returns:
        The update, to ascend.

    Raises:
        ProxstepError: The damping is not above 0.

    Source: arXiv 2512.23353, section 3.
    """
    check_positive("damping", damping)
    identity_BB = torch.eye(len(score_BP), dtype=score_BP.dtype, device=score_BP.device)
    kernel_BB = score_BP @ score_BP.mT + damping * identity_BB
    return score_BP.mT @ torch.linalg.solve(kernel_BB, advantage_B)


def damped_overlap(
    direction_P: Float[Tensor, " parameters"],
    score_BP: Float[Tensor, "batch parameters"],
    advantage_B: Float[Tensor, " batch"],
    damping: float,
) -> Float[Tensor, ""]:
    """Return what the interacting update maximizes: overlap less half of two penalties.

    g.v - (|J v|^2 + c |v|^2) / (2 n), with g = J^T A / n

    Args:
        direction_P: v.
        score_BP: J.
        advantage_B: A.
        damping: c, in the unit of K.

    Returns:
        The value, which is largest at `minsr`.

    Source: arXiv 2512.23353, section 3.
    Differs: the paper names the penalties but not their factors; these make it exact.
    """
    moved_B = score_BP @ direction_P
    penalty = moved_B @ moved_B + damping * direction_P @ direction_P
    return (moved_B @ advantage_B - penalty / 2) / len(score_BP)

"""ISOPO's estimates of the Fisher norm, written out as the paper derives them.

Shapes: N sequences, T token positions, P parameters; for a linear layer O output and I input
features, with g_j the gradient of the output and a_j the input at position j.
"""

from __future__ import annotations

from proxstep.typing import Float, Tensor


def sequence_square(
    direction_P: Float[Tensor, " parameters"], gradient_NP: Float[Tensor, "sequences parameters"]
) -> Float[Tensor, ""]:
    """Return the direct estimate (1 / n) sum_i (v.g_i)^2 of v.F v.

    Args:
        direction_P: v.
        gradient_NP: The gradient of each sampled sequence's log-probability.

    Returns:
        The estimate; its mean is v.F v if v does not depend on the sample.

    Source: arXiv 2512.23353, equation 2.
    """
    return (gradient_NP @ direction_P).square().mean()


def position_square(
    direction_P: Float[Tensor, " parameters"], gradient_TP: Float[Tensor, "positions parameters"]
) -> Float[Tensor, ""]:
    """Return the normalized estimate sum_j (v.g_j)^2 / sum_j |g_j|^2.

    Args:
        direction_P: v.
        gradient_TP: The gradients of single positions; their number and scale cancel.

    Returns:
        The estimate, at most |v|^2: an estimate of v.F v / trace F, not of v.F v.

    Source: arXiv 2512.23353, equation 3.
    Differs: the paper writes it as an estimate of v.F v; see the unit above.
    """
    return (gradient_TP @ direction_P).square().sum() / gradient_TP.square().sum()


def linear_overlaps(
    direction_OI: Float[Tensor, "out in"],
    grad_TO: Float[Tensor, "positions out"],
    input_TI: Float[Tensor, "positions in"],
) -> Float[Tensor, " positions"]:
    """Return the overlap of a direction with each position's gradient, g_j . V a_j.

    Args:
        direction_OI: V, a direction of the weight matrix.
        grad_TO: Gradients of the layer's output.
        input_TI: Inputs of the layer.

    Returns:
        <V, g_j a_j^T> of each position, whose matrix is never formed.

    Source: arXiv 2512.23353, equation 4.
    """
    return (grad_TO * (input_TI @ direction_OI.mT)).sum(dim=1)


def linear_squares(
    grad_TO: Float[Tensor, "positions out"], input_TI: Float[Tensor, "positions in"]
) -> Float[Tensor, " positions"]:
    """Return the squared norm of each position's gradient, |g_j|^2 |a_j|^2.

    Args:
        grad_TO: Gradients of the layer's output.
        input_TI: Inputs of the layer.

    Returns:
        |g_j a_j^T|^2 of each position.

    Source: arXiv 2512.23353, equation 5.
    Differs: the paper prints a_in without its index j.
    """
    return grad_TO.square().sum(dim=1) * input_TI.square().sum(dim=1)


def linear_norm(
    direction_OI: Float[Tensor, "out in"],
    grad_TO: Float[Tensor, "positions out"],
    input_TI: Float[Tensor, "positions in"],
) -> Float[Tensor, ""]:
    """Return F_norm, the square root of equation 3's estimate for a linear layer.

    F_norm = sqrt(sum_j (g_j . V a_j)^2) / sqrt(sum_j |g_j|^2 |a_j|^2)

    Args:
        direction_OI: V, a sequence's gradient of the weight matrix.
        grad_TO: Gradients of the layer's output at the sampled positions.
        input_TI: Inputs of the layer at the sampled positions.

    Returns:
        The estimate, at most |V|.

    Source: arXiv 2512.23353, equation 6 and figure 2.
    """
    overlap_T = linear_overlaps(direction_OI, grad_TO, input_TI)
    return overlap_T.square().sum().sqrt() / linear_squares(grad_TO, input_TI).sum().sqrt()

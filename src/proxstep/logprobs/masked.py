"""Sums and means over the true positions of a mask."""

from __future__ import annotations

from proxstep.typing import Bool, Float, Tensor


def masked_sum(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return each row's sum over the positions where the mask is true.

    Masked-out values may be anything, infinities and NaN included: they reach neither the sum nor
    its gradient.

    Args:
        values: One value per token position.
        mask: True where the position counts.

    Returns:
        One sum per row; 0 for a row without a true position.
    """
    return values.masked_fill(~mask, 0.0).sum(dim=-1)


def masked_mean(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return each row's mean over the positions where the mask is true.

    Args:
        values: One value per token position.
        mask: True where the position counts.

    Returns:
        One mean per row; 0 for a row without a true position.
    """
    return masked_sum(values, mask) / mask.sum(dim=-1).clamp(min=1)

"""Figures of one parameter use over the sequences of a step, for all uses at once.

An unknown value is NaN, in what goes in and in what comes out.

Legend for shape suffixes: U parameter uses, M microbatches, B sequences, padded to the largest
microbatch; N sequences of all microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxstep.typing import Bool, Float, Tensor

RESOLUTION = torch.finfo(torch.float32).eps
"""Statistics are accumulated in float32 or better: what is smaller relative to its like is rounding
error.
"""


def quantiles(value_UN: Float[Tensor, "uses sequences"]) -> Float[Tensor, "uses 5"]:
    """Return the minimum, the quartiles and the maximum of the known values."""
    at = torch.linspace(0, 1, 5, dtype=value_UN.dtype)
    return value_UN.nanquantile(at, dim=-1).mT


def relative_spread(value_UN: Float[Tensor, "uses sequences"]) -> Float[Tensor, " uses"]:
    """Return the known values' standard deviation over the absolute value of their mean."""
    mean_U1 = value_UN.nanmean(dim=-1, keepdim=True)
    variance_U = (value_UN - mean_U1).square().nanmean(dim=-1)
    return variance_U.sqrt() / mean_U1.squeeze(-1).abs()


def largest_share(value_UN: Float[Tensor, "uses sequences"]) -> Float[Tensor, " uses"]:
    """Return the largest absolute value over the sum of all; NaN if one of them is unknown."""
    size_UN = value_UN.abs()
    return size_UN.amax(dim=-1) / size_UN.sum(dim=-1)


def log_correlation(
    left_UN: Float[Tensor, "uses sequences"], right_UN: Float[Tensor, "uses sequences"]
) -> Float[Tensor, " uses"]:
    """Return the correlation between the logarithms, over the pairs that are known and positive.

    NaN for fewer than three pairs (two always lie on a line) and where one side is constant.
    """
    known_UN = (left_UN > 0) & (right_UN > 0)
    left_UN, right_UN = (x.where(known_UN, torch.nan).log() for x in (left_UN, right_UN))
    left_UN = left_UN - left_UN.nanmean(dim=-1, keepdim=True)
    right_UN = right_UN - right_UN.nanmean(dim=-1, keepdim=True)
    left_U, right_U = (x.square().nanmean(dim=-1).sqrt() for x in (left_UN, right_UN))
    valid_U = (known_UN.sum(dim=-1) >= 3) & (left_U > RESOLUTION) & (right_U > RESOLUTION)
    correlation_U = (left_UN * right_UN).nanmean(dim=-1) / (left_U * right_U)
    return correlation_U.clamp(-1, 1).where(valid_U, torch.nan)


@dataclass(frozen=True)
class InnerProducts:
    """What the transformed gradient T and the plain one P have to do with each other.

    Attributes:
        transformed_U: |T|^2, with T = sum_b weight_b G_b in each microbatch.
        mixed_U: <T, P>, with P = sum_b coefficient_b G_b in each microbatch.
        plain_U: |P|^2.
    """

    transformed_U: Float[Tensor, " uses"]
    mixed_U: Float[Tensor, " uses"]
    plain_U: Float[Tensor, " uses"]

    def cosine_U(self) -> Float[Tensor, " uses"]:
        """Return the cosine between T and P, per use."""
        return _cosine(self.transformed_U, self.mixed_U, self.plain_U)

    def cosine(self) -> Float[Tensor, ""]:
        """Return the cosine between T and P of all uses whose kernels are known."""
        return _cosine(self.transformed_U.nansum(), self.mixed_U.nansum(), self.plain_U.nansum())


def inner_products(
    weight_UMB: Float[Tensor, "uses microbatches batch"],
    coefficient_UMB: Float[Tensor, "uses microbatches batch"],
    ntk_UMBB: Float[Tensor, "uses microbatches batch batch"],
    has_ntk_UM: Bool[Tensor, "uses microbatches"],
) -> InnerProducts:
    """Return the inner products of each microbatch's gradients, added up over microbatches.

    Those between gradients of different microbatches are not in the kernels and are left out, as
    if the microbatches' gradients were orthogonal.

    Args:
        weight_UMB: The rule's weights; 0 in the padding.
        coefficient_UMB: The coefficients; 0 in the padding.
        ntk_UMBB: The kernels; 0 in the padding and where they are unknown.
        has_ntk_UM: Which kernels are known.
    """

    def product(left_UMB: Tensor, right_UMB: Tensor) -> Tensor:
        value_U = torch.einsum("umb,umbc,umc->u", left_UMB, ntk_UMBB, right_UMB)
        return value_U.where(has_ntk_UM.any(dim=-1), torch.nan)

    return InnerProducts(
        transformed_U=product(weight_UMB, weight_UMB).clamp(min=0),
        mixed_U=product(weight_UMB, coefficient_UMB),
        plain_U=product(coefficient_UMB, coefficient_UMB).clamp(min=0),
    )


@dataclass(frozen=True)
class Spectrum:
    """The kernels of each use, pooled over microbatches."""

    eigenvalue_min_U: Float[Tensor, " uses"]
    eigenvalue_max_U: Float[Tensor, " uses"]
    condition_U: Float[Tensor, " uses"]
    effective_rank_U: Float[Tensor, " uses"]
    off_diagonal_U: Float[Tensor, " uses"]


def spectrum(
    ntk_UMBB: Float[Tensor, "uses microbatches batch batch"],
    present_UMB: Bool[Tensor, "uses microbatches batch"],
    has_ntk_UM: Bool[Tensor, "uses microbatches"],
) -> Spectrum:
    """Return eigenvalues, condition numbers and shares of the kernels.

    Args:
        ntk_UMBB: The kernels; 0 in the padding and where they are unknown.
        present_UMB: Where there is a sequence.
        has_ntk_UM: Which kernels are known.

    Returns:
        Extremes over microbatches, the median of the condition number and the means of the rest. A
        kernel whose smallest eigenvalue is rounding error is singular: its condition number is
        infinite. A kernel of zeros has eigenvalues only.
    """
    trace_UM = ntk_UMBB.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    # The mean eigenvalue on the padding's diagonal lies between the extremes and moves neither.
    mean_UM = trace_UM / present_UMB.sum(dim=-1).clamp(min=1)
    filler_UMB = mean_UM[..., None].where(~present_UMB, 0.0)
    filled_XBB = ntk_UMBB[has_ntk_UM]
    filled_XBB.diagonal(dim1=-2, dim2=-1).add_(filler_UMB[has_ntk_UM])
    eigenvalue_XB = torch.linalg.eigvalsh(filled_XBB)
    nothing_UM = torch.full_like(trace_UM, torch.nan)
    low_UM = nothing_UM.masked_scatter(has_ntk_UM, eigenvalue_XB[:, 0].clamp(min=0))
    high_UM = nothing_UM.masked_scatter(has_ntk_UM, eigenvalue_XB[:, -1].clamp(min=0))
    condition_UM = (high_UM / low_UM).where(low_UM > RESOLUTION * high_UM, torch.inf)
    positive_UM = has_ntk_UM & (high_UM > 0)
    off_diagonal_UM = 1 - trace_UM / torch.linalg.vector_norm(ntk_UMBB, 1, dim=(-2, -1))
    rank_UM = (trace_UM / torch.linalg.vector_norm(ntk_UMBB, 2, dim=(-2, -1))).square()
    return Spectrum(
        eigenvalue_min_U=-_nanmax(-low_UM),
        eigenvalue_max_U=_nanmax(high_UM),
        condition_U=condition_UM.where(positive_UM, torch.nan).nanmedian(dim=-1).values,
        effective_rank_U=rank_UM.where(positive_UM, torch.nan).nanmean(dim=-1),
        off_diagonal_U=off_diagonal_UM.where(positive_UM, torch.nan).nanmean(dim=-1),
    )


def _cosine(transformed: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
    return (mixed / transformed.sqrt() / plain.sqrt()).clamp(-1, 1)


def _nanmax(value_UM: Tensor) -> Tensor:
    largest_U = value_UM.where(~value_UM.isnan(), -torch.inf).amax(dim=-1)
    return largest_U.where(~value_UM.isnan().all(dim=-1), torch.nan)

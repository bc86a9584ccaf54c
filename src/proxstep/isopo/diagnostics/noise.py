"""How much of a step's gradient is noise, and how much its sequences work against each other.

Sequence b contributes coefficient_b G_b to the gradient. Everything here follows from the inner
products of these contributions, which are the kernel times the coefficients. The coefficients'
normalization is a common factor of all contributions: it cancels in the ratio and in the shares.

Legend for shape suffixes: M microbatches, B sequences, padded to the largest microbatch; any
dimensions before them, such as the parameter uses, are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proxstep.isopo.diagnostics.stacked import StackedRecords
from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Contributions:
    """The sequences' contributions to the gradients of each use, or to the whole model's.

    Attributes:
        coefficient_MB: The coefficients; 0 in the padding.
        ntk_MBB: The kernels; 0 in the padding and where they are unknown.
        unit_MB: What each sequence was drawn with, see `independent_units`; -1 in the padding and
            where the kernel is unknown.
        group_MB: Each sequence's group; -1 there too, and where it is unknown.
        between_groups: Whether the units are prompts' groups, and not single sequences.
    """

    coefficient_MB: Float[Tensor, "*uses microbatches batch"]
    ntk_MBB: Float[Tensor, "*uses microbatches batch batch"]
    unit_MB: Int[Tensor, "*uses microbatches batch"]
    group_MB: Int[Tensor, "*uses microbatches batch"]
    between_groups: bool

    @classmethod
    def of_uses(cls, stacked: StackedRecords) -> Contributions:
        """Return the contributions to the gradient of each parameter use."""
        measured_UMB = stacked.present_UMB & stacked.has_ntk_UM[..., None]
        unit_UMB, between_groups = independent_units(stacked.group_UMB, measured_UMB)
        return cls(
            coefficient_MB=stacked.coefficient_UMB,
            ntk_MBB=stacked.ntk_UMBB,
            unit_MB=unit_UMB,
            group_MB=stacked.group_UMB.where(measured_UMB, -1),
            between_groups=between_groups,
        )

    def of_the_whole(self) -> Contributions:
        """Return the contributions to all uses' gradients together, whose kernels add up.

        Uses without any kernel are left out. Only if the others agree in all but their kernels do
        their microbatches correspond; otherwise the whole has no unit and no group.
        """
        with_kernel_U = (self.unit_MB >= 0).any(dim=-1).any(dim=-1)
        first = int(with_kernel_U.to(torch.uint8).argmax())
        agree = all(
            bool((value_UMB[with_kernel_U] == value_UMB[first]).all())
            for value_UMB in (self.coefficient_MB, self.unit_MB, self.group_MB)
        )
        return Contributions(
            coefficient_MB=self.coefficient_MB[first],
            ntk_MBB=self.ntk_MBB.sum(dim=0),
            unit_MB=self.unit_MB[first] if agree else torch.full_like(self.unit_MB[first], -1),
            group_MB=self.group_MB[first] if agree else torch.full_like(self.group_MB[first], -1),
            between_groups=self.between_groups,
        )

    def products(self) -> Float[Tensor, "*uses microbatches batch batch"]:
        """Return <coefficient_b G_b, coefficient_c G_c> for sequences of one microbatch."""
        left_MB1, right_M1B = self.coefficient_MB[..., :, None], self.coefficient_MB[..., None, :]
        return left_MB1 * self.ntk_MBB * right_M1B


def independent_units(
    group_MB: Int[Tensor, "*uses microbatches batch"],
    present_MB: Bool[Tensor, "*uses microbatches batch"],
) -> tuple[Int[Tensor, "*uses microbatches batch"], bool]:
    """Return what was drawn independently of each other: prompts' groups, or else sequences.

    The sequences of a prompt's group share the prompt and the baseline, so that only whole groups
    are independent. That needs every sequence's group and a microbatch with two of them.

    Args:
        group_MB: Each sequence's group; -1 where it is unknown and in the padding.
        present_MB: Where there is a sequence.

    Returns:
        Each sequence's unit, -1 in the padding, and whether the units are groups.
    """
    known = bool((group_MB[present_MB] >= 0).all())
    large = group_MB.new_tensor(torch.iinfo(group_MB.dtype).max)
    smallest_M = group_MB.where(present_MB, large).amin(dim=-1)
    largest_M = group_MB.where(present_MB, -large).amax(dim=-1)
    if known and bool((largest_M > smallest_M).any()):
        return group_MB.where(present_MB, -1), True
    sequence_MB = torch.arange(group_MB.shape[-1], device=group_MB.device).expand_as(group_MB)
    return sequence_MB.where(present_MB, -1), False


def noise_moments(
    product_MBB: Float[Tensor, "*uses microbatches batch batch"],
    unit_MB: Int[Tensor, "*uses microbatches batch"],
) -> tuple[Float[Tensor, "*uses"], Float[Tensor, "*uses"]]:
    """Return unbiased estimates of |G|^2 and of tr(Sigma).

    G is the expectation of one sequence's contribution, and the mean over N sequences is expected
    to miss it by tr(Sigma) / N, squared. With P independent units in a microbatch, u_p the sum over
    unit p and n the mean number of sequences in a unit,

        n^2 |G|^2   = sum over p != q of <u_p, u_q> / (P (P - 1))
        n tr(Sigma) = (sum_p |u_p|^2 - |sum_p u_p|^2 / P) / (P - 1)

    and over microbatches numerators and denominators are added up first. Where every sequence is a
    unit, s = mean_b |g_b|^2 and m = |mean_b g_b|^2, these are (B m - s) / (B - 1) and
    B (s - m) / (B - 1). The estimate of |G|^2 may be negative.

    Args:
        product_MBB: What `Contributions.products` returned; 0 in the padding.
        unit_MB: The independent unit of each sequence, a number from 0; -1 in the padding.

    Returns:
        |G|^2 and tr(Sigma), in units of the contributions' squared length; NaN where no microbatch
        holds two units.

    Source: arXiv 1812.06162, section 2.2 and appendix A.1, for samples drawn one by one.

    Differs: both come from within one microbatch, instead of from gradients of two batch sizes, and
        units may hold several sequences.
    """
    same_MBB = _same(unit_MB)
    size_MB = same_MBB.sum(dim=-1)
    units_M = (size_MB > 0).div(size_MB.clamp(min=1)).sum(dim=-1).round().to(product_MBB.dtype)
    usable_M = units_M >= 2
    units_M = units_M.where(usable_M, 0.0)
    within_M = product_MBB.where(same_MBB, 0.0).sum(dim=(-2, -1)).where(usable_M, 0.0)
    whole_M = product_MBB.sum(dim=(-2, -1)).where(usable_M, 0.0)
    between = (whole_M - within_M).sum(dim=-1) / (units_M * (units_M - 1)).sum(dim=-1)
    scatter = (within_M - whole_M / units_M.clamp(min=1)).sum(dim=-1).clamp(min=0)
    scatter = scatter / (units_M - 1).clamp(min=0).sum(dim=-1)
    sequences_M = (unit_MB >= 0).sum(dim=-1).where(usable_M, 0)
    unit_size = sequences_M.sum(dim=-1) / units_M.sum(dim=-1)
    return between / unit_size**2, scatter / unit_size


def noise_scale(
    squared_gradient: Float[Tensor, "*uses"], variance: Float[Tensor, "*uses"]
) -> Float[Tensor, "*uses"]:
    """Return tr(Sigma) / |G|^2: at so many sequences the noise of a batch equals its gradient.

    Args:
        squared_gradient: The estimate of |G|^2.
        variance: The estimate of tr(Sigma).

    Returns:
        The noise scale in sequences; infinite where the noise hides the gradient, so that the
        estimate of |G|^2 is not positive; NaN where neither is known or both are 0.

    Source: arXiv 1812.06162, equation 2.9 (B_simple).
    """
    return variance / squared_gradient.clamp(min=0)


def conflict_share(
    product_MBB: Float[Tensor, "*uses microbatches batch batch"],
    group_MB: Int[Tensor, "*uses microbatches batch"],
) -> Float[Tensor, "*uses"]:
    """Return the share of pairs inside a prompt's group whose contributions oppose each other.

    Args:
        product_MBB: What `Contributions.products` returned.
        group_MB: Each sequence's group, a number from 0; -1 where it is unknown and in the padding.

    Returns:
        The pairs with a negative inner product over those with one that is not 0, counted over all
        microbatches; NaN without any.
    """
    pair_MBB = _same(group_MB).triu(diagonal=1)
    opposed = (pair_MBB & (product_MBB < 0)).sum(dim=(-3, -2, -1))
    return opposed.double() / (pair_MBB & (product_MBB != 0)).sum(dim=(-3, -2, -1))


def _same(unit_MB: Int[Tensor, "*uses microbatches batch"]) -> Tensor:
    """Return which pairs of sequences belong to one unit."""
    known_MB = unit_MB >= 0
    return (unit_MB[..., :, None] == unit_MB[..., None, :]) & known_MB[..., :, None]

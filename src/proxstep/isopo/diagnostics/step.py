"""What the rule made of one optimizer step: figures per parameter use and of the whole model.

The records of a step go in, one frozen record comes out. docs/diagnostics.md says how to read each
figure. Inside this file an unknown figure is NaN, in the records that it returns it is None.

Legend for shape suffixes: U parameter uses, M microbatches, B sequences, padded to the largest
microbatch; N sequences of all microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from proxstep.errors import ProxstepError
from proxstep.isopo.diagnostics.noise import (
    Contributions,
    conflict_share,
    noise_moments,
    noise_scale,
)
from proxstep.isopo.diagnostics.noise_split import NoiseSplit, noise_split
from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.isopo.diagnostics.stacked import StackedRecords, stack_records
from proxstep.isopo.diagnostics.statistics import (
    inner_products,
    largest_share,
    log_correlation,
    quantiles,
    relative_spread,
    spectrum,
)
from proxstep.typing import Float, Tensor


@dataclass(frozen=True)
class Quantiles:
    """Where a step's values of one statistic lie."""

    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


@dataclass(frozen=True)
class GradientNoise:
    """Signal and noise of the plain gradient, in units of the contributions' squared length.

    Attributes:
        squared_gradient: Unbiased estimate of |G|^2; negative where noise hides it.
        variance: Unbiased estimate of tr(Sigma), per sequence.
        scale: variance / squared_gradient, the batch size in sequences at which noise and gradient
            are equally long; infinite where squared_gradient is not positive.
    """

    squared_gradient: float
    variance: float
    scale: float | None


@dataclass(frozen=True)
class LayerDiagnostics:
    """The figures of one parameter use, pooled over the microbatches of a step.

    None is unknown: not measured, or without a value, such as the correlation of constants.

    Attributes:
        name: The parameter use.
        fisher: F_b; estimates that were filled in are left out.
        norm: |G_b|.
        fisher_norm_correlation: Correlation between log F_b and log |G_b|.
        frac_filled_fisher: Share of the Fisher estimates that were exactly zero and filled in.
        weight_spread: Standard deviation of weight_b / coefficient_b over the absolute value of its
            mean, over the sequences whose coefficient is not zero.
        weight_length_correlation: Correlation between the logarithms of |weight_b / coefficient_b|
            and of the sequence's number of positions, prompt and completion.
        norm_length_correlation: The same of |G_b|.
        max_weight_share: Largest |weight_b| over the sum of all.
        max_contribution_share: Largest |weight_b| |G_b| over the sum of all.
        cosine_to_reinforce: Cosine between sum_b weight_b G_b and sum_b coefficient_b G_b, with the
            inner products added up over microbatches.
        grad_share: Share of the whole transformed gradient's squared norm.
        ntk_eigenvalue_min: Smallest eigenvalue of a microbatch's kernel.
        ntk_eigenvalue_max: Largest eigenvalue of a microbatch's kernel.
        ntk_condition: Their ratio in the median microbatch; infinite for a singular kernel.
        ntk_effective_rank: tr(K)^2 / |K|_F^2, averaged over microbatches.
        ntk_off_diagonal: Share of the sum of |K_bc| off the diagonal, averaged over microbatches.
        noise: Signal and noise of the plain gradient.
        group_conflict: Share of a prompt's group's pairs whose contributions oppose each other.
    """

    name: str
    fisher: Quantiles | None
    norm: Quantiles | None
    fisher_norm_correlation: float | None
    frac_filled_fisher: float | None
    weight_spread: float | None
    weight_length_correlation: float | None
    norm_length_correlation: float | None
    max_weight_share: float | None
    max_contribution_share: float | None
    cosine_to_reinforce: float | None
    grad_share: float | None
    ntk_eigenvalue_min: float | None
    ntk_eigenvalue_max: float | None
    ntk_condition: float | None
    ntk_effective_rank: float | None
    ntk_off_diagonal: float | None
    noise: GradientNoise | None
    group_conflict: float | None


@dataclass(frozen=True)
class StepDiagnostics:
    """The figures of one optimizer step.

    Attributes:
        num_sequences: Sequences measured, in this process.
        num_microbatches: Microbatches measured, in this process.
        num_kernels: Parameter uses whose kernel was measured; cosine, noise and conflict of the
            whole model are over these.
        weight_spread: Mean over parameter uses.
        frac_filled_fisher: Mean over parameter uses.
        fisher_norm_correlation: Mean over parameter uses.
        weight_length_correlation: Mean over parameter uses.
        norm_length_correlation: Mean over parameter uses.
        cosine_to_reinforce: Cosine of all uses together, their inner products added up; the rule's
            re-scaling of uses against each other lowers it too.
        mean_cosine_to_reinforce: Mean over parameter uses of each one's own cosine.
        ntk_condition: Median over parameter uses; infinite where most kernels are singular.
        ntk_effective_rank: Mean over parameter uses.
        ntk_off_diagonal: Mean over parameter uses.
        noise: Signal and noise of all uses together.
        noise_between_groups: Whether prompts' groups were the independent units of the noise, or
            single sequences.
        noise_split: The noise between prompts and between their completions.
        group_conflict: Of all uses together, their inner products added up.
        opposed_coefficients: Share of the same pairs with coefficients of opposite sign, which
            would be the conflict if all gradients of a prompt's group pointed the same way.
        layers: The figures of each parameter use, in the order of the records.
    """

    num_sequences: int
    num_microbatches: int
    num_kernels: int
    weight_spread: float | None
    frac_filled_fisher: float | None
    fisher_norm_correlation: float | None
    weight_length_correlation: float | None
    norm_length_correlation: float | None
    cosine_to_reinforce: float | None
    mean_cosine_to_reinforce: float | None
    ntk_condition: float | None
    ntk_effective_rank: float | None
    ntk_off_diagonal: float | None
    noise: GradientNoise | None
    noise_between_groups: bool
    noise_split: NoiseSplit | None
    group_conflict: float | None
    opposed_coefficients: float | None
    layers: tuple[LayerDiagnostics, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain dictionaries, lists and numbers for JSON.

        Unknown and infinite figures are None: JSON has no infinity. The parts tell them apart: a
        singular kernel has eigenvalues but no condition number, a gradient hidden by noise has a
        squared_gradient of 0 or less but no scale.
        """
        return _plain(asdict(self))

    def scalars(self) -> dict[str, float]:
        """Return the whole model's figures that are known and finite, by name, for a log.

        One step's noise scale is a ratio of two noisy estimates: to average over steps, average
        "noise_variance" and "noise_squared_gradient" and divide.
        """
        noise, split = self.noise, self.noise_split
        shares = [use.grad_share for use in self.layers if use.grad_share is not None]
        figures = {
            "weight_spread": self.weight_spread,
            "frac_filled_fisher": self.frac_filled_fisher,
            "fisher_norm_correlation": self.fisher_norm_correlation,
            "weight_length_correlation": self.weight_length_correlation,
            "norm_length_correlation": self.norm_length_correlation,
            "cosine_to_reinforce": self.cosine_to_reinforce,
            "mean_cosine_to_reinforce": self.mean_cosine_to_reinforce,
            "max_grad_share": max(shares, default=None),
            "ntk_condition": self.ntk_condition,
            "ntk_effective_rank": self.ntk_effective_rank,
            "ntk_off_diagonal": self.ntk_off_diagonal,
            "noise_scale": noise and noise.scale,
            "noise_squared_gradient": noise and noise.squared_gradient,
            "noise_variance": noise and noise.variance,
            "noise_between_prompts": split and split.between,
            "noise_within_prompt": split and split.within(split.num_generations),
            "group_conflict": self.group_conflict,
        }
        return {k: v for k, v in figures.items() if v is not None and math.isfinite(v)}


def diagnose(
    records: Mapping[str, Sequence[LayerRecord]], grad_norm_sq: Mapping[str, float] | None = None
) -> StepDiagnostics:
    """Return the figures of one optimizer step.

    Args:
        records: For each parameter use one record per microbatch, in the microbatches' order. Where
            the uses' coefficients differ, the whole model's noise and conflict are unknown.
        grad_norm_sq: Squared norm of each parameter's final gradient, by the name of its use.
            Without it `grad_share` comes from the kernels, microbatch by microbatch.

    Raises:
        ProxstepError: If grad_norm_sq holds a negative value or none of the records' names.
    """
    records = {name: row for name, row in records.items() if row}
    if not records:
        return _NOTHING
    if grad_norm_sq is not None:
        _check_norms(grad_norm_sq, records)
    stacked = stack_records(records)
    products = inner_products(
        stacked.weight_UMB, stacked.coefficient_UMB, stacked.ntk_UMBB, stacked.has_ntk_UM
    )
    contributions = Contributions.of_uses(stacked)
    figures = {
        **_weight_figures(stacked),
        **_kernel_figures(stacked),
        **_interplay(contributions),
        "cosine_to_reinforce": products.cosine_U(),
        "grad_share": _grad_shares(stacked.names, products.transformed_U, grad_norm_sq),
    }
    whole = contributions.of_the_whole()
    together = _interplay(whole)
    aligned = replace(whole, ntk_MBB=torch.ones_like(whole.ntk_MBB))
    return StepDiagnostics(
        num_sequences=int(stacked.present_UMB.sum(dim=(-2, -1)).max()),
        num_microbatches=stacked.present_UMB.shape[1],
        num_kernels=int(stacked.has_ntk_UM.any(dim=-1).sum()),
        weight_spread=_known(figures["weight_spread"].nanmean()),
        frac_filled_fisher=_known(figures["frac_filled_fisher"].nanmean()),
        fisher_norm_correlation=_known(figures["fisher_norm_correlation"].nanmean()),
        weight_length_correlation=_known(figures["weight_length_correlation"].nanmean()),
        norm_length_correlation=_known(figures["norm_length_correlation"].nanmean()),
        cosine_to_reinforce=_known(products.cosine()),
        mean_cosine_to_reinforce=_known(figures["cosine_to_reinforce"].nanmean()),
        ntk_condition=_known(figures["ntk_condition"].nanmedian()),
        ntk_effective_rank=_known(figures["ntk_effective_rank"].nanmean()),
        ntk_off_diagonal=_known(figures["ntk_off_diagonal"].nanmean()),
        noise=_noise_record(together["squared_gradient"], together["variance"]),
        noise_between_groups=contributions.between_groups,
        noise_split=noise_split(whole.coefficient_MB, whole.ntk_MBB, whole.group_MB),
        group_conflict=_known(together["group_conflict"]),
        opposed_coefficients=_known(_interplay(aligned)["group_conflict"]),
        layers=_layers(stacked, figures),
    )


def _weight_figures(stacked: StackedRecords) -> dict[str, Tensor]:
    """Return the figures of the sequences' lengths and weights."""
    norm_UMB, weight_UMB = stacked.norm_sq_UMB.sqrt(), stacked.weight_UMB
    contribution_UMB = (weight_UMB.abs() * norm_UMB).where(stacked.present_UMB, 0.0)
    scale_UMB = weight_UMB / stacked.coefficient_UMB
    scale_UMB = scale_UMB.where(stacked.coefficient_UMB != 0, torch.nan)
    fisher_UN, norm_UN = stacked.fisher_sq_UMB.sqrt().flatten(1), norm_UMB.flatten(1)
    length_UN = stacked.length_UMB.flatten(1)
    return {
        "fisher": quantiles(fisher_UN),
        "norm": quantiles(norm_UN),
        "fisher_norm_correlation": log_correlation(fisher_UN, norm_UN),
        "frac_filled_fisher": stacked.filled_UMB.flatten(1).nanmean(dim=-1),
        "weight_spread": relative_spread(scale_UMB.flatten(1)),
        "weight_length_correlation": log_correlation(scale_UMB.abs().flatten(1), length_UN),
        "norm_length_correlation": log_correlation(norm_UN, length_UN),
        "max_weight_share": largest_share(weight_UMB.flatten(1)),
        "max_contribution_share": largest_share(contribution_UMB.flatten(1)),
    }


def _kernel_figures(stacked: StackedRecords) -> dict[str, Tensor]:
    """Return the figures of the kernels' spectra."""
    kernels = spectrum(stacked.ntk_UMBB, stacked.present_UMB, stacked.has_ntk_UM)
    return {
        "ntk_eigenvalue_min": kernels.eigenvalue_min_U,
        "ntk_eigenvalue_max": kernels.eigenvalue_max_U,
        "ntk_condition": kernels.condition_U,
        "ntk_effective_rank": kernels.effective_rank_U,
        "ntk_off_diagonal": kernels.off_diagonal_U,
    }


def _interplay(contributions: Contributions) -> dict[str, Tensor]:
    """Return the figures of the contributions' inner products, of the uses or of the whole."""
    product_MBB = contributions.products()
    squared_gradient, variance = noise_moments(product_MBB, contributions.unit_MB)
    return {
        "squared_gradient": squared_gradient,
        "variance": variance,
        "group_conflict": conflict_share(product_MBB, contributions.group_MB),
    }


def _grad_shares(
    names: Sequence[str], square_U: Float[Tensor, " uses"], norms: Mapping[str, float] | None
) -> Float[Tensor, " uses"]:
    """Return each use's share of the squared norm, of the final gradients where they are given."""
    if norms is None:
        return square_U / square_U.nansum()
    final_U = torch.tensor([norms.get(name, math.nan) for name in names], dtype=torch.float64)
    return final_U / math.fsum(norms.values())


def _layers(stacked: StackedRecords, figures: Mapping[str, Tensor]) -> tuple[LayerDiagnostics, ...]:
    """Return the figures as one record per use."""
    apart = ("fisher", "norm", "squared_gradient", "variance")
    numbers = {
        name: [_known(value) for value in value_U]
        for name, value_U in figures.items()
        if name not in apart
    }
    return tuple(
        LayerDiagnostics(
            name=name,
            fisher=_quantiles_record(figures["fisher"][u]),
            norm=_quantiles_record(figures["norm"][u]),
            noise=_noise_record(figures["squared_gradient"][u], figures["variance"][u]),
            **{field: value_U[u] for field, value_U in numbers.items()},
        )
        for u, name in enumerate(stacked.names)
    )


def _quantiles_record(value_5: Tensor) -> Quantiles | None:
    return None if bool(value_5.isnan().any()) else Quantiles(*value_5.tolist())


def _noise_record(squared_gradient: Tensor, variance: Tensor) -> GradientNoise | None:
    if bool(squared_gradient.isnan() | variance.isnan()):
        return None
    scale = _known(noise_scale(squared_gradient, variance))
    return GradientNoise(squared_gradient.item(), variance.item(), scale)


def _known(value: Tensor) -> float | None:
    number = value.item()
    return None if math.isnan(number) else number


def _plain(value: Any) -> Any:
    """Return nested records, with None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_norms(norms: Mapping[str, float], names: Iterable[str]) -> None:
    """Refuse squared norms that are negative or that fit no record."""
    for name, value in norms.items():
        if value < 0:
            raise ProxstepError(f"grad_norm_sq[{name!r}] is {value}: a squared norm is 0 or more")
    expected = list(names)
    if not norms.keys() & set(expected):
        raise ProxstepError(
            f"grad_norm_sq names none of the recorded parameters: name them as Isopo does, "
            f"{expected[0]!r} for instance"
        )


_NOTHING = StepDiagnostics(
    num_sequences=0,
    num_microbatches=0,
    num_kernels=0,
    weight_spread=None,
    frac_filled_fisher=None,
    fisher_norm_correlation=None,
    weight_length_correlation=None,
    norm_length_correlation=None,
    cosine_to_reinforce=None,
    mean_cosine_to_reinforce=None,
    ntk_condition=None,
    ntk_effective_rank=None,
    ntk_off_diagonal=None,
    noise=None,
    noise_between_groups=False,
    noise_split=None,
    group_conflict=None,
    opposed_coefficients=None,
    layers=(),
)
"""A step without a record."""

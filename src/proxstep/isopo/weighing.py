"""One parameter's statistics on their way to weights, and what is noted on the way.

Legend for shape suffixes: B sequences of the microbatch, K sampled positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.isopo.forms import Needs
from proxstep.isopo.reduction import Measured
from proxstep.isopo.samples import Samples
from proxstep.isopo.trailing import TrailingMeans
from proxstep.isopo.weights import (
    IsometricRule,
    NaturalRule,
    Rule,
    isometric_moments,
    isometric_weights,
    natural_weights,
)
from proxstep.typing import Float, Int, Tensor

_SMALLEST = torch.finfo(torch.float32).tiny

Fisher = Literal["positions", "sequences"]
Denominator = Literal["sample", "trailing"]


@dataclass(frozen=True)
class Settings:
    """What holds for all microbatches; see `Isopo` for the meaning."""

    rule: Rule
    fisher: Fisher = "positions"
    fisher_denominator: Denominator = "sample"
    only_linear: bool = False

    @property
    def needs(self) -> Needs:
        """The statistics that the rule is made of."""
        if not isinstance(self.rule, IsometricRule):
            return Needs(ntk=True)
        positions = self.fisher == "positions"
        return Needs(
            fisher=self.rule.needs_fisher and positions,
            norm=self.rule.needs_norm,
            ntk=self.rule.needs_fisher and not positions,
        )


@dataclass
class Log:
    """What the microbatches of an optimizer step measured.

    Attributes:
        scales: What the isometric rule multiplied the coefficients by, of each reduction.
        filled: Which of its Fisher estimates were filled in.
        off_diagonal: The share of |K| off the diagonal, of each of the natural rule's.
        records: Each parameter's statistics, one per microbatch; only where `keep_records`.
        keep_records: Whether to measure and keep all statistics, the unneeded ones too.
    """

    keep_records: bool = False
    scales: list[Tensor] = field(default_factory=list)
    filled: list[Tensor] = field(default_factory=list)
    off_diagonal: list[Tensor] = field(default_factory=list)
    records: dict[str, list[LayerRecord]] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Return what `Isopo.step` reports, averaged over reductions."""
        values = {
            "weight_spread": [
                part_NB.std(dim=1, correction=0) / part_NB.mean(dim=1)
                for part_NB in _stacked(self.scales)
            ],
            "frac_filled_fisher": [
                part_NB.float().mean(dim=1) for part_NB in _stacked(self.filled)
            ],
            "ntk_off_diagonal": [torch.stack(self.off_diagonal)] if self.off_diagonal else [],
        }
        return {name: torch.cat(parts).mean().item() for name, parts in values.items() if parts}


@dataclass(frozen=True)
class Sequences:
    """What is known of a microbatch's sequences.

    Attributes:
        coefficient_B: Each one's coefficient.
        group_B: Each one's group, where groups were given.
        fisher_sq: F_b^2 by parameter use, where the caller knows them better than an estimate.
    """

    coefficient_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"] | None = None
    fisher_sq: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)


class Weighing:
    """One parameter's statistics of one microbatch on their way to weights."""

    def __init__(
        self,
        key: str,
        sequences: Sequences,
        settings: Settings,
        samples: Samples,
        trailing: TrailingMeans,
        log: Log,
    ) -> None:
        self._key, self._sequences, self._settings = key, sequences, settings
        self._over_ranks, self._trailing, self._log = samples.over_ranks, trailing, log
        self._past = trailing.of(key)
        self._moments: list[Mapping[str, Tensor]] = []
        self._scales: list[Tensor] = []
        self._pieces: list[tuple[Measured, Tensor]] = []
        self._filled: list[Tensor] = []
        self._total = torch.zeros(())

    @property
    def separable(self) -> bool:
        """Whether a sequence's weight follows from its own statistics and the past's alone."""
        rule = self._settings.rule
        if not isinstance(rule, IsometricRule) or self._settings.fisher == "sequences":
            return False
        return not rule.needs_trailing_means or all(name in self._past for name in rule.powers)

    @property
    def needs_kernel(self) -> bool:
        """Whether the weights are made of K_bc."""
        return self._settings.needs.ntk

    @property
    def knows_the_past(self) -> bool:
        """Whether nothing at all is needed of the other sequences, their mean F_b^2 included."""
        return self.separable and (not self._settings.needs.fisher or "fisher_sq" in self._past)

    def measure_sample(self, square_K: Float[Tensor, " samples"], count: int) -> None:
        """Take note of sum_k |G_k|^2, the estimate's denominator."""
        mean = square_K.sum() / max(count, 1)
        self._trailing.add(self._key, {"sample_sq": mean[None]})
        if self._settings.fisher_denominator == "trailing":
            mean = self._past.get("sample_sq", mean)
        self._total = mean * count

    def fisher_of(self, cross_KB: Float[Tensor, "samples batch"]) -> Float[Tensor, " batch"]:
        """Return F_b^2 = sum_k <G_k, G_b>^2 / sum_k |G_k|^2 (arXiv 2512.23353, eqs. 3 to 6).

        Differs: a sequence that is orthogonal to every sampled position has the estimate 0 although
            its gradient is not 0 (an embedding whose sampled tokens it does not contain), and
            figure 3 would scale it by 1e4. It gets the trailing mean, or in the first step the mean
            of the other sequences.
        """
        square_B = cross_KB.square().sum(dim=0) / self._total.clamp(min=_SMALLEST)
        filled_B = square_B == 0
        self._filled.append(filled_B)
        if "fisher_sq" in self._past:
            mean = self._past["fisher_sq"].to(square_B)
        else:
            sums = torch.stack([square_B.sum(), square_B.count_nonzero().to(square_B)])
            total, count = self._over_ranks(sums).unbind()
            mean = total / count.clamp(min=1)
        return torch.where(filled_B, mean, square_B)

    def weigh(self, part: slice, measured: Measured) -> Float[Tensor, " batch"]:
        """Return the negated weights of some sequences; negated because `.grad` is to minimize."""
        rule = self._settings.rule
        coefficient_B = self._sequences.coefficient_B[part]
        if isinstance(rule, IsometricRule):
            weight_B, measured = self._isometric(part, measured, rule)
        else:
            weight_B = self._natural(measured, rule)
        self._pieces.append((measured, weight_B))
        return -weight_B.to(torch.promote_types(coefficient_B.dtype, torch.float32))

    def _isometric(
        self, part: slice, measured: Measured, rule: IsometricRule
    ) -> tuple[Tensor, Measured]:
        fisher_B = measured.fisher_sq_B
        if self._key in self._sequences.fisher_sq:
            fisher_B = self._sequences.fisher_sq[self._key][part]
        elif self._settings.fisher == "sequences" and measured.ntk_BB is not None:
            fisher_B = measured.ntk_BB.square().mean(dim=1)
        measured = Measured(fisher_B, measured.norm_sq_B, measured.ntk_BB)
        moments = isometric_moments(
            fisher_B if rule.needs_fisher else None, measured.norm_sq_B if rule.needs_norm else None
        )
        self._moments.append(moments)
        coefficient_B = self._sequences.coefficient_B[part]
        means = dict(self._past)
        if rule.needs_trailing_means:
            for name in rule.powers:
                if name not in means:
                    means[name] = self._mean_over_ranks(moments[name])
        scale_B = isometric_weights(torch.ones_like(coefficient_B), moments, rule, means)
        self._scales.append(scale_B)
        return coefficient_B * scale_B, measured

    def _natural(self, measured: Measured, rule: NaturalRule) -> Tensor:
        # Small, and a matter of small eigenvalues: in double precision where there is one.
        ntk_BB = measured.ntk_BB
        assert ntk_BB is not None
        wide = torch.float32 if ntk_BB.device.type == "mps" else torch.float64
        ntk_BB = ntk_BB.to(wide)
        if rule.interact == "group":
            group_B = self._sequences.group_B
            assert group_B is not None
            ntk_BB = ntk_BB * (group_B[:, None] == group_B[None, :])
        self._moments.append({"eigenvalue": ntk_BB.diagonal()})
        past = self._past
        if "eigenvalue" not in past:
            past = {"eigenvalue": self._mean_over_ranks(ntk_BB.diagonal())}
        total = ntk_BB.abs().sum()
        share = ntk_BB.diagonal().sum() / torch.where(total > 0, total, 1.0)
        self._log.off_diagonal.append(1 - share)
        return natural_weights(self._sequences.coefficient_B.to(wide), ntk_BB, rule, past)

    def conclude(self) -> None:
        """Add the statistics to the trailing means and to the step's log."""
        moments = {name: _join([part[name] for part in self._moments]) for name in self._moments[0]}
        self._trailing.add(self._key, moments)
        filled_B = _join(self._filled) if self._filled else None
        if filled_B is not None:
            self._log.filled.append(filled_B)
        if self._scales:
            self._log.scales.append(_join(self._scales))
        if self._log.keep_records:
            first = self._pieces[0][0]
            kernel = first.ntk_BB
            record = LayerRecord(
                self._sequences.coefficient_B,
                _join([weight for _, weight in self._pieces]),
                _cat([piece.fisher_sq_B for piece, _ in self._pieces]),
                filled_B,
                _cat([piece.norm_sq_B for piece, _ in self._pieces]),
                None if kernel is None else kernel.clone(),
                self._sequences.group_B,
            )
            self._log.records.setdefault(self._key, []).append(record)

    def _mean_over_ranks(self, square_B: Tensor) -> Tensor:
        sums = torch.stack([square_B.sum(), square_B.new_tensor(float(len(square_B)))])
        total, count = self._over_ranks(sums).unbind()
        return total / count


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return _join(known) if known else None


def _stacked(values: list[Tensor]) -> list[Float[Tensor, "rows batch"]]:
    """Stack the vectors of equal length."""
    by_length: dict[int, list[Tensor]] = {}
    for value_B in values:
        by_length.setdefault(len(value_B), []).append(value_B)
    return [torch.stack(part) for part in by_length.values()]

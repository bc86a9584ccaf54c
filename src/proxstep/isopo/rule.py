"""ISOPO's two rules: the weight of each sequence's gradient in one layer.

A rule `needs` some statistics of the sequences' gradients G_b, and `weigh` makes weights of them;
the layer's gradient is then sum_b weight_b G_b. Both rules are linear in the coefficients: that is
where a normalization belongs, and never in the loss, whose scale would leak into the lengths.

Legend for shape suffixes: B sequences of the microbatch, K sampled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from proxstep.algorithms.aggregate import check_choice, check_literal, check_number
from proxstep.errors import ProxstepError
from proxstep.isopo.plan import Needs, Statistics
from proxstep.logprobs.tokens import widest_dtype
from proxstep.typing import Bool, Float, Tensor

GUARD = 1e-8  # the paper's additive guard under the root (figure 3)
Means = Mapping[str, Float[Tensor, ""]]
"""Averages of moments over earlier optimizer steps; without those that have no past yet."""
OverRanks = Callable[[Tensor], Tensor] | None
"""Sums over the ranks that share a sample; None where there are none."""
DampingForm = Literal["additive", "relative"]
Scale = Literal["paper", "preserved"]
Weighed = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""Weights, moments for the trailing means, and what is reported, by name."""


def fisher_squares(
    cross_KB: Float[Tensor, "samples batch"],
    weight_K: Float[Tensor, " samples"] | None,
    sample_sq: Tensor,
    past: Means,
    over_ranks: OverRanks,
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Return F_b^2 = sum_k <G_k, G_b>^2 / sum_k |G_k|^2, and which were 0 and are filled in.

    With weights, the sums are weighted; `sample_sq` is the second one.

    Source: arXiv 2512.23353, equations 3 to 6.

    Differs: the paper draws positions evenly; see `sampling.CarriedSamples`. A sequence that is
        orthogonal to all samples has the estimate 0 although its gradient is not 0 (an embedding
        without its tokens), and figure 3 would scale it by 1e4. It gets the trailing mean, or
        without a past the others' mean.
    """
    square_KB = cross_KB.square()
    total_B = square_KB.sum(dim=0) if weight_K is None else weight_K.to(square_KB.dtype) @ square_KB
    square_B = total_B / sample_sq.clamp(min=torch.finfo(torch.float32).tiny)
    mean = past.get("fisher_sq")
    if mean is None:
        mean = _mean(square_B, square_B.count_nonzero(), over_ranks)
    return torch.where(square_B == 0, mean.to(square_B), square_B), square_B == 0


def kernel_fisher_squares(ntk_BB: Float[Tensor, "batch batch"]) -> Float[Tensor, " batch"]:
    """Return F_b^2 = mean_c K_bc^2 (equation 2): the Fisher matrix of the sequences themselves."""
    return ntk_BB.square().mean(dim=1)


@dataclass(frozen=True)
class IsometricRule:
    """The non-interacting rule: each sequence is re-scaled by its own lengths.

    weight_b = coefficient_b * reg2(F_b)^p * reg2(|G_b|)^q * reg2(F_b / |G_b|)^r, where F_b is the
    length of G_b in the Fisher metric and reg2(x) = sqrt(x^2 + c E[x^2] + 1e-8).

    Attributes:
        fisher_power: p. -1 bounds every sequence's share of the KL divergence.
        norm_power: q.
        relative_fisher_power: r. -2 is the multiple closest to the natural gradient.
        damping: c, in units of the trailing mean square; 0 for none.
        damping_form: "additive" as above and as printed; "relative" is sqrt(x^2 / (c E[x^2] + 1e-8)
            + 1), the author's code, which leaves small lengths unscaled; needs c > 0.
        scale: "paper" takes the weights as they are, in the units of the lengths. "preserved"
            divides by the factor of a sequence with trailing-mean lengths, so that an average one
            keeps its REINFORCE weight, and a learning rate or a clipping threshold carries over.

    Source: arXiv 2512.23353, figures 2 and 3, sections 2.0.1 to 2.0.3.
    """

    fisher_power: float = -1.0
    norm_power: float = 0.0
    relative_fisher_power: float = 0.0
    damping: float = 0.0
    damping_form: DampingForm = "additive"
    scale: Scale = "preserved"
    interacting = False

    def __post_init__(self) -> None:
        for name in ("fisher_power", "norm_power", "relative_fisher_power"):
            check_number(name, getattr(self, name), float("-inf"))
        check_number("damping", self.damping)
        check_literal("damping_form", self.damping_form, DampingForm)
        check_literal("scale", self.scale, Scale)
        if self.damping_form == "relative" and self.damping == 0:
            raise ProxstepError('damping_form "relative" needs damping > 0; try damping=1.0')

    @property
    def needs(self) -> Needs:
        """The statistics that the weights are made of."""
        r = self.relative_fisher_power
        return Needs(fisher=bool(self.fisher_power or r), norm=bool(self.norm_power or r))

    @property
    def powers(self) -> dict[str, float]:
        """The powers that are not 0, by the name of the squared length that they belong to."""
        powers = (self.fisher_power, self.norm_power, self.relative_fisher_power)
        names = ("fisher_sq", "norm_sq", "relative_fisher_sq")
        return {name: p for name, p in zip(names, powers, strict=True) if p != 0}

    @property
    def averages(self) -> tuple[str, ...]:
        """The moments whose trailing means enter the weights."""
        return tuple(self.powers) if self.damping > 0 or self.scale == "preserved" else ()

    def weigh(self, found: Statistics, past: Means, over_ranks: OverRanks = None) -> Weighed:
        """Return the weights of some sequences; with all powers 0 they are the coefficients.

        Args:
            found: Statistics of the layer's sequences.
            past: Trailing means of their moments.
            over_ranks: Sums over the ranks that share a sample.
        """
        fisher_B = found.fisher_sq_B if self.needs.fisher else None
        norm_B = found.norm_sq_B if self.needs.norm else None
        squares = {"fisher_sq": fisher_B, "norm_sq": norm_B}
        if fisher_B is not None and norm_B is not None:  # of a gradient of 0 any multiple is 0
            safe_B = torch.where(norm_B > 0, norm_B, torch.ones_like(norm_B))
            squares["relative_fisher_sq"] = torch.where(norm_B > 0, fisher_B / safe_B, 0.0)
        moments = {name: square_B for name, square_B in squares.items() if square_B is not None}
        scale_B = torch.ones_like(found.coefficient_B)
        for name, power in self.powers.items():
            square_B, mean = moments[name], past.get(name)
            if mean is None:
                mean = _mean(square_B, len(square_B), over_ranks if self.averages else None)
            scale_B = scale_B * self._damped_square(square_B, mean) ** (power / 2)
            if self.scale == "preserved":
                scale_B = scale_B / self._damped_square(mean, mean) ** (power / 2)
        return found.coefficient_B * scale_B, moments, {"scale": scale_B}

    def _damped_square(self, square: Tensor, mean: Tensor) -> Tensor:
        """Return reg2(x)^2 for x^2 = `square` and E[x^2] = `mean`, in the rule's damping form."""
        if self.damping_form == "relative":
            return square / (self.damping * mean + GUARD) + 1.0
        return square + self.damping * mean + GUARD


@dataclass(frozen=True)
class NaturalRule:
    """The interacting rule: sequences are mixed through the layer's neural tangent kernel.

    weight = (K + c I)^-1 coefficient with K_bc = <G_b, G_c> and c = ntk_damping * E[mean eigenvalue
    of K].

    Attributes:
        ntk_damping: c in units of the trailing mean eigenvalue; positive. Figure 7 has 1.0.
        damping_form: "additive" is 1 / (D + c), as printed. "relative" is c / (D + c), the author's
            code, so that small eigendirections keep their size; they differ by the layer's c.
        scale: "paper" as it is. "preserved" multiplies the additive form by c + E[mean eigenvalue],
            so that a direction of average eigenvalue keeps its REINFORCE weight.
        interact: "microbatch" mixes all sequences that share one, as in the paper. "group" mixes
            those of a prompt: as long as they share a microbatch, its others do not matter.

    Source: arXiv 2512.23353, section 3, figures 6 and 7.
    """

    ntk_damping: float = 1.0
    damping_form: DampingForm = "additive"
    scale: Scale = "preserved"
    interact: Literal["microbatch", "group"] = "microbatch"
    interacting, needs, averages = True, Needs(ntk=True), ("eigenvalue",)

    def __post_init__(self) -> None:
        check_number("ntk_damping", self.ntk_damping, above=True)  # the kernel can be singular
        check_literal("damping_form", self.damping_form, DampingForm)
        check_literal("scale", self.scale, Scale)
        check_choice("interact", self.interact, ("microbatch", "group"))
        if self.damping_form == "relative" and self.scale == "preserved":
            what = 'damping_form "relative" has no units to preserve'
            raise ProxstepError(f'{what}: use scale="paper"')

    def weigh(self, found: Statistics, past: Means, over_ranks: OverRanks = None) -> Weighed:
        """Return the weights of all sequences; zeros where no gradient reaches the layer.

        Args:
            found: Statistics of the layer's sequences.
            past: Trailing means of their moments.
            over_ranks: Sums over the ranks that share a sample.
        """
        assert found.ntk_BB is not None
        # Small, and a matter of small eigenvalues: in double precision where there is one.
        wide = widest_dtype(found.ntk_BB.device)
        ntk_BB = found.ntk_BB.to(wide)
        diagonal_B, total = ntk_BB.diagonal().clone(), ntk_BB.abs().sum()
        mean = past.get("eigenvalue")
        if mean is None:
            mean = _mean(diagonal_B, len(diagonal_B), over_ranks)
        damping = self.ntk_damping * mean
        eigenvalue_B, eigenvector_BB = torch.linalg.eigh(ntk_BB)
        shifted_B = eigenvalue_B.clamp(min=0) + damping
        safe_B = torch.where(shifted_B > 0, shifted_B, torch.ones_like(shifted_B))
        numerator = mean + damping if self.scale == "preserved" else torch.ones_like(mean)
        numerator = damping if self.damping_form == "relative" else numerator
        filter_B = torch.where(shifted_B > 0, numerator / safe_B, 0.0)
        weight_B = eigenvector_BB @ (filter_B * (eigenvector_BB.mT @ found.coefficient_B.to(wide)))
        off_diagonal = 1 - diagonal_B.sum() / torch.where(total > 0, total, 1.0)
        return weight_B, {"eigenvalue": diagonal_B}, {"off_diagonal": off_diagonal}


def _mean(square_B: Tensor, count: int | Tensor, over_ranks: OverRanks) -> Tensor:
    """Return the mean over the counted sequences, on all ranks that share a sample."""
    sums = torch.stack([square_B.sum(), torch.as_tensor(count).to(square_B)])
    total, number = (sums if over_ranks is None else over_ranks(sums)).unbind()
    return total / number.clamp(min=1)

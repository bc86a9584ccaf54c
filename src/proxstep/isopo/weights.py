"""ISOPO's two rules: from per-sequence coefficients to the weights of one layer.

Both rules are linear in the coefficients, so a normalization (by the number of sequences, of
gradient-accumulation steps, of ranks) belongs into the coefficients, and never into the loss, whose
scale would leak into the norms below.

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from proxstep.errors import ProxstepError
from proxstep.typing import Float, Tensor

DampingForm = Literal["additive", "relative"]
Scale = Literal["paper", "preserved"]
Interact = Literal["microbatch", "group"]

GUARD = 1e-8
"""The paper's additive guard under the root (figure 3)."""


@dataclass(frozen=True)
class IsometricRule:
    """The non-interacting rule: each sequence is re-scaled by its own lengths.

    weight_b = coefficient_b * reg2(F_b)^p * reg2(|G_b|)^q * reg2(F_b / |G_b|)^r, where G_b is the
    layer's gradient of sequence b's log-probability and F_b its length in the Fisher metric.

    Attributes:
        fisher_power: p, the power of the Fisher norm. -1 bounds every sequence's share of the KL
            divergence.
        norm_power: q, the power of the Euclidean norm.
        relative_fisher_power: r, the power of F_b / |G_b|. -2 is the multiple closest to the
            natural gradient.
        damping: c, in units of the trailing mean square; 0 for none.
        damping_form: "additive" is sqrt(x^2 + c E[x^2] + 1e-8), as printed. "relative" is
            sqrt(x^2 / (c E[x^2] + 1e-8) + 1), the author's code, which leaves small norms unscaled;
            needs c > 0.
        scale: "paper" takes the weights as they are, in the units of the norms. "preserved" divides
            by the factor of a sequence with trailing-mean norms, so that an average sequence keeps
            its REINFORCE weight and a learning rate or a clipping threshold carries over.

    Source: arXiv 2512.23353, figures 2 and 3, sections 2.0.1 to 2.0.3.
    """

    fisher_power: float = -1.0
    norm_power: float = 0.0
    relative_fisher_power: float = 0.0
    damping: float = 0.0
    damping_form: DampingForm = "additive"
    scale: Scale = "paper"

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ProxstepError(f"damping must be 0 or more, got {self.damping}")
        if self.damping_form == "relative" and self.damping == 0:
            raise ProxstepError('damping_form "relative" needs damping > 0; try damping=1.0')

    @property
    def needs_fisher(self) -> bool:
        """Whether F_b enters the weights."""
        return self.fisher_power != 0 or self.relative_fisher_power != 0

    @property
    def needs_norm(self) -> bool:
        """Whether |G_b| enters the weights."""
        return self.norm_power != 0 or self.relative_fisher_power != 0

    @property
    def needs_trailing_means(self) -> bool:
        """Whether the weights depend on averages over earlier optimizer steps."""
        return self.damping > 0 or self.scale == "preserved"

    @property
    def powers(self) -> dict[str, float]:
        """The powers that are not 0, by the name of the squared length that they belong to."""
        powers = {
            "fisher_sq": self.fisher_power,
            "norm_sq": self.norm_power,
            "relative_fisher_sq": self.relative_fisher_power,
        }
        return {name: power for name, power in powers.items() if power != 0}


@dataclass(frozen=True)
class NaturalRule:
    """The interacting rule: sequences are mixed through the layer's neural tangent kernel.

    weight = (K + c I)^-1 coefficient with K_bc = <G_b, G_c> and c = ntk_damping * E[mean eigenvalue
    of K]. The result depends on which sequences share a microbatch; with interact="group" only on
    which share a group, as long as a group's sequences share a microbatch.

    Attributes:
        ntk_damping: c in units of the trailing mean eigenvalue; positive. The paper uses 1.0
            (figure 7).
        damping_form: "additive" is 1 / (D + c), as printed. "relative" is c / (D + c), the author's
            code, so that small eigendirections keep their size; the two differ by the layer's
            scalar c.
        scale: "paper" as it is. "preserved" multiplies the additive form by c + E[mean eigenvalue],
            so that a direction of average eigenvalue keeps its REINFORCE weight.
        interact: "microbatch" mixes all sequences that share one, as in the paper. "group" mixes
            those of a prompt, and leaves K's other entries out.

    Source: arXiv 2512.23353, section 3, figures 6 and 7.
    """

    ntk_damping: float = 1.0
    damping_form: DampingForm = "additive"
    scale: Scale = "paper"
    interact: Interact = "microbatch"

    def __post_init__(self) -> None:
        if not self.ntk_damping > 0:
            raise ProxstepError(
                f"ntk_damping must be positive, got {self.ntk_damping}: the kernel alone can be "
                "singular"
            )
        if self.damping_form == "relative" and self.scale == "preserved":
            raise ProxstepError(
                'damping_form "relative" has no units to preserve: use scale="paper"'
            )

    needs_trailing_means = True


Rule = IsometricRule | NaturalRule

PRESETS: dict[str, Rule] = {
    "reinforce": IsometricRule(0.0, 0.0, 0.0),
    "isopo": IsometricRule(-1.0, 0.0, 0.0),
    "isopo-npg": IsometricRule(0.0, 0.0, -2.0),
    "isopo-figure4": IsometricRule(0.0, -1.0, -2.0),
    "isopo-euclidean": IsometricRule(0.0, -1.0, 0.0),
    "isopo-natural": NaturalRule(),
}
"""The paper's settings by name; "reinforce" is the identity."""


def isometric_moments(
    fisher_sq_B: Float[Tensor, " batch"] | None, norm_sq_B: Float[Tensor, " batch"] | None
) -> dict[str, Float[Tensor, " batch"]]:
    """Return the squared lengths that damping and scale average, by name.

    Args:
        fisher_sq_B: F_b^2, or None where the rule does not need it.
        norm_sq_B: |G_b|^2, or None where the rule does not need it.

    Returns:
        "fisher_sq", "norm_sq" and, where both are given, "relative_fisher_sq" = F_b^2 / |G_b|^2,
        which is 0 for a sequence whose gradient is zero (its weight multiplies zero).
    """
    moments: dict[str, Tensor] = {}
    if fisher_sq_B is not None:
        moments["fisher_sq"] = fisher_sq_B
    if norm_sq_B is not None:
        moments["norm_sq"] = norm_sq_B
    if fisher_sq_B is not None and norm_sq_B is not None:
        safe_B = torch.where(norm_sq_B > 0, norm_sq_B, torch.ones_like(norm_sq_B))
        moments["relative_fisher_sq"] = torch.where(norm_sq_B > 0, fisher_sq_B / safe_B, 0.0)
    return moments


def isometric_weights(
    coefficient_B: Float[Tensor, " batch"],
    moments: Mapping[str, Float[Tensor, " batch"]],
    rule: IsometricRule,
    trailing: Mapping[str, Float[Tensor, ""]],
) -> Float[Tensor, " batch"]:
    """Return the isometric rule's weights for one layer.

    Args:
        coefficient_B: Each sequence's coefficient, -dL / d log pi(y_b); for REINFORCE its
            advantage.
        moments: What `isometric_moments` returned for this layer.
        rule: The powers and the damping.
        trailing: E[x^2] for each of the moments, from earlier optimizer steps. A moment that it
            lacks is averaged over this microbatch instead: the first step has no past.

    Returns:
        One weight per sequence. With all powers 0 they are the coefficients, exactly.

    Source: arXiv 2512.23353, figure 3.
    """
    weight_B = coefficient_B
    for name, power in rule.powers.items():
        square_B = moments[name]
        mean = trailing.get(name, square_B.mean())
        weight_B = weight_B * _damped_square(square_B, mean, rule) ** (power / 2)
        if rule.scale == "preserved":
            weight_B = weight_B / _damped_square(mean, mean, rule) ** (power / 2)
    return weight_B


def _damped_square(square: Tensor, mean: Tensor, rule: IsometricRule) -> Tensor:
    """Return reg2(x)^2 for x^2 = `square` and E[x^2] = `mean`, in the rule's damping form."""
    if rule.damping_form == "relative":
        return square / (rule.damping * mean + GUARD) + 1.0
    return square + rule.damping * mean + GUARD


def natural_weights(
    coefficient_B: Float[Tensor, " batch"],
    ntk_BB: Float[Tensor, "batch batch"],
    rule: NaturalRule,
    trailing: Mapping[str, Float[Tensor, ""]],
) -> Float[Tensor, " batch"]:
    """Return the natural rule's weights: (K + c I)^-1 coefficient.

    Args:
        coefficient_B: Each sequence's coefficient, -dL / d log pi(y_b); for REINFORCE its
            advantage.
        ntk_BB: The layer's kernel, K_bc = <G_b, G_c>.
        rule: The damping and its form.
        trailing: "eigenvalue", the mean eigenvalue averaged over earlier optimizer steps; without
            it, this kernel's.

    Returns:
        One weight per sequence; zeros where the kernel and its past are zero (no gradient reaches
        the layer).

    Source: arXiv 2512.23353, section 3, figures 6 and 7.
    """
    mean = trailing.get("eigenvalue", mean_eigenvalue(ntk_BB))
    damping = rule.ntk_damping * mean
    eigenvalue_B, eigenvector_BB = torch.linalg.eigh(ntk_BB)
    shifted_B = eigenvalue_B.clamp(min=0) + damping
    safe_B = torch.where(shifted_B > 0, shifted_B, torch.ones_like(shifted_B))
    if rule.damping_form == "relative":
        numerator = damping
    elif rule.scale == "preserved":
        numerator = mean + damping
    else:
        numerator = torch.ones_like(mean)
    filter_B = torch.where(shifted_B > 0, numerator / safe_B, 0.0)
    return eigenvector_BB @ (filter_B * (eigenvector_BB.mT @ coefficient_B))


def mean_eigenvalue(ntk_BB: Float[Tensor, "batch batch"]) -> Float[Tensor, ""]:
    """Return the kernel's mean eigenvalue, its trace over its size."""
    return ntk_BB.diagonal().mean()

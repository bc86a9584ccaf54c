"""The recipe's section of the geometry."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from proxstep.config.sections import Positive, Section, default_of
from proxstep.isopo import PRESETS, IntraProjectingRule, IsometricRule, Isopo, NaturalRule, Rule

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal["none", *PRESETS]


class GeometrySection(Section):
    """What happens to the gradient between the objective and the optimizer (arXiv 2512.23353)."""

    rule: RuleName = Field(
        default="none",
        description='"none" or a preset of ISOPO, which sets those keys below that are null.',
    )
    fisher_power: float | None = Field(
        default=None, description="p, the power of the Fisher norm (isometric rule)."
    )
    norm_power: float | None = Field(
        default=None, description="q, the power of the Euclidean norm (isometric rule)."
    )
    relative_fisher_power: float | None = Field(
        default=None, description="r, the power of Fisher over Euclidean norm (isometric rule)."
    )
    damping: float | None = Field(
        default=None,
        ge=0,
        description="c, damping in units of the norms' trailing mean squares (isometric rule).",
    )
    ntk_damping: float | None = Field(
        default=None,
        gt=0,
        description="c, damping in units of the kernel's trailing mean eigenvalue (natural rule).",
    )
    interact: Literal["microbatch", "group"] | None = Field(
        default=None,
        description="The natural rule mixes all sequences of a microbatch, or each prompt's alone.",
    )
    damping_form: Literal["additive", "relative"] | None = Field(
        default=None,
        description="Damping as printed in the paper (additive) or as in its author's code "
        "(relative).",
    )
    scale: Literal["paper", "preserved"] = Field(
        default=IsometricRule.scale,
        description='"preserved" keeps an average sequence at its REINFORCE weight, so that '
        'learning rate and clipping carry over; "paper" does not.',
    )
    other_parameters: Literal["transform", "reinforce", "freeze"] = Field(
        default="transform",
        description="What parameters other than linear layers' weights get: the rule, the plain "
        "policy gradient, or no update.",
    )
    fisher: Literal["positions", "sequences"] = Field(
        default=default_of(Isopo, "fisher"),
        description="Estimate the Fisher norm from position-wise gradients (eqs. 3 to 6) or from "
        "the microbatch's sequences (eq. 2).",
    )
    num_overlap_positions: Positive | None = Field(
        default=default_of(Isopo, "num_overlap_positions"),
        description="K, the number of positions that estimate the Fisher norm; null for all.",
    )
    overlap_positions: Literal["all", "completion"] = Field(
        default="all",
        description="Where these positions lie: anywhere, or where a token of the completion is "
        "predicted.",
    )
    overlap_source: Literal["previous_step", "microbatch", "ranks"] | None = Field(
        default=default_of(Isopo, "overlap_source"),
        description="Whose positions estimate the Fisher norm: the previous step's, so that the "
        "result does not depend on microbatch_size, the microbatch's, or all ranks'; null for the "
        "previous step's where a number of positions is sampled, else the microbatch's.",
    )
    fisher_denominator: Literal["sample", "trailing"] = Field(
        default=default_of(Isopo, "fisher_denominator"),
        description="The Fisher estimate is divided by the sample's own sum of squares or by the "
        "trailing mean of that.",
    )
    decay: float = Field(
        default=default_of(Isopo, "decay"),
        ge=0,
        lt=1,
        description="Decay of the trailing means per optimizer step.",
    )
    memory_mib: Positive = Field(
        default=default_of(Isopo, "memory_budget") // 2**20,
        description="MiB that one layer's statistics may take at a time.",
    )
    diagnose_every: Positive | None = Field(
        default=None,
        description="Steps between full measurements of the geometry (diagnostics.jsonl); such a "
        "step costs as much as the natural rule.",
    )

    @cached_property
    def needs_full_head(self) -> bool:
        """Whether the rule needs the head's kernel or all its gradients, which chunks do not form.

        False where the rule is "none".
        """
        if self.rule == "none":
            return False
        preset = PRESETS[self.rule]
        intra = isinstance(preset, IntraProjectingRule)
        return intra or preset.needs.ntk or self.fisher == "sequences"

    @cached_property
    def depends_on_microbatches(self) -> bool:
        """Whether a sequence's weight depends on which others are in its microbatch."""
        if self.rule == "none":
            return False
        own = self.overlap_source == "microbatch" or self.num_overlap_positions is None
        return self.needs_full_head or (own and PRESETS[self.rule].needs.fisher)

    def to_rule(self) -> Rule:
        """Return the preset with this section's values in place of its own."""
        preset = PRESETS[self.rule]
        names = {field.name for field in dataclasses.fields(preset)}
        given = {
            name: getattr(self, name) for name in _RULE_KEYS if getattr(self, name) is not None
        }
        foreign = sorted(set(given) - names)
        if foreign:
            kinds = {IsometricRule: "an isometric", NaturalRule: "the natural"}
            kind = kinds.get(type(preset), "a projecting")
            raise ValueError(f"geometry.{foreign[0]} is not an option of {self.rule}, {kind} rule")
        if "scale" in names:
            given["scale"] = self.scale
        return dataclasses.replace(preset, **given)


_RULE_KEYS = (
    "fisher_power",
    "norm_power",
    "relative_fisher_power",
    "damping",
    "ntk_damping",
    "interact",
    "damping_form",
)

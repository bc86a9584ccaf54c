"""The objectives' sections of a recipe: one for each loss, told apart by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from proxstep.losses import LOSSES, escort_weights
from proxstep.losses import adaptive_tau as adaptive_tau_rule
from proxstep.losses import drive as drive_rule
from proxstep.sections import Section, default_of

AdvantageName = Literal["group-zscore", "group-centered", "leave-one-out", "batch-normalized"]
AggregationName = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]


def _mode_of(objective: str) -> Any:
    """Return the aggregation that an objective's paper uses."""
    return LOSSES[objective].default_loss_agg_mode


class _Objective(Section):
    advantage: AdvantageName = Field(
        default="group-zscore", description="How rewards become advantages."
    )


class ReinforceSection(_Objective):
    """Policy gradient without ratio and clipping."""

    name: Literal["reinforce"]
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("reinforce"), description="How token values become one loss."
    )


class GrpoSection(_Objective):
    """Token ratios, clipped (arXiv 2402.03300)."""

    name: Literal["grpo"]
    clip_ratio_low: float = Field(
        default=default_of(LOSSES["grpo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=default_of(LOSSES["grpo"].loss, "clip_ratio_high"),
        ge=0,
        description="Ratios are clipped at 1 + this.",
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("grpo"), description="How token values become one loss."
    )


class DapoSection(_Objective):
    """GRPO with a higher upper bound and a token mean (arXiv 2503.14476)."""

    name: Literal["dapo"]
    clip_ratio_low: float = Field(
        default=default_of(LOSSES["dapo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=default_of(LOSSES["dapo"].loss, "clip_ratio_high"),
        ge=0,
        description="Ratios are clipped at 1 + this.",
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("dapo"), description="How token values become one loss."
    )


class GspoSection(_Objective):
    """The sequence's mean ratio, clipped (arXiv 2507.18071)."""

    name: Literal["gspo"]
    clip_ratio_low: float = Field(
        default=default_of(LOSSES["gspo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=default_of(LOSSES["gspo"].loss, "clip_ratio_high"),
        ge=0,
        description="Ratios are clipped at 1 + this.",
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("gspo"), description="How token values become one loss."
    )


class CispoSection(_Objective):
    """Detached, clipped importance weights (arXiv 2506.13585)."""

    name: Literal["cispo"]
    clip_ratio_low: float = Field(
        default=default_of(LOSSES["cispo"].loss, "clip_ratio_low"),
        ge=0,
        description="Weights are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=default_of(LOSSES["cispo"].loss, "clip_ratio_high"),
        ge=0,
        description="Weights are clipped at 1 + this.",
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("cispo"), description="How token values become one loss."
    )


class DroSection(_Objective):
    """Quadratic penalty on each token's log-ratio, as verl ships it."""

    name: Literal["dro"]
    beta: float = Field(
        default=default_of(LOSSES["dro"].loss, "beta"), gt=0, description="Weight of the penalty."
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("dro"), description="How token values become one loss."
    )


class OpoSection(_Objective):
    """Escort-weighted drive with a quadratic penalty (arXiv 2601.12415)."""

    name: Literal["opo"]
    alpha: float = Field(
        default=default_of(escort_weights, "alpha"),
        ge=0,
        le=1,
        description="Escort exponent: 1 is uniform (conservative), 0 aggressive.",
    )
    tau: float = Field(
        default=default_of(escort_weights, "tau"),
        ge=1e-6,
        description="Temperature of the advantage in the escort weight.",
    )
    adaptive_tau: bool = Field(
        default=False,
        description="Each sequence's own temperature, from how likely the anchor found its tokens "
        "and from its advantage; tau is the base.",
    )
    tau_min: float = Field(
        default=default_of(adaptive_tau_rule, "low"),
        ge=1e-6,
        description="adaptive_tau: the smallest.",
    )
    tau_max: float = Field(
        default=default_of(adaptive_tau_rule, "high"),
        gt=0,
        description="adaptive_tau: the largest.",
    )
    tau_entropy_coef: float = Field(
        default=default_of(adaptive_tau_rule, "entropy_coef"),
        ge=0,
        description="adaptive_tau: how far the anchor's entropy raises the temperature.",
    )
    tau_confidence_coef: float = Field(
        default=default_of(adaptive_tau_rule, "confidence_coef"),
        ge=0,
        description="adaptive_tau: how far being confident and wrong raises it, and being "
        "confident and right lowers it.",
    )
    mu: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=default_of(LOSSES["opo"].loss, "mu"),
        description='Curvature of the chi-square penalty; "auto" is the largest drive of the '
        "rollout, at least 1: no target is more than one anchor's probability away.",
    )
    target_min: float | None = Field(
        default=None,
        ge=-1,
        lt=0,
        description="Smallest target drive / mu, such as -0.999; null for no bound.",
    )
    surrogate: Literal["log", "ratio"] = Field(
        default=default_of(LOSSES["opo"].loss, "surrogate"),
        description="Eq. 19 (log) or eq. 10 (ratio).",
    )
    form: Literal["work", "regression"] = Field(
        default=default_of(LOSSES["opo"].loss, "form"),
        description="What the loss's value means: -drive u + mu/2 u^2, or the squared distance to "
        "the target (eq. 16); one gradient.",
    )
    drive: Literal["center", "zscore", "none"] = Field(
        default=default_of(drive_rule, "kind"),
        description="omega - 1, z-scored omega, or omega as in algorithm 1.",
    )
    normalize: Literal["group", "batch"] = Field(
        default=default_of(escort_weights, "normalize"),
        description="Where the escort weights have mean 1: in each prompt's group, or in the "
        "whole rollout.",
    )
    anchor_correction: Literal["absorbed", "length", "sequence"] = Field(
        default=default_of(escort_weights, "anchor_correction"),
        description="The anchor's factor in eq. 7; see docs/algorithms.md.",
    )
    length_normalize: bool = Field(
        default=default_of(LOSSES["opo"].loss, "length_normalize"),
        description="Log-ratios per token.",
    )


class DrGrpoSection(_Objective):
    """GRPO without the biases of length and of the group's spread (arXiv 2503.20783)."""

    name: Literal["dr-grpo"]
    advantage: AdvantageName = Field(
        default="group-centered", description="How rewards become advantages."
    )
    clip_ratio_low: float = Field(
        default=default_of(LOSSES["dr-grpo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=default_of(LOSSES["dr-grpo"].loss, "clip_ratio_high"),
        ge=0,
        description="Ratios are clipped at 1 + this.",
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("dr-grpo"), description="How token values become one loss."
    )


class RlooSection(_Objective):
    """REINFORCE against the mean of the prompt's other completions (arXiv 2402.14740)."""

    name: Literal["rloo"]
    advantage: AdvantageName = Field(
        default="leave-one-out", description="How rewards become advantages."
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("rloo"), description="How token values become one loss."
    )


ObjectiveSection = Annotated[
    ReinforceSection
    | GrpoSection
    | DapoSection
    | GspoSection
    | CispoSection
    | DroSection
    | OpoSection
    | DrGrpoSection
    | RlooSection,
    Field(discriminator="name"),
]

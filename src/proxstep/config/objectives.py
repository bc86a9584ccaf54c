"""The objectives' sections of a recipe: one for each loss, told apart by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from proxstep.algorithms import LOSSES, escort_weights
from proxstep.algorithms import adaptive_tau as adaptive_tau_rule
from proxstep.algorithms import drive as drive_rule
from proxstep.config.sections import Section, default_of

AdvantageName = Literal["group-zscore", "group-centered", "leave-one-out", "batch-normalized"]
AggregationName = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]


def _advantage(default: str) -> Any:
    """Return the key of the advantages."""
    return Field(default=default, description="How rewards become advantages.")


def _aggregation_of(objective: str) -> Any:
    """Return the key of the aggregation; by default the one that the objective's paper uses."""
    return Field(
        default=LOSSES[objective].default_loss_agg_mode,
        description="How token values become one loss.",
    )


def _width(side: Literal["low", "high"], objective: str, clipped: str = "Ratios") -> Any:
    """Return the key of a clip's width below or above 1."""
    sign = {"low": "-", "high": "+"}[side]
    return Field(
        default=default_of(LOSSES[objective].loss, f"clip_ratio_{side}"),
        ge=0,
        description=f"{clipped} are clipped at 1 {sign} this.",
    )


class _Objective(Section):
    advantage: AdvantageName = _advantage("group-zscore")


class ReinforceSection(_Objective):
    """Policy gradient without ratio and clipping."""

    name: Literal["reinforce"]
    loss_agg_mode: AggregationName = _aggregation_of("reinforce")


class GrpoSection(_Objective):
    """Token ratios, clipped (arXiv 2402.03300)."""

    name: Literal["grpo"]
    clip_ratio_low: float = _width("low", "grpo")
    clip_ratio_high: float = _width("high", "grpo")
    loss_agg_mode: AggregationName = _aggregation_of("grpo")


class DapoSection(_Objective):
    """GRPO with a higher upper bound and a token mean (arXiv 2503.14476)."""

    name: Literal["dapo"]
    clip_ratio_low: float = _width("low", "dapo")
    clip_ratio_high: float = _width("high", "dapo")
    loss_agg_mode: AggregationName = _aggregation_of("dapo")


class GspoSection(_Objective):
    """The sequence's mean ratio, clipped (arXiv 2507.18071)."""

    name: Literal["gspo"]
    clip_ratio_low: float = _width("low", "gspo")
    clip_ratio_high: float = _width("high", "gspo")
    loss_agg_mode: AggregationName = _aggregation_of("gspo")


class CispoSection(_Objective):
    """Detached, clipped importance weights (arXiv 2506.13585)."""

    name: Literal["cispo"]
    clip_ratio_low: float = _width("low", "cispo", "Weights")
    clip_ratio_high: float = _width("high", "cispo", "Weights")
    loss_agg_mode: AggregationName = _aggregation_of("cispo")


class DroSection(_Objective):
    """Quadratic penalty on each token's log-ratio, as verl ships it."""

    name: Literal["dro"]
    beta: float = Field(
        default=default_of(LOSSES["dro"].loss, "beta"), gt=0, description="Weight of the penalty."
    )
    loss_agg_mode: AggregationName = _aggregation_of("dro")


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
    advantage: AdvantageName = _advantage("group-centered")
    clip_ratio_low: float = _width("low", "dr-grpo")
    clip_ratio_high: float = _width("high", "dr-grpo")
    loss_agg_mode: AggregationName = _aggregation_of("dr-grpo")


class RlooSection(_Objective):
    """REINFORCE against the mean of the prompt's other completions (arXiv 2402.14740)."""

    name: Literal["rloo"]
    advantage: AdvantageName = _advantage("leave-one-out")
    loss_agg_mode: AggregationName = _aggregation_of("rloo")


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

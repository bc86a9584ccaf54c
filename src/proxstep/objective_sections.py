"""The objectives' sections of a recipe: one for each loss, told apart by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from proxstep.losses import LOSSES, escort_weights
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
        gt=0,
        description="Temperature of the advantage in the escort weight.",
    )
    mu: float = Field(
        default=default_of(LOSSES["opo"].loss, "mu"),
        gt=0,
        description="Curvature of the chi-square penalty.",
    )
    surrogate: Literal["log", "ratio"] = Field(
        default=default_of(LOSSES["opo"].loss, "surrogate"),
        description="Eq. 19 (log) or eq. 10 (ratio).",
    )
    drive: Literal["center", "zscore", "none"] = Field(
        default="center", description="omega - 1, z-scored omega, or omega as in algorithm 1."
    )
    anchor_correction: Literal["absorbed", "length", "sequence"] = Field(
        default="absorbed", description="The anchor's factor in eq. 7; see docs/algorithms.md."
    )
    length_normalize: bool = Field(default=False, description="Log-ratios per token.")


ObjectiveSection = Annotated[
    ReinforceSection
    | GrpoSection
    | DapoSection
    | GspoSection
    | CispoSection
    | DroSection
    | OpoSection,
    Field(discriminator="name"),
]

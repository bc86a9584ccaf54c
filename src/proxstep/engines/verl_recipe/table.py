"""Every key of a recipe in verl: what it is called there, or why it cannot be had.

The names on the right are verl 0.9.1's hydra keys. What is not in `RENAMED` follows from several
keys, or needs a value of another form, and is computed in `overrides`.
"""

from __future__ import annotations

from typing import Any

from proxstep.config.objectives import OpoSection
from proxstep.config.sections import GeometrySection
from proxstep.engines.keys import Refusal

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
OPTIMIZER = f"{ACTOR}.optim"

RENAMED: dict[str, str] = {
    "steps": "trainer.total_training_steps",
    "task.max_prompt_length": "data.max_prompt_length",
    "objective.clip_ratio_low": f"{ACTOR}.clip_ratio_low",
    "objective.clip_ratio_high": f"{ACTOR}.clip_ratio_high",
    "objective.beta": f"{ACTOR}.policy_loss.dro_beta",
    "objective.loss_agg_mode": f"{ACTOR}.loss_agg_mode",
    "regularizer.entropy_coef": f"{ACTOR}.entropy_coeff",
    "rollout.num_prompts": "data.train_batch_size",
    "rollout.num_generations": f"{ROLLOUT}.n",
    "rollout.max_completion_length": "data.max_response_length",
    "rollout.temperature": f"{ROLLOUT}.temperature",
    "rollout.top_p": f"{ROLLOUT}.top_p",
    "update.num_iterations": f"{ACTOR}.ppo_epochs",
    "optimizer.learning_rate": f"{OPTIMIZER}.lr",
    "optimizer.weight_decay": f"{OPTIMIZER}.weight_decay",
    "evaluation.every": "trainer.test_freq",
    "logging.project": "trainer.project_name",
}
"""Recipe keys whose value verl takes as it is."""

COMPUTED = {
    "seed",
    "algorithm",
    "device",
    "output_dir",
    "model.dtype",
    "model.autocast",
    "model.lora",
    "model.lora.rank",
    "model.lora.alpha",
    "model.lora.target_modules",
    "objective.advantage",
    "regularizer.kl_coef",
    "regularizer.kl_estimator",
    "regularizer.kl_in",
    "rollout.top_k",
    "rollout.overlong_buffer",
    "rollout.overlong_penalty",
    "rollout.importance_cap",
    "update.num_minibatches",
    "update.microbatch_size",
    "optimizer.name",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.momentum",
    "optimizer.max_grad_norm",
    "optimizer.warmup_updates",
    "logging.tracker",
    "logging.num_samples",
    "logging.checkpoint_every",
}
"""Recipe keys that `overrides` turns into other values."""

PREPARED = {
    "model.name",
    "model.warmup_score",
    "task.name",
    "task.difficulty",
    "task.level",
    "task.train",
    "task.validation",
    "task.prompt_column",
    "task.answer_column",
    "task.config",
    "task.train_split",
    "task.validation_split",
    "task.num_train",
    "task.num_validation",
    "task.prompt_format",
    "task.rewards",
    "task.reward_weights",
}
"""Recipe keys that decide what verl's data files, model folder and reward function hold."""

UNMEASURED = {
    "evaluation.batch_size",
    "evaluation.num_probe_prompts",
    "evaluation.kl_policy_initial",
}
"""Recipe keys of measurements that the local engine makes and verl has no place for."""

REFUSED: tuple[Refusal, ...] = (
    (
        "device",
        lambda recipe: recipe.device not in ("auto", "cpu", "cuda"),
        "verl takes all accelerators that it sees: use cuda, and CUDA_VISIBLE_DEVICES to choose",
    ),
    (
        "model.head",
        lambda recipe: recipe.model.head != "full",
        "verl computes log-probabilities from all logits: use full",
    ),
    (
        "model.lora.dropout",
        lambda recipe: recipe.model.lora is not None and recipe.model.lora.dropout > 0,
        "verl has no dropout before its adapters: use 0",
    ),
    (
        "objective.advantage",
        lambda recipe: (
            recipe.objective.name != "opo" and recipe.objective.advantage not in ADVANTAGES
        ),
        "verl has no estimator that does the same: use group-zscore, group-centered or "
        "leave-one-out",
    ),
    (
        "objective.mu",
        lambda recipe: getattr(recipe.objective, "mu", 0) == "auto",
        "verl's losses see a microbatch, not the rollout: give a number",
    ),
    (
        "objective.adaptive_tau",
        lambda recipe: getattr(recipe.objective, "adaptive_tau", False),
        "verl hands no log-probabilities to its advantage estimators: leave it false",
    ),
    (
        "objective.anchor_correction",
        lambda recipe: getattr(recipe.objective, "anchor_correction", "absorbed") != "absorbed",
        "verl hands no log-probabilities to its advantage estimators: use absorbed",
    ),
    (
        "geometry.diagnose_every",
        lambda recipe: recipe.geometry.diagnose_every is not None,
        "the full measurements are the local engine's: leave it null",
    ),
    (
        "regularizer.kl_estimator",
        lambda recipe: (
            recipe.regularizer.kl_coef > 0 and recipe.regularizer.kl_estimator not in KL_ESTIMATORS
        ),
        "verl has estimates from the sampled tokens alone: use k2 in the loss, k1 in the reward",
    ),
    (
        "rollout.dynamic_sampling_max_batches",
        lambda recipe: recipe.rollout.dynamic_sampling_max_batches is not None,
        "verl's trainer ignores a limit on the batches; leave it null (and add "
        "algorithm.filter_groups.enable=True to the printed command for sampling without a limit)",
    ),
    (
        "rollout.mask_truncated_completions",
        lambda recipe: recipe.rollout.mask_truncated_completions,
        "verl's trainer has no such mask: leave it false, or use rollout.overlong_buffer",
    ),
    (
        "optimizer.name",
        lambda recipe: recipe.optimizer.name not in OPTIMIZERS,
        "verl builds its optimizer over sharded parameters by torch.optim's names: use adamw or "
        "sgd",
    ),
    (
        "optimizer.muon_learning_rate",
        lambda recipe: recipe.optimizer.muon_learning_rate is not None,
        "verl has no muon: leave it null",
    ),
)
"""Recipe keys that cannot be had in verl: when, and what to do instead."""

ADVANTAGES: dict[str, dict[str, Any]] = {
    "group-zscore": {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True},
    "group-centered": {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False},
    "leave-one-out": {"adv_estimator": "rloo"},
}
"""Keys of `algorithm` for each of our advantages."""

LOSS_MODES = {
    "reinforce": "gpg",
    "rloo": "gpg",
    "grpo": "vanilla",
    "dapo": "vanilla",
    "dr-grpo": "vanilla",
    "gspo": "gspo",
    "cispo": "cispo",
    "dro": "dro",
    "opo": "chi2_opo",
}
"""verl's name of each objective's policy loss; gpg is the plain policy gradient."""

KL_ESTIMATORS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def of_opo() -> set[str]:
    """Return the recipe keys of OPO's own options."""
    names = set(OpoSection.model_fields) - {"advantage"}
    return {f"objective.{name}" for name in names}


def of_geometry() -> set[str]:
    """Return the recipe keys of ISOPO's options that verl's engine takes."""
    names = set(GeometrySection.model_fields) - {"diagnose_every"}
    return {f"geometry.{name}" for name in names}

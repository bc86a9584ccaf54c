"""A recipe's keys in verl: what they are called there, and which values are refused.

The names on the right are verl 0.9.1's hydra keys. What is not in `RENAMED` needs a value of
another form, and is computed in `overrides`. The objective's keys are not here: they keep their
names, in the class that `policy_loss.config_class` makes of the algorithm's declaration.
"""

from __future__ import annotations

from proxstep.engines.keys import Refusal

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
OPTIMIZER = f"{ACTOR}.optim"

RENAMED: dict[str, str] = {
    "steps": "trainer.total_training_steps",
    "task.max_prompt_length": "data.max_prompt_length",
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
    "optimizer.lr_scheduler_type": f"{OPTIMIZER}.lr_scheduler_type",
    "optimizer.min_lr_rate": f"{OPTIMIZER}.min_lr_ratio",
    "evaluation.every": "trainer.test_freq",
    "logging.project": "trainer.project_name",
}
"""Recipe keys whose value verl takes as it is."""

REFUSED: tuple[Refusal, ...] = (
    (
        "external_lib",
        lambda recipe: recipe.external_lib is not None,
        "each of verl's processes loads one library, ours: in a command of verl's, name as its "
        "external_lib a module that registers your algorithm and calls "
        "proxstep.engines.verl.register()",
    ),
    (
        "device",
        lambda recipe: recipe.device not in ("auto", "cuda"),
        "verl takes all GPUs that it sees: use cuda, and CUDA_VISIBLE_DEVICES to choose",
    ),
    (
        "model.head",
        lambda recipe: recipe.model.head != "full",
        "verl computes log-probabilities from all logits: use full",
    ),
    (
        "model.autocast",
        lambda recipe: recipe.model.autocast == "auto",
        "only the local engine measures whether bfloat16 is faster: say bfloat16, or leave it null",
    ),
    (
        "model.lora.dropout",
        lambda recipe: recipe.model.lora is not None and recipe.model.lora.dropout > 0,
        "verl has no dropout before its adapters: use 0",
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
        "rollout.stop",
        lambda recipe: recipe.rollout.stop is not None,
        "verl's rollout takes no texts: leave it null, or use --engine local",
    ),
    (
        "rollout.prefill",
        lambda recipe: recipe.rollout.prefill is not None,
        "verl's prompts end where the chat template does: leave it null, or use --engine local",
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
        "optimizer.lr_scheduler_type",
        lambda recipe: recipe.optimizer.lr_scheduler_type == "linear",
        "verl's schedules are constant and cosine: use one of them",
    ),
    (
        "optimizer.muon_learning_rate",
        lambda recipe: recipe.optimizer.muon_learning_rate is not None,
        "verl has no muon: leave it null",
    ),
    (
        "model.autocast",
        lambda recipe: recipe.update.kl_budget is not None and recipe.model.autocast is not None,
        "under update.kl_budget verl must compute in float32, since its mixed precision cannot be "
        "switched off while a step is judged: leave it null, or use --engine local",
    ),
    (
        "logging.checkpoint_minutes",
        lambda recipe: recipe.logging.differs("checkpoint_minutes"),
        "verl saves by steps alone: leave it out, and set logging.checkpoint_every",
    ),
    *(
        (
            f"evaluation.{key}",
            lambda recipe, key=key: recipe.evaluation.differs(key),
            "it is of the local engine's measurements, which verl does not make: leave it out",
        )
        for key in ("num_probe_prompts", "num_samples")
    ),
    (
        "evaluation.patience",
        lambda recipe: recipe.evaluation.patience is not None,
        "only the local engine stops early: leave it null",
    ),
    (
        "guard",
        lambda recipe: recipe.guard in ("halve", "stop"),
        "only the local engine goes back: leave it out, and see proxstep diagnose",
    ),
    (
        "logging.checkpoint_last",
        lambda recipe: not recipe.logging.checkpoint_last,
        "verl saves the last step: leave it out",
    ),
    (
        "task.reward_seconds",
        lambda recipe: recipe.task.differs("reward_seconds"),
        "verl's reward workers have no limit: leave it out",
    ),
)
"""Recipe keys that verl does not offer: when, and what to do instead."""

KL_ESTIMATORS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}

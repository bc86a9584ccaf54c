"""A recipe as verl's hydra overrides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.config.sections import Section
from proxstep.engines.fields import BUDGET_OPTIONS
from proxstep.engines.keys import leaves, refuse
from proxstep.engines.verl.hydra import override
from proxstep.engines.verl.seams import (
    BYPASS,
    LIBRARY,
    config_name,
    find_obstacle,
    loss_mode,
    reads_importance,
)
from proxstep.engines.verl.table import (
    ACTOR,
    KL_ESTIMATORS,
    MODEL,
    OPTIMIZER,
    OPTIMIZERS,
    REFUSED,
    RENAMED,
    ROLLOUT,
)
from proxstep.errors import ProxstepError


@dataclass(frozen=True)
class Prepared:
    """What the overrides point to.

    Attributes:
        model: The model's folder or hub name.
        train: The training prompts as verl's Parquet file.
        validation: The validation prompts.
        rewards: Specifications of the reward functions.
        reward_weights: One for each.
        chat_template: What makes a plain prompt out of verl's messages, or None for the
            tokenizer's own.
    """

    model: str
    train: Path
    validation: Path
    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    chat_template: str | None


@dataclass(frozen=True)
class Machine:
    """What verl runs on.

    Attributes:
        num_ranks: Data-parallel ranks, all on this machine.
        settings: The overrides that depend on the machine, by key; a recipe's go before them.
    """

    num_ranks: int
    settings: Mapping[str, str]


def gpus(count: int) -> Machine:
    """Return a machine with GPUs, where vLLM generates."""
    values = {
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": count,
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.tensor_model_parallel_size": 1,
    }
    return Machine(count, {key: override(key, value) for key, value in values.items()})


def overrides(recipe: Recipe, prepared: Prepared, machine: Machine) -> list[str]:
    """Return the arguments of `python -m verl.trainer.main_ppo`.

    Raises:
        ProxstepError: If the recipe asks for what verl cannot do.
    """
    refuse("verl", recipe, REFUSED)
    _refuse_objective(recipe)
    values = leaves(recipe)
    ours: dict[str, Any] = {
        **{name: values[key] for key, name in RENAMED.items()},
        **_data(recipe, prepared),
        **_objective(recipe),
        **_actor(recipe),
        **_budget(recipe),
        **_regularizer(recipe),
        **_rollout(recipe),
        **_update(recipe, machine),
        **_optimizer(recipe),
        **_run(recipe),
        **_model(recipe, prepared),
    }
    arguments = {key: override(key, value) for key, value in ours.items()}
    return list({**machine.settings, **arguments}.values())


def _data(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    template = recipe.task.chat_template_kwargs
    return {
        **({"+data.apply_chat_template_kwargs": template} if template else {}),
        "data.train_files": str(prepared.train),
        "data.val_files": str(prepared.validation),
        "data.shuffle": False,  # the rows are in the order of the local engine's batches
        "data.seed": recipe.seed,
        "data.truncation": "error",
        "reward.custom_reward_function.path": f"pkg://{LIBRARY}.compute_score",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs": {
            "rewards": list(prepared.rewards),
            "weights": list(prepared.reward_weights),
        },
    }


def _objective(recipe: Recipe) -> dict[str, Any]:
    """Return the algorithm's estimator and loss, with its keys."""
    section = recipe.objective
    mode = loss_mode(section.algorithm)
    found: dict[str, Any] = {
        "algorithm.adv_estimator": mode,
        f"{ACTOR}.policy_loss._target_": f"{LIBRARY}.{config_name(section.algorithm)}",
        f"{ACTOR}.policy_loss.loss_mode": mode,
    }
    if section.loss_agg_mode == "seq-mean-token-sum-norm":
        found[f"{ACTOR}.loss_scale_factor"] = recipe.rollout.max_completion_length
    if section.algorithm.ratio_to_sampler:
        found[BYPASS] = True  # verl's old log-probabilities are then its rollout's
        found[f"{ROLLOUT}.calculate_log_probs"] = True
    chosen = _chosen(section, "name", "loss_agg_mode")
    return found | {f"+{ACTOR}.policy_loss.{key}": value for key, value in chosen.items()}


def _refuse_objective(recipe: Recipe) -> None:
    """Refuse an algorithm that verl cannot compute, by the key at fault."""
    algorithm, options = recipe.objective.algorithm, recipe.objective.options()
    found = find_obstacle(algorithm, options)
    if found is not None:
        key = "algorithm" if found.key is None else f"objective.{found.key}"
        refuse("verl", recipe, [(key, lambda recipe: True, found.reason)])
    if recipe.rollout.importance_cap is not None and reads_importance(algorithm, options):
        reason = (
            f"{algorithm.name} prepares its signal with the importance weights, which verl hands "
            "to no advantage estimator: leave it null"
        )
        refuse("verl", recipe, [("rollout.importance_cap", lambda recipe: True, reason)])


def _actor(recipe: Recipe) -> dict[str, Any]:
    """Return the engine: verl's own, or ours for a geometry or a KL budget."""
    section = recipe.geometry
    if section.rule != "none":
        return {
            f"{ACTOR}.strategy": "isopo",
            f"{ACTOR}._target_": f"{LIBRARY}.IsopoActorConfig",
            f"+{ACTOR}.geometry": _chosen(section),
        }
    if recipe.update.kl_budget is not None:
        return {
            f"{ACTOR}.strategy": "kl_budget",
            f"{ACTOR}._target_": f"{LIBRARY}.BudgetActorConfig",
        }
    return {f"{ACTOR}.strategy": "fsdp2"}


def _budget(recipe: Recipe) -> dict[str, Any]:
    section = recipe.update
    if section.kl_budget is None:
        return {}
    chosen = {key: getattr(section, key) for key in BUDGET_OPTIONS if section.differs(key)}
    chosen["kl_num_updates"] = section.num_updates
    return {f"+{ACTOR}.{key}": value for key, value in chosen.items()}


def _chosen(section: Section, *without: str) -> dict[str, Any]:
    """Return the keys of a section that are not at their defaults; our classes have the same."""
    return section.model_dump(exclude_defaults=True, exclude=set(without))


def _regularizer(recipe: Recipe) -> dict[str, Any]:
    section = recipe.regularizer
    if section.kl_coef == 0:
        return {}
    estimator = KL_ESTIMATORS[section.kl_estimator]
    if section.in_reward:
        return {
            "algorithm.use_kl_in_reward": True,
            "algorithm.kl_penalty": estimator,
            "algorithm.kl_ctrl.kl_coef": section.kl_coef,
        }
    return {
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.kl_loss_type": estimator,
        f"{ACTOR}.kl_loss_coef": section.kl_coef,
    }


def _rollout(recipe: Recipe) -> dict[str, Any]:
    section = recipe.rollout
    found: dict[str, Any] = {
        f"{ROLLOUT}.top_k": section.top_k or -1,
        f"{ROLLOUT}.seed": recipe.seed,
    }
    if section.engine == "vllm":  # which verl samples with anyway
        found[f"{ROLLOUT}.gpu_memory_utilization"] = section.gpu_memory_utilization
    if section.importance_cap is not None:
        correction = "algorithm.rollout_correction"
        found[f"{correction}.rollout_is"] = "sequence"
        found[f"{correction}.rollout_is_threshold"] = section.importance_cap
    if section.overlong_buffer is not None:
        found["reward.reward_manager.name"] = "dapo"
        found["+reward.reward_kwargs.max_resp_len"] = section.max_completion_length
        found["+reward.reward_kwargs.overlong_buffer_cfg"] = {
            "enable": True,
            "len": section.overlong_buffer,
            "penalty_factor": section.overlong_penalty,
            "log": False,
        }
    return found


def _update(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Return the sizes of minibatches, in prompts, and of microbatches, in sequences of a rank.

    Raises:
        ProxstepError: If a minibatch cannot be divided among the ranks.
    """
    rollout, update = recipe.rollout, recipe.update
    num_prompts = rollout.num_prompts // update.num_minibatches
    num_sequences = num_prompts * rollout.num_generations
    if num_sequences % machine.num_ranks:
        raise ProxstepError(
            f"update.num_minibatches {update.num_minibatches} leaves {num_sequences} sequences for "
            f"an optimizer step, which verl cannot divide among {machine.num_ranks} ranks: change "
            "rollout.num_prompts or rollout.num_generations"
        )
    per_rank = num_sequences // machine.num_ranks
    size = per_rank if update.microbatch_size is None else min(update.microbatch_size, per_rank)
    size = max(number for number in range(1, size + 1) if per_rank % number == 0)
    tokens = _by_tokens(recipe)
    return {
        **tokens,
        f"{ACTOR}.ppo_mini_batch_size": num_prompts,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": size,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": size,
    }


def _by_tokens(recipe: Recipe) -> dict[str, Any]:
    """Return what says that microbatches are cut by tokens, of a rank and without padding.

    Raises:
        ProxstepError: If a sequence can be longer, at which verl would stop.
    """
    tokens = recipe.update.microbatch_tokens
    if tokens is None:
        return {}
    longest = recipe.task.max_prompt_length + recipe.rollout.max_completion_length
    if tokens < longest:
        raise ProxstepError(
            f"update.microbatch_tokens {tokens} is below task.max_prompt_length + "
            f"rollout.max_completion_length = {longest}, and verl stops at a longer sequence: "
            "raise it"
        )
    scoring = (ROLLOUT, "actor_rollout_ref.ref")
    return {
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": tokens,
        **{f"{part}.log_prob_use_dynamic_bsz": True for part in scoring},
        **{f"{part}.log_prob_max_token_len_per_gpu": tokens for part in scoring},
    }


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    section = recipe.optimizer
    options = section.options()
    warmup = math.ceil(section.warmup_updates / recipe.update.num_updates)  # verl counts rollouts
    found: dict[str, Any] = {
        f"{OPTIMIZER}.optimizer": OPTIMIZERS[section.name],
        f"{OPTIMIZER}.clip_grad": section.max_grad_norm or math.inf,
        f"{OPTIMIZER}.lr_warmup_steps": warmup or -1,
    }
    if "betas" in options:
        found[f"{OPTIMIZER}.betas"] = options.pop("betas")
    if options:
        found[f"+{OPTIMIZER}.override_optimizer_config"] = options
    return found


def _run(recipe: Recipe) -> dict[str, Any]:
    folder = Path(recipe.output_dir).absolute()
    section = recipe.logging
    found: dict[str, Any] = {
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.experiment_name": recipe.algorithm,
        "trainer.logger": ["console", "file"],
        "trainer.total_epochs": 1,  # the training file holds every step's prompts
        "trainer.save_freq": section.checkpoint_every or recipe.steps,
        "trainer.max_actor_ckpt_to_keep": section.checkpoints_kept,
        "trainer.resume_mode": "auto",
        f"{ACTOR}.data_loader_seed": recipe.seed,
        f"{ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
    }
    if section.tracker != "none":
        found["trainer.logger"] = [*found["trainer.logger"], section.tracker]
    if section.num_samples:
        found["trainer.validation_data_dir"] = str(folder / "verl" / "validation")
    return found


def _model(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    section, lora = recipe.model, recipe.model.lora
    computes = "bf16" if "bfloat16" in (section.dtype, section.autocast) else "fp32"
    weights = "bf16" if section.dtype == "bfloat16" else "fp32"
    precision = {"param_dtype": computes, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    found: dict[str, Any] = {
        f"{MODEL}.path": prepared.model,
        f"{MODEL}.external_lib": LIBRARY,
        f"{ACTOR}.fsdp_config.model_dtype": weights,
        f"{ACTOR}.fsdp_config.seed": recipe.seed,
        f"+{ACTOR}.fsdp_config.mixed_precision": precision,
        f"{ROLLOUT}.dtype": "bfloat16" if computes == "bf16" else "float32",
    }
    if computes == "fp32":  # flash attention, verl's own choice, has no float32
        found[f"+{MODEL}.override_config.attn_implementation"] = "sdpa"
    if prepared.chat_template is not None:
        found[f"{MODEL}.custom_chat_template"] = prepared.chat_template
    if lora is not None:
        found[f"{MODEL}.lora_rank"] = lora.rank
        found[f"{MODEL}.lora_alpha"] = lora.alpha
        found[f"{MODEL}.target_modules"] = lora.target_modules
    return found

"""A recipe in TRL's terms: which trainer, which options, which dataset and rewards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.config.sections import EMBEDDED_MODELS
from proxstep.engines.fields import BUDGET_OPTIONS, option_name
from proxstep.engines.keys import leaves, refuse
from proxstep.engines.trl.configs import TRL_OPTIONS, PolicyConfig
from proxstep.engines.trl.expressions import Call, Code, Name, Shared, make
from proxstep.engines.trl.tables import (
    AUTOCASTS,
    KNOWN,
    OPTIMIZERS,
    PRECISIONS,
    REFUSALS,
    RENAMED,
    minibatch_size,
    trl_loss,
)
from proxstep.errors import ProxstepError
from proxstep.rewards import BUILTIN_REWARDS
from proxstep.tasks import REWARDS
from proxstep.training.gguf import is_gguf
from proxstep.training.merging import has_adapters
from proxstep.training.task import task_call

PUNISHMENT = "soft_overlong_punishment_reward"
"""The name under which TRL reports what it adds to the reward for length."""


@dataclass(frozen=True)
class Translation:
    """A recipe as TRL's trainer takes it.

    Attributes:
        trainer: Its class.
        model: What to load: a name, a path, or a call that returns one.
        rewards: The reward functions.
        args: The call of its configuration's class.
        task: The call that makes the task.
        lora: The call that describes adapters, or None.
    """

    trainer: Name
    model: str | Call
    rewards: list[Name | Call]
    args: Call
    task: Call
    lora: Call | None


def translate(recipe: Recipe, *, chat: bool | Code) -> Translation:
    """Return what runs a recipe in TRL.

    Args:
        recipe: The recipe.
        chat: Whether the tokenizer has a chat template, or the code that finds out.

    Raises:
        ProxstepError: If TRL cannot do what the recipe says, naming the key and the remedy.
    """
    refuse("trl", recipe, REFUSALS, KNOWN)
    kind, of_loss = _loss(recipe)
    module = "trl" if kind == "GRPO" else "proxstep.engines.trl"
    config = Name(module, f"{kind}Config")
    function, options = task_call(recipe, chat=chat)  # type: ignore[arg-type]
    return Translation(
        Name(module, f"{kind}Trainer"),
        _model(recipe),
        _rewards(recipe),
        Call(config, _without_defaults(config, of_loss | _options(recipe))),
        Call(Name("proxstep.tasks", function.__name__), _chosen(function, options)),
        _lora(recipe),
    )


def _loss(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return the first word of the trainer's name, and the options of the loss.

    Where TRL's own trainer computes something else, it is one that computes any algorithm.
    """
    section, geometry = recipe.objective, leaves(recipe.geometry)
    transformed = geometry.pop("rule") != "none"
    ours = transformed or recipe.update.kl_budget is not None
    theirs = None if ours else trl_loss(recipe)
    if theirs is not None:
        return "GRPO", theirs
    found: dict[str, Any] = {"loss_type": section.name}
    for key, value in section.options().items():
        if value != section.algorithm.defaults[key]:
            found[_option(key, section.name)] = value
    if section.loss_agg_mode != section.algorithm.default_loss_agg_mode:
        found["loss_agg_mode"] = section.loss_agg_mode
    if section.advantage != section.algorithm.advantage:
        found["advantage"] = section.advantage
    if not transformed:
        return ("Opo" if section.name == "opo" else "Policy"), found
    del geometry["diagnose_every"]  # refused above, but for null
    return "Isopo", {"rule": recipe.geometry.rule, **found, **geometry}


def _option(key: str, algorithm: str) -> str:
    """Return the option of an algorithm's key.

    Raises:
        ProxstepError: If there is none, since the algorithm came after our configurations.
    """
    name = option_name(key, TRL_OPTIONS)
    if name not in {field.name for field in dataclasses.fields(PolicyConfig)}:
        raise ProxstepError(
            f"objective.{key} of {algorithm} is no option of PolicyConfig: register the algorithm "
            "before proxstep.engines.trl is imported"
        )
    return name


def _options(recipe: Recipe) -> dict[str, Any]:
    """Return the other keyword arguments of the configuration, in a script's order."""
    values = leaves(recipe)
    renamed = {option: values[key] for key, option in RENAMED.items() if values[key] is not None}
    if recipe.logging.tracker == "none":
        del renamed["project"]
    return {
        **renamed,
        **_sizes(recipe),
        **_optimizer(recipe),
        **_budget(recipe),
        **_precision(recipe),
        "use_bias_correction_kl": recipe.regularizer.kl_coef == 0,
        "reward_weights": _reward_weights(recipe),
        "logging_steps": 1,
    }


def _sizes(recipe: Recipe) -> dict[str, Any]:
    """Return batch sizes and counts; TRL counts microbatches, of one rank."""
    update, total = recipe.update, minibatch_size(recipe)
    if update.microbatch_size is None:
        size: Any = Shared(total, "rollout.num_prompts * rollout.num_generations")
        accumulation: Any = 1
    else:
        size = update.microbatch_size
        accumulation = Shared(total // size, "microbatches of a minibatch")
    per_rollout: Any = None
    if update.num_minibatches > 1:
        per_rollout = update.num_minibatches
        if isinstance(accumulation, Shared):
            count = accumulation.count * update.num_minibatches
            per_rollout = accumulation._replace(count=count)
    every = recipe.logging.checkpoint_every or recipe.steps
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_rollout,
        "max_steps": recipe.steps * recipe.update.num_updates,
        "save_steps": every * recipe.update.num_updates,
    }


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    section = recipe.optimizer
    schedule = section.lr_scheduler_type
    if schedule == "constant" and section.warmup_updates:
        schedule = "constant_with_warmup"
    found: dict[str, Any] = {"lr_scheduler_type": schedule}
    if section.min_lr_rate > 0:
        found["lr_scheduler_type"] = "cosine_with_min_lr"
        found["lr_scheduler_kwargs"] = {"min_lr_rate": section.min_lr_rate}
    found["max_grad_norm"] = section.max_grad_norm or 0.0
    found |= OPTIMIZERS[section.name]
    if section.momentum is not None:
        found["optim_args"] = f"momentum={section.momentum}"
    if section.betas is not None:
        found["adam_beta1"], found["adam_beta2"] = section.betas
    return found


def _budget(recipe: Recipe) -> dict[str, Any]:
    """Return the KL budget's options, which are our configurations' alone."""
    update = recipe.update
    if update.kl_budget is None:
        return {}
    return {name: getattr(update, name) for name in BUDGET_OPTIONS}


def _precision(recipe: Recipe) -> dict[str, Any]:
    renamed = "activation_checkpointing" in TRL_OPTIONS  # in transformers 5.23
    return {
        "bf16": AUTOCASTS[recipe.model.autocast],
        "model_init_kwargs": PRECISIONS[recipe.model.dtype],
        "activation_checkpointing" if renamed else "gradient_checkpointing": False,
        "use_cpu": recipe.device == "cpu",
        "dataloader_pin_memory": False,
    }


def _model(recipe: Recipe) -> str | Call:
    if is_gguf(recipe.model.name):
        return Call(Name("proxstep.training.gguf", "ensure_converted"), {"name": recipe.model.name})
    if recipe.model.name not in EMBEDDED_MODELS:
        if has_adapters(recipe.model.name):
            merged = Name("proxstep.training.merging", "ensure_merged")
            return Call(merged, {"name": recipe.model.name})
        return recipe.model.name
    warmed_up = Name("proxstep.training.demo_model", "ensure_embedded_model")
    keys: dict[str, Any] = {
        "difficulty": recipe.task.difficulty,
        "score": recipe.model.warmup_score,
        "task": recipe.task.name,
        "name": recipe.model.name,
    }
    return Call(warmed_up, keys)


def _rewards(recipe: Recipe) -> list[Name | Call]:
    """Return the reward functions; what the recipe adds for length comes last."""
    section = recipe.rollout
    found = [_reward(spec, section.max_completion_length) for spec in _reward_specs(recipe)]
    if section.overlong_buffer is not None:
        punishment = Name("trl.rewards", "get_soft_overlong_punishment")
        lengths = {"max_completion_len": section.max_completion_length}
        lengths["soft_punish_cache"] = section.overlong_buffer
        found.append(Call(punishment, lengths))
    return found


def _reward(spec: str, max_completion_length: int) -> Name | Call:
    """Return one reward function, told of what was cut off if it asks for that."""
    if spec not in BUILTIN_REWARDS:
        return Call(Name("proxstep.rewards", "load_reward"), {"spec": spec})
    reward = Name("proxstep.rewards", spec)
    if "truncated" not in inspect.signature(BUILTIN_REWARDS[spec]).parameters:
        return reward
    told = {"reward": reward, "max_completion_length": max_completion_length}
    return Call(Name("proxstep.rewards", "told_of_truncation"), told)


def _reward_specs(recipe: Recipe) -> list[str]:
    """Return what the recipe names, or the task's own, for which no data is read."""
    return recipe.task.rewards or list(REWARDS[recipe.task.name])


def _reward_weights(recipe: Recipe) -> list[Any] | None:
    """Return the weights of `_rewards`; None where all are 1."""
    weights = list(recipe.task.reward_weights or [1.0] * len(_reward_specs(recipe)))
    if recipe.rollout.overlong_buffer is not None:
        weights.append(recipe.rollout.overlong_penalty)
    return None if all(weight == 1 for weight in weights) else weights


def _lora(recipe: Recipe) -> Call | None:
    section = recipe.model.lora
    if section is None:
        return None
    keywords = {
        "r": section.rank,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": section.target_modules,
        "task_type": "CAUSAL_LM",
    }
    return Call(Name("peft", "LoraConfig"), keywords)


def _chosen(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not the function's defaults anyhow."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if value != known[name].default}


def _without_defaults(config: Name, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are not the class's defaults anyhow.

    Raises:
        ProxstepError: If the installed release lacks one.
    """
    fields = {field.name: field.default for field in dataclasses.fields(make(config, 1))}
    lacking = [name for name in options if name not in fields]
    if lacking:
        found = f"TRL {version('trl')} with transformers {version('transformers')}"
        raise ProxstepError(
            f"{found} has no option {lacking[0]}, which the recipe needs: "
            'pip install -U "proxstep[trl]"'
        )
    return {name: value for name, value in options.items() if value != fields[name]}

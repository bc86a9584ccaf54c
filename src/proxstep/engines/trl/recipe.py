"""A recipe in TRL's terms: which trainer, which options, which dataset and rewards."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments

from proxstep.algorithms import LOSSES
from proxstep.config.recipe import Recipe
from proxstep.engines.keys import leaves, refuse
from proxstep.engines.trl.expressions import Call, Code, Name, Shared, make
from proxstep.engines.trl.tables import (
    LOSS_TYPES,
    REFUSALS,
    RENAMED,
    SCALES,
    WITHOUT_RATIO,
    minibatch_size,
)
from proxstep.errors import ProxstepError
from proxstep.rewards import BUILTIN_REWARDS
from proxstep.tasks import REWARDS
from proxstep.training.lifecycle import task_call

PUNISHMENT = "soft_overlong_punishment_reward"
"""The name under which TRL reports what it adds to the reward for length."""


@dataclass(frozen=True)
class Plan:
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


def plan(recipe: Recipe, *, chat: bool | Code) -> Plan:
    """Return what runs a recipe in TRL.

    Args:
        recipe: The recipe.
        chat: Whether the tokenizer has a chat template, or the code that finds out.

    Raises:
        ProxstepError: If TRL cannot do what the recipe says, naming the key and the remedy.
    """
    refuse("trl", recipe, REFUSALS)
    kind = _kind(recipe)
    trainer, config = {
        "Grpo": (Name("trl", "GRPOTrainer"), Name("trl", "GRPOConfig")),
        "Opo": (_OURS("OpoTrainer"), _OURS("OpoConfig")),
        "Isopo": (_OURS("IsopoTrainer"), _OURS("IsopoConfig")),
    }[kind]
    function, options = task_call(recipe, chat=chat)  # type: ignore[arg-type]
    return Plan(
        trainer,
        _model(recipe),
        _rewards(recipe),
        Call(config, _without_defaults(config, _options(recipe, kind))),
        Call(Name("proxstep.tasks", function.__name__), _chosen(function, options)),
        _lora(recipe),
    )


def _OURS(name: str) -> Name:
    return Name("proxstep.engines.trl", name)


def _kind(recipe: Recipe) -> str:
    """Return the first word of the trainer's name."""
    if recipe.geometry.rule != "none" or recipe.objective.name in WITHOUT_RATIO:
        return "Isopo"
    return "Opo" if recipe.objective.name == "opo" else "Grpo"


def _options(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Return the configuration's keyword arguments, in the order in which a script has them."""
    values = leaves(recipe)
    renamed = {option: values[key] for key, option in RENAMED.items() if values[key] is not None}
    if recipe.logging.tracker == "none":
        del renamed["project"]
    tail = ("entropy_coef", "beta", "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps")
    optimization = {name: renamed.pop(name) for name in tail if name in renamed}
    return {
        **_objective(recipe, kind),
        **renamed,
        **_sizes(recipe),
        **optimization,
        **_optimizer(recipe),
        **_precision(recipe),
        "use_bias_correction_kl": recipe.regularizer.kl_coef == 0,
        "reward_weights": _reward_weights(recipe),
        "report_to": recipe.logging.tracker,
        "logging_steps": 1,
    }


def _objective(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Return the options of the loss, of the geometry, and of the advantages."""
    section, rule = recipe.objective, recipe.geometry.rule
    mode = getattr(section, "loss_agg_mode", None)
    found: dict[str, Any] = {}
    if kind == "Isopo":
        loss_type = "reinforce" if section.name in WITHOUT_RATIO else section.name
        given = leaves(recipe.geometry) if rule != "none" else {"rule": "reinforce"}
        found = {"rule": given.pop("rule"), "loss_type": loss_type, **given}
        found.pop("diagnose_every", None)
        if mode != LOSSES[loss_type].default_loss_agg_mode:
            found["loss_agg_mode"] = mode
    if section.name == "opo":
        found |= {k: v for k, v in leaves(section).items() if k not in ("name", "advantage")}
    if kind == "Grpo":
        assert mode is not None  # every objective of PLAIN has one
        found["loss_type"] = "cispo" if section.name == "cispo" else LOSS_TYPES[mode]
        if section.name == "gspo":
            found["importance_sampling_level"] = "sequence"
    if section.name == "cispo":  # the weight's cap itself
        found["epsilon_high"] = 1 + section.clip_ratio_high
    elif hasattr(section, "clip_ratio_low"):
        low, high = section.clip_ratio_low, section.clip_ratio_high  # type: ignore[union-attr]
        found |= {"epsilon": low, "epsilon_high": None if high == low else high}
    return found | {"scale_rewards": SCALES[section.advantage]}


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
            per_rollout = dataclasses.replace(accumulation, count=count)
    every = recipe.logging.checkpoint_every or recipe.steps
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_rollout,
        "num_iterations": update.num_iterations,
        "max_steps": recipe.steps * recipe.update.num_updates,
        "save_steps": every * recipe.update.num_updates,
    }


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    section = recipe.optimizer
    schedule = "constant_with_warmup" if section.warmup_updates else "constant"
    found: dict[str, Any] = {"lr_scheduler_type": schedule}
    found["max_grad_norm"] = section.max_grad_norm or 0.0
    if section.name == "sgd":
        found["optim"] = "sgd"
        if section.momentum is not None:
            found["optim_args"] = f"momentum={section.momentum}"
    if section.betas is not None:
        found["adam_beta1"], found["adam_beta2"] = section.betas
    return found


def _precision(recipe: Recipe) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    renamed = "activation_checkpointing" in fields  # in transformers 5.23
    return {
        "bf16": recipe.model.autocast == "bfloat16",
        "model_init_kwargs": {"dtype": "bfloat16"} if recipe.model.dtype == "bfloat16" else None,
        "activation_checkpointing" if renamed else "gradient_checkpointing": False,
        "use_cpu": recipe.device == "cpu",
        "dataloader_pin_memory": False,
    }


def _model(recipe: Recipe) -> str | Call:
    if recipe.model.name != "embedded":
        return recipe.model.name
    warmed_up = Name("proxstep.training.demo_model", "ensure_embedded_model")
    return Call(
        warmed_up, {"difficulty": recipe.task.difficulty, "score": recipe.model.warmup_score}
    )


def _rewards(recipe: Recipe) -> list[Name | Call]:
    """Return the reward functions; what the recipe adds for length comes last."""
    specs = _reward_specs(recipe)
    found: list[Name | Call] = [
        Name("proxstep.rewards", spec)
        if spec in BUILTIN_REWARDS
        else Call(Name("proxstep.rewards", "load_reward"), {"spec": spec})
        for spec in specs
    ]
    section = recipe.rollout
    if section.overlong_buffer is not None:
        punishment = Name("trl.rewards", "get_soft_overlong_punishment")
        lengths = {"max_completion_len": section.max_completion_length}
        lengths["soft_punish_cache"] = section.overlong_buffer
        found.append(Call(punishment, lengths))
    return found


def _reward_specs(recipe: Recipe) -> list[str]:
    """Return what the recipe names, or the task's own, for which no data is read."""
    return recipe.task.rewards or list(REWARDS[recipe.task.name])


def reward_factor(recipe: Recipe) -> float:
    """Return what rewards are multiplied by, so that centered ones are leave-one-out's."""
    count = recipe.rollout.num_generations
    return count / (count - 1) if recipe.objective.advantage == "leave-one-out" else 1.0


def _reward_weights(recipe: Recipe) -> list[Any] | None:
    """Return the weights of `_rewards`; None where all are 1."""
    weights = list(recipe.task.reward_weights or [1.0] * len(_reward_specs(recipe)))
    if recipe.rollout.overlong_buffer is not None:
        weights.append(recipe.rollout.overlong_penalty)
    weights = [weight * reward_factor(recipe) for weight in weights]
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

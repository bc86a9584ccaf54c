"""What of verl's options ISOPO and a KL budget do not go with, by name and with the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from verl.utils.torch_dtypes import PrecisionType

from proxstep.algorithms import ALGORITHMS
from proxstep.config.geometry import GeometrySection
from proxstep.engines.fields import Refusal, refuse_together
from proxstep.engines.verl.policy_loss import check_config
from proxstep.engines.verl.seams import LIBRARY, loss_mode
from proxstep.errors import ProxstepError
from proxstep.isopo import IsometricRule, Rule

VERLS_SEQUENCE_LOSSES = ("gpg", "gspo", "bypass_mode")
"""Those of verl's policy losses whose gradient is one number for a response.

They are so under each of verl's aggregations. gpg is REINFORCE; bypass_mode is, with
loss_type=reinforce.
"""

_ACTOR, _MODEL, _ENGINE = (
    f"actor_rollout_ref.{part}" for part in ("actor.", "model.", "actor.fsdp_config.")
)
_BUDGET = "kl_budget"
_HEAD = "the fused output layer bypasses the layer whose gradient ISOPO transforms; set "
_WHOLE = "ISOPO needs whole sequences; set it to 1"
_HALF = "float16 needs a gradient scaler, whose factor would enter ISOPO's norms; use bf16 or fp32"


def _on(option: str, reason: str) -> Refusal:
    """Return the refusal of an option that is switched on, or above 1."""

    def applies(config: Mapping[str, Any]) -> bool:
        value: Any = config
        for part in option.split("."):
            value = value[part]
        return value > 1 if type(value) is int else bool(value)

    return option, applies, reason


def _half(option: str, of_config: Callable[[Any], Any]) -> Refusal:
    return option, lambda config: PrecisionType.is_fp16(of_config(config)), _HALF


ACTOR = (
    _on("use_fused_kernels", f"{_HEAD}{_MODEL}use_fused_kernels=False"),
    _on("ulysses_sequence_parallel_size", _WHOLE),
    _on("use_prefix_grouper", "it shares a prompt's positions between sequences; set it to False"),
    _on("calculate_sum_pi_squared", "it is for advantages of every token; set it to False"),
)
ENGINE = (
    _on("ulysses_sequence_parallel_size", _WHOLE),
    _half("mixed_precision", lambda engine: dict(engine.mixed_precision or {}).get("param_dtype")),
    _half("model_dtype", lambda engine: engine.model_dtype),
    _on("qat.enable", "it replaces the linear layers that ISOPO transforms; set it to False"),
)
MODEL = (
    _on("use_fused_kernels", f"{_HEAD}it to False"),
    _on("use_liger", "its kernels replace layers that ISOPO transforms; set it to False"),
    _on("tiled_mlp.enabled", "it runs the linear layers on parts of a sequence; set it to False"),
    _on("enable_activation_offload", "it was not tested; use enable_gradient_checkpointing"),
    _on("mtp.enable", "its layers are trained by a loss of their own; set it to False"),
)

_DROWNS = (
    "in half precision the differences of log-probabilities that it measures drown in rounding "
    "errors; "
)
_FULL = (
    "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}' (quoted, for the shell; without a "
    "value verl computes in bfloat16)"
)


def _is_float32(name: Any) -> bool:
    return PrecisionType.to_dtype(name) == torch.float32


BUDGET_ACTOR = (
    _on("use_fused_kernels", f"it was not tested; set {_MODEL}use_fused_kernels=False"),
    _on("ulysses_sequence_parallel_size", "it was not tested; set it to 1"),
    _on("use_prefix_grouper", "the step is judged by single sequences; set it to False"),
)
BUDGET_ENGINE: tuple[Refusal, ...] = (
    _on("ulysses_sequence_parallel_size", "it was not tested; set it to 1"),
    (
        "model_dtype",
        lambda engine: not _is_float32(engine.model_dtype),
        f"{_DROWNS}set it to fp32",
    ),
    (
        "mixed_precision",
        lambda engine: not _is_float32((engine.mixed_precision or {}).get("param_dtype", "bf16")),
        f"{_DROWNS}set '+{_ENGINE}mixed_precision={_FULL}",
    ),
    _on("qat.enable", "it rounds the weights that are measured; set it to False"),
)
BUDGET_MODEL = (
    _on("use_fused_kernels", "it was not tested; set it to False"),
    _on("enable_activation_offload", "it was not tested; use enable_gradient_checkpointing"),
    _on("mtp.enable", "its layers are trained and not judged; set it to False"),
)


def sequence_losses() -> list[str]:
    """Return the policy losses that have one coefficient per sequence."""
    own = (loss_mode(found) for found in ALGORITHMS.values() if found.level == "sequence")
    return [*VERLS_SEQUENCE_LOSSES, *own]


def refuse_actor(actor: Any, section: GeometrySection, rule: Rule) -> None:
    """Refuse what the actor's configuration shows, before any process is started.

    Args:
        actor: verl's FSDPActorConfig.
        section: ISOPO's keys.
        rule: What they describe.

    Raises:
        ProxstepError: If an option is set that cannot work.
    """
    refuse_together("ISOPO", actor, ACTOR, _ACTOR)
    refuse_together("ISOPO", actor.fsdp_config, ENGINE, _ENGINE)
    if actor.use_dynamic_bsz and not isinstance(rule, IsometricRule):
        raise ProxstepError(
            f"{_ACTOR}use_dynamic_bsz and geometry.rule {section.rule} do not go together: the "
            "rule mixes a micro-batch's sequences, which would be as many as their lengths allow; "
            "set it to False, or choose an isometric rule, such as isopo"
        )
    loss = actor.policy_loss
    if loss.loss_mode not in sequence_losses():
        raise ProxstepError(
            f"{_ACTOR}policy_loss.loss_mode is {loss.loss_mode!r}; ISOPO needs one coefficient per "
            "sequence, which a token-level objective does not have: use "
            f"{', '.join(sequence_losses())} (gpg is REINFORCE)"
        )
    ours = {loss_mode(found): found for found in ALGORITHMS.values()}
    if loss.loss_mode in ours:
        check_config(loss, ours[loss.loss_mode])
    kind = loss.rollout_correction["loss_type"]
    if loss.loss_mode == "bypass_mode" and kind != "reinforce":
        raise ProxstepError(
            f"{_ACTOR}policy_loss.rollout_correction.loss_type is {kind!r}, a token-level "
            "objective, and ISOPO needs one coefficient per sequence: use reinforce"
        )


def refuse_budget(actor: Any) -> None:
    """Refuse what the configuration of an actor with a KL budget shows, before any process.

    Raises:
        ProxstepError: If an option is set with which a step cannot be judged.
    """
    refuse_together(_BUDGET, actor, BUDGET_ACTOR, _ACTOR)
    refuse_together(_BUDGET, actor.fsdp_config, BUDGET_ENGINE, _ENGINE)


def refuse_updates(actor: Any, train_batch_size: int) -> None:
    """Refuse a wrong number of optimizer steps that share a rollout's budget.

    Args:
        actor: Our actor configuration.
        train_batch_size: Prompts of a rollout.

    Raises:
        ProxstepError: Naming the right one.
    """
    number = math.ceil(train_batch_size / actor.ppo_mini_batch_size) * actor.ppo_epochs
    if actor.kl_num_updates != number:
        raise ProxstepError(
            f"{_ACTOR}kl_num_updates is {actor.kl_num_updates}, but a rollout gives {number} "
            "optimizer steps (data.train_batch_size / ppo_mini_batch_size * ppo_epochs), which "
            f"share its KL budget: set +{_ACTOR}kl_num_updates={number}"
        )


def refuse_command(model: Any, *, isopo: bool, budget: bool) -> None:
    """Refuse what the command line's model section shows, before any process is started.

    Args:
        model: `actor_rollout_ref.model`.
        isopo: Whether the actor is ISOPO's.
        budget: Whether it has a KL budget.

    Raises:
        ProxstepError: If an option is set that cannot work, or our library is not loaded.
    """
    if not model["external_lib"]:
        raise ProxstepError(
            f"{_MODEL}external_lib is not set, so verl's processes would not know the actor's "
            f"strategy: set {_MODEL}external_lib={LIBRARY}"
        )
    _refuse_model(model, isopo, budget)


def refuse_engine(model: Any, engine: Any, *, isopo: bool, budget: bool) -> None:
    """Refuse what only the engine sees, before the model is built.

    Args:
        model: verl's HFModelConfig.
        engine: verl's FSDPEngineConfig.
        isopo: Whether it is ISOPO's.
        budget: Whether it has a KL budget.

    Raises:
        ProxstepError: If an option is set that cannot work.
    """
    _refuse_model(model, isopo, budget)
    if isopo:
        refuse_together("ISOPO", engine, ENGINE, _ENGINE)
    if budget:
        refuse_together(_BUDGET, engine, BUDGET_ENGINE, _ENGINE)


def _refuse_model(model: Any, isopo: bool, budget: bool) -> None:
    if isopo:
        refuse_together("ISOPO", model, MODEL, _MODEL)
    if budget:
        refuse_together(_BUDGET, model, BUDGET_MODEL, _MODEL)

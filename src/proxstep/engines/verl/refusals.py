"""What of verl's options ISOPO cannot go together with, by name and with the remedy."""

from __future__ import annotations

from typing import Any

from verl.utils.torch_dtypes import PrecisionType

from proxstep.algorithms import ALGORITHMS
from proxstep.config.sections import GeometrySection
from proxstep.engines.fields import Refusal, refuse_with_isopo
from proxstep.engines.verl.seams import loss_mode
from proxstep.errors import ProxstepError
from proxstep.isopo import NaturalRule, Rule

VERLS_SEQUENCE_LOSSES = ("gpg", "gspo", "bypass_mode")
"""Those of verl's policy losses whose gradient is one number for a response.

They are so under each of verl's aggregations. gpg is REINFORCE; bypass_mode is, with
loss_type=reinforce.
"""

_ACTOR, _MODEL, _ENGINE = (
    "actor_rollout_ref.actor.",
    "actor_rollout_ref.model.",
    "actor_rollout_ref.actor.fsdp_config.",
)

ACTOR: tuple[Refusal, ...] = (
    (
        "use_fused_kernels",
        lambda actor: actor.use_fused_kernels,
        "the fused output layer bypasses the layer whose gradient ISOPO transforms; set "
        "actor_rollout_ref.model.use_fused_kernels=False",
    ),
    (
        "ulysses_sequence_parallel_size",
        lambda actor: actor.ulysses_sequence_parallel_size > 1,
        "ISOPO needs whole sequences; set it to 1",
    ),
    (
        "use_prefix_grouper",
        lambda actor: actor.use_prefix_grouper,
        "it shares a prompt's positions between sequences; set it to False",
    ),
    (
        "calculate_sum_pi_squared",
        lambda actor: actor.calculate_sum_pi_squared,
        "it is for estimators with an advantage for every token; set it to False",
    ),
)

ENGINE: tuple[Refusal, ...] = (
    (
        "ulysses_sequence_parallel_size",
        lambda engine: engine.ulysses_sequence_parallel_size > 1,
        "ISOPO needs whole sequences; set it to 1",
    ),
    (
        "mixed_precision",
        lambda engine: _computes_in_half(engine),
        "float16 needs a gradient scaler, whose factor would enter ISOPO's norms; use bf16 or fp32",
    ),
    (
        "model_dtype",
        lambda engine: PrecisionType.is_fp16(engine.model_dtype),
        "float16 needs a gradient scaler, whose factor would enter ISOPO's norms; use bf16 or fp32",
    ),
    (
        "qat.enable",
        lambda engine: engine.qat["enable"],
        "it replaces the linear layers that ISOPO transforms; set it to False",
    ),
)

MODEL: tuple[Refusal, ...] = (
    (
        "use_fused_kernels",
        lambda model: model.use_fused_kernels,
        "the fused output layer bypasses the one whose gradient ISOPO transforms; set it to False",
    ),
    (
        "use_liger",
        lambda model: model.use_liger,
        "its kernels replace layers whose gradients ISOPO transforms; set it to False",
    ),
    (
        "tiled_mlp.enabled",
        lambda model: model.tiled_mlp["enabled"],
        "it runs the linear layers on pieces of a sequence; set it to False",
    ),
    (
        "enable_activation_offload",
        lambda model: model.enable_activation_offload,
        "ISOPO was not tested with it; use enable_gradient_checkpointing",
    ),
    (
        "mtp.enable",
        lambda model: model.mtp.enable,
        "its layers are trained by a loss of their own; set it to False",
    ),
)


def _computes_in_half(engine: Any) -> bool:
    precision = engine.mixed_precision or {}
    return "param_dtype" in precision and PrecisionType.is_fp16(precision["param_dtype"])


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
    refuse_with_isopo(actor, ACTOR, _ACTOR)
    refuse_with_isopo(actor.fsdp_config, ENGINE, _ENGINE)
    if actor.use_dynamic_bsz and isinstance(rule, NaturalRule):
        raise ProxstepError(
            "actor_rollout_ref.actor.use_dynamic_bsz and ISOPO's natural rule do not go together: "
            "the rule mixes a micro-batch's sequences, which would be as many as their lengths "
            f"allow; set it to False, or geometry.rule to another one than {section.rule}"
        )
    mode = actor.policy_loss.loss_mode
    if mode not in sequence_losses():
        raise ProxstepError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode is {mode!r}; ISOPO needs one "
            "coefficient per sequence, which a token-level objective does not have: use "
            f"{', '.join(sequence_losses())} (gpg is REINFORCE)"
        )
    kind = actor.policy_loss.rollout_correction["loss_type"]
    if mode == "bypass_mode" and kind != "reinforce":
        raise ProxstepError(
            f"actor_rollout_ref.actor.policy_loss.rollout_correction.loss_type is {kind!r}, a "
            "token-level objective, and ISOPO needs one coefficient per sequence: use reinforce"
        )


def refuse_model(model: Any, engine: Any) -> None:
    """Refuse what only the engine sees, before the model is built.

    Args:
        model: verl's HFModelConfig.
        engine: verl's FSDPEngineConfig.

    Raises:
        ProxstepError: If an option is set that cannot work.
    """
    refuse_with_isopo(model, MODEL, _MODEL)
    refuse_with_isopo(engine, ENGINE, _ENGINE)

"""What of verl's options ISOPO cannot go together with, by name and with the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def refuse_command(model: Any) -> None:
    """Refuse what the command line's model section shows, before any process is started.

    Args:
        model: `actor_rollout_ref.model`.

    Raises:
        ProxstepError: If an option is set that cannot work, or our library is not loaded.
    """
    if not model["external_lib"]:
        raise ProxstepError(
            f"{_MODEL}external_lib is not set, so verl's processes would not know ISOPO: set "
            f"{_MODEL}external_lib={LIBRARY}"
        )
    refuse_together("ISOPO", model, MODEL, _MODEL)


def refuse_model(model: Any, engine: Any) -> None:
    """Refuse what only the engine sees, before the model is built.

    Args:
        model: verl's HFModelConfig.
        engine: verl's FSDPEngineConfig.

    Raises:
        ProxstepError: If an option is set that cannot work.
    """
    refuse_together("ISOPO", model, MODEL, _MODEL)
    refuse_together("ISOPO", engine, ENGINE, _ENGINE)

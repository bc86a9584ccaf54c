"""What of GRPOConfig our trainers do not do, by name and with the remedy."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from proxstep.engines.fields import Refusal
from proxstep.errors import ProxstepError

OTHER_LOSSES = (
    *("epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos"),
    *("vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "off_policy_mask_threshold"),
)
"""Options of TRL's own losses."""
OURS = {"epsilon": "clip_ratio_low", "epsilon_high": "clip_ratio_high"}
"""What some of them are called in our algorithms that have them."""
OF_ADVANTAGES = ("scale_rewards", "multi_objective_aggregation")
"""Options of TRL's advantages, where another kind is not chosen."""

SAMPLES_ALL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "generation_kwargs": (None, {}),
}
"""Values with which the sampler is the policy itself."""

_DEFAULTS = {
    field.name: field.default for field in fields(GRPOConfig) if field.default is not MISSING
}


def refuse_without_effect(args: Any, own_advantage: str | None) -> None:
    """Refuse options of losses and advantages that are not computed.

    Args:
        args: A `PolicyConfig`.
        own_advantage: The kind of advantage that takes the place of TRL's, if any.

    Raises:
        ProxstepError: Naming the option and the remedy.
    """
    of = dict.fromkeys(OTHER_LOSSES, ("TRL's own losses", args.loss_type))
    if own_advantage:
        of |= dict.fromkeys(OF_ADVANTAGES, ("TRL's advantages", own_advantage))
    for name, (whose, ours) in of.items():
        if getattr(args, name) != _DEFAULTS[name]:
            has = OURS.get(name) if OURS.get(name) in args.objective().options() else None
            raise ProxstepError(
                f"{name} is an option of {whose} and has no effect on {ours}: "
                + (f"set {has} instead" if has else "leave it out")
            )


def refuse_sampler(args: Any, *, ratio_to_sampler: bool) -> None:
    """Refuse options under which a loss would see another sampler than it means.

    Args:
        args: A `PolicyConfig`.
        ratio_to_sampler: Whether the algorithm's ratios are to the sampler.

    Raises:
        ProxstepError: Naming the option and the remedy.
    """
    corrects = args.use_vllm and args.vllm_importance_sampling_correction
    mode = args.vllm_importance_sampling_mode
    if corrects and ratio_to_sampler:
        raise ProxstepError(
            f"vllm_importance_sampling_correction would weight {args.loss_type} by what its own "
            "ratios, to the sampler, hold already: set it to False"
        )
    if corrects and not mode.startswith("sequence"):
        raise ProxstepError(
            f"vllm_importance_sampling_mode is {mode!r}, a weight for every token, and our losses "
            "take one for a sequence: use sequence_mask or sequence_truncate"
        )
    for name, whole in SAMPLES_ALL.items() if ratio_to_sampler and not args.use_vllm else ():
        if (value := getattr(args, name)) not in whole:
            raise ProxstepError(
                f"{name} is {value!r}: {args.loss_type}'s ratios are to the sampler, whose "
                "log-probabilities TRL keeps with vLLM alone; leave it out, so that the sampler is "
                "the policy, or set use_vllm=True"
            )


ADAPTERS = ("LORA", "LN_TUNING")
"""PEFT's kinds whose parameters are in layers that ISOPO covers."""


def refuse_adapters(peft_config: Any, model: Any) -> None:
    """Refuse kinds of adapters that ISOPO does not cover, before anything is loaded.

    Args:
        peft_config: Of the adapters that TRL is to add, or None.
        model: The model or its name; it may have adapters already.

    Raises:
        ProxstepError: Naming the kind and what works.
    """
    found = [] if peft_config is None else [peft_config]
    for config in [*found, *getattr(model, "peft_config", {}).values()]:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in ADAPTERS:
            raise ProxstepError(
                f"peft_config is a {type(config).__name__} ({kind}): of PEFT's adapters ISOPO "
                "covers LoraConfig, with rsLoRA and DoRA, and LNTuningConfig; use one of them, or "
                "PolicyTrainer or OpoTrainer, which leave the adapters to TRL"
            )


def refuse_vision(core: Any) -> None:
    """Refuse a trainable vision tower: its layers see patches of images, not tokens.

    Args:
        core: The transformers model.

    Raises:
        ProxstepError: Naming the parts to freeze.
    """
    if core.config.get_text_config() is core.config:
        return
    language = (core.get_decoder(), core.get_input_embeddings(), core.get_output_embeddings())
    tokens = {id(p) for part in language if part is not None for p in part.parameters()}
    others: dict[str, None] = {}
    for name, parameter in core.named_parameters():
        if parameter.requires_grad and id(parameter) not in tokens:
            others[_largest_without(core, name, tokens)] = None
    if others:
        thawed = ", ".join(others)
        freeze = "; ".join(f'model.get_submodule("{n}").requires_grad_(False)' for n in others)
        raise ProxstepError(
            f"{thawed} of {type(core).__name__} would be trained, and ISOPO covers the language "
            f"model alone: freeze the vision tower before you make the trainer ({freeze}), and "
            "keep adapters out of it with exclude_modules"
        )


def _largest_without(core: Any, name: str, tokens: set[int]) -> str:
    """Return the largest part of the model that holds a parameter and none of the tokens'."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count])
        if not any(id(p) in tokens for p in core.get_submodule(prefix).parameters()):
            return prefix
    return name


def _launched_with(name: str, *without: str) -> bool:
    """Whether `accelerate launch` asks for something that no option of the configuration shows."""
    return os.environ.get(f"ACCELERATE_{name}", "").lower() not in ("", "false", "no", *without)


def _uses_fp16(args: Any) -> bool:
    return args.fp16 or (not args.bf16 and _launched_with("MIXED_PRECISION", "bf16"))


def _uses_deepspeed(args: Any) -> bool:
    return bool(args.deepspeed) or _launched_with("USE_DEEPSPEED")


def _uses_fsdp(args: Any) -> bool:
    return bool(args.fsdp) or _launched_with("USE_FSDP")


def _steps_in_backward(args: Any) -> bool:
    return any(name in str(args.optim).lower() for name in ("lomo", "layerwise"))


def _uses_kernels(args: Any) -> bool:
    options = args.model_init_kwargs
    return isinstance(options, dict) and bool(options.get("use_kernels"))


ISOPO: tuple[Refusal, ...] = (
    (
        "fp16",
        _uses_fp16,
        "its gradient scaler's factor would enter ISOPO's norms; use bf16, or fp16=False with "
        "bf16=False for float32",
    ),
    (
        "use_liger_kernel",
        lambda args: args.use_liger_kernel,
        "its kernels bypass the layers whose gradients ISOPO transforms; turn it off",
    ),
    (
        "model_init_kwargs",
        _uses_kernels,
        "use_kernels replaces the layers whose gradients ISOPO transforms; leave it out",
    ),
    (
        "cast_lm_head_to_fp32",
        lambda args: args.cast_lm_head_to_fp32,
        "it replaces the output layer's forward, which ISOPO needs; turn it off (since TRL 1.15 "
        "log-probabilities are computed in float32 either way)",
    ),
    (
        "torch_compile",
        lambda args: args.torch_compile or _launched_with("DYNAMO_BACKEND"),
        "the compiled model would bypass ISOPO's output layer; turn it off",
    ),
    (
        "deepspeed",
        _uses_deepspeed,
        "ISOPO was not tested with it; use DDP",
    ),
    (
        "fsdp",
        _uses_fsdp,
        "ISOPO was not tested with it in TRL; use DDP",
    ),
    (
        "megatron_lm",
        lambda args: _launched_with("USE_MEGATRON_LM"),
        "its layers are not those that ISOPO transforms; use DDP",
    ),
    (
        "parallelism_config",
        lambda args: (
            args.parallelism_config is not None or _launched_with("USE_PARALLELISM_CONFIG")
        ),
        "ISOPO needs whole sequences and whole layers; use DDP",
    ),
    (
        "use_adaptive_entropy",
        lambda args: args.use_adaptive_entropy,
        "its controller would measure every batch twice; use a fixed entropy_coef",
    ),
    (
        "optim",
        _steps_in_backward,
        "it updates weights during backward, before the gradient is whole; use another optimizer",
    ),
)

BUDGET: tuple[Refusal, ...] = (
    (
        "fp16",
        _uses_fp16,
        "its gradient scaler would step the optimizer in its own way; use bf16, or fp16=False with "
        "bf16=False for float32",
    ),
    (
        "deepspeed",
        _uses_deepspeed,
        "its engine owns the optimizer's step; use DDP",
    ),
    (
        "fsdp",
        _uses_fsdp,
        "it was not tested with it in TRL; use DDP",
    ),
    (
        "optim",
        _steps_in_backward,
        "it updates weights during backward, before there is a step to scale; use another "
        "optimizer",
    ),
    (
        "optim",
        lambda args: "schedule_free" in str(args.optim).lower(),
        "it keeps weights of its own, which would take the whole step; use another optimizer",
    ),
)

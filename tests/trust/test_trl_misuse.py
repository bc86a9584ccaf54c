"""TRL's trainers used in ways that do not work: each is refused by name before anything is loaded.

The model's name stands for none, so that a check that came after the loading would be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from trl import GRPOConfig

from proxstep.engines.trl import (
    IsopoConfig,
    IsopoTrainer,
    OpoConfig,
    OpoTrainer,
    PolicyConfig,
    PolicyTrainer,
)
from proxstep.errors import ProxstepError
from tests.engines.trl_case import SIZES, dataset, quiet, text_reward

PROJECTION = {"target_modules": ["q_proj"]}
PROMPT = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("VeraConfig", PROJECTION),
    ("LoHaConfig", PROJECTION),
    ("LoKrConfig", PROJECTION),
    ("IA3Config", {**PROJECTION, "feedforward_modules": []}),
    ("OFTConfig", PROJECTION),
    ("BOFTConfig", {**PROJECTION, "boft_block_size": 2}),
    ("AdaLoraConfig", {**PROJECTION, "total_step": 10}),
    ("FourierFTConfig", PROJECTION),
    ("HRAConfig", PROJECTION),
    ("VBLoRAConfig", PROJECTION),
    ("PromptTuningConfig", PROMPT),
    ("PrefixTuningConfig", PROMPT),
    ("PromptEncoderConfig", PROMPT),
]

ENVIRONMENTS = {
    "ACCELERATE_MIXED_PRECISION": ("fp16", "fp16"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "torch_compile"),
    "ACCELERATE_USE_FSDP": ("true", "fsdp"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "megatron_lm"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "parallelism_config"),
}

Case = tuple[Any, dict[str, Any], str]
OPTIONS: list[Case] = [
    (PolicyConfig, {}, "loss_type"),
    (PolicyConfig, {"loss_type": "GRPO"}, "loss_type"),
    (PolicyConfig, {"loss_type": "dr_grpo"}, "loss_type"),
    (PolicyConfig, {"loss_type": "grpo", "epsilon": 0.3}, "epsilon"),
    (PolicyConfig, {"loss_type": "grpo", "top_entropy_quantile": 0.2}, "top_entropy_quantile"),
    (PolicyConfig, {"loss_type": "gspo", "importance_sampling_level": "sequence"}, "importance"),
    (PolicyConfig, {"loss_type": "rloo", "scale_rewards": "none"}, "scale_rewards"),
    (PolicyConfig, {"loss_type": "grpo", "alpha": 0.1}, "alpha"),
    (PolicyConfig, {"loss_type": "dppo-tv", "top_p": 0.9}, "top_p"),
    (PolicyConfig, {"loss_type": "grpo", "loss_agg_mode": "mean"}, "loss_agg_mode"),
    (PolicyConfig, {"loss_type": "grpo", "advantage": "zscore"}, "advantage"),
    (OpoConfig, {"loss_type": "grpo"}, "loss_type"),
    (OpoConfig, {"mu": "large"}, "mu"),
    (OpoConfig, {"alpha": float("nan")}, "alpha"),
    (OpoConfig, {"delta": 4.0}, "delta"),
    (OpoConfig, {"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
    (IsopoConfig, {"loss_type": "grpo"}, "loss_type"),
    (IsopoConfig, {"rule": "none"}, "rule"),
    (IsopoConfig, {"rule": "isopo-natural", "damping": 1.0}, "damping"),
    (IsopoConfig, {"num_overlap_positions": -1}, "num_overlap_positions"),
    (IsopoConfig, {"num_overlap_positions": "many"}, "num_overlap_positions"),
    (IsopoConfig, {"overlap_source": "anywhere"}, "overlap_source"),
    (IsopoConfig, {"decay": 1.5}, "decay"),
    (IsopoConfig, {"memory_mib": 0}, "memory_mib"),
    (IsopoConfig, {"fp16": True}, "fp16"),
    (IsopoConfig, {"use_liger_kernel": True}, "use_liger_kernel"),
    (IsopoConfig, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    (IsopoConfig, {"torch_compile": True}, "torch_compile"),
    (IsopoConfig, {"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    (IsopoConfig, {"optim": "lomo"}, "optim"),
    (IsopoConfig, {"model_init_kwargs": {"use_kernels": True}}, "model_init_kwargs"),
]
TRAINERS: list[tuple[Any, Any, str]] = [
    (PolicyTrainer, GRPOConfig, "PolicyConfig"),
    (OpoTrainer, GRPOConfig, "OpoConfig"),
    (IsopoTrainer, GRPOConfig, "IsopoConfig"),
    (IsopoTrainer, OpoConfig, "IsopoConfig"),
    (OpoTrainer, IsopoConfig, "OpoConfig"),
    (PolicyTrainer, IsopoConfig, "IsopoTrainer"),
]


def config(config_class: Any, folder: Path, **options: Any) -> Any:
    with quiet():
        return config_class(str(folder), **(SIZES | options))


def refused(named: str, make: Callable[[], Any]) -> str:
    """The one sentence that refuses it; anything else fails the test."""
    with quiet(), pytest.raises(ProxstepError, match=named) as found:
        make()
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(("kind", "options"), ADAPTERS, ids=[kind for kind, _ in ADAPTERS])
def test_adapters(
    tmp_path: Path, counted: Callable[..., None], kind: str, options: dict[str, Any]
) -> None:
    """Those that ISOPO does not cover; the message says which it does."""
    adapters, args = getattr(peft, kind)(**options), config(IsopoConfig, tmp_path)
    text = refused(
        kind,
        lambda: IsopoTrainer("no/model", text_reward, args, dataset(), peft_config=adapters),
    )
    assert "LoraConfig" in text
    positional = [None] * 6  # peft_config is the eleventh argument of GRPOTrainer
    refused(
        kind,
        lambda: IsopoTrainer(*("no/model", text_reward, args, dataset()), *positional, adapters),
    )
    counted("TRL: misuse", 2)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_accelerate_launch_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None], name: str
) -> None:
    """No option of the configuration shows it."""
    value, named = ENVIRONMENTS[name]
    args = config(IsopoConfig, tmp_path)
    monkeypatch.setenv(name, value)
    refused(named, lambda: IsopoTrainer("no/model", text_reward, args, dataset()))
    counted("TRL: misuse", 1)


@pytest.mark.parametrize(("config_class", "options", "named"), OPTIONS)
def test_options(
    tmp_path: Path, counted: Callable[..., None], config_class: Any, options: Any, named: str
) -> None:
    refused(named, lambda: config(config_class, tmp_path, **options))
    counted("TRL: misuse", 1)


@pytest.mark.parametrize(("trainer_class", "config_class", "named"), TRAINERS)
def test_another_trainer_s_configuration(
    tmp_path: Path, counted: Callable[..., None], trainer_class: Any, config_class: Any, named: str
) -> None:
    args = config(config_class, tmp_path)
    refused(named, lambda: trainer_class("no/model", text_reward, args, dataset()))
    counted("TRL: misuse", 1)

"""Every option of GRPOConfig and every argument of GRPOTrainer: passed on, or refused by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.engines.trl_case import SIZES, dataset, made, quiet, text_reward, tiny, trained
from tests.selection import slow
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, TrlParser

from proxstep.algorithms import ALGORITHMS, Algorithm
from proxstep.engines.fields import option_name
from proxstep.engines.trl import (
    IsopoConfig,
    IsopoTrainer,
    OpoConfig,
    OpoTrainer,
    PolicyConfig,
    PolicyTrainer,
)
from proxstep.engines.trl.configs import TRL_OPTIONS
from proxstep.errors import ProxstepError

CONFIGS = [OpoConfig, IsopoConfig]
TRAINERS = [OpoTrainer, IsopoTrainer]

REFUSED_BY_BOTH: dict[str, Any] = {
    "loss_type": "dr_grpo",
    "epsilon": 0.3,
    "epsilon_high": 0.28,
    "delta": 4.0,
    "sapo_temperature_neg": 1.1,
    "sapo_temperature_pos": 1.1,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
    "importance_sampling_level": "sequence",
    "top_entropy_quantile": 0.2,
    "off_policy_mask_threshold": 0.5,
}
REFUSED_BY_ISOPO: dict[str, dict[str, Any]] = {
    "fp16": {"fp16": True},
    "use_liger_kernel": {"use_liger_kernel": True},
    "model_init_kwargs": {"model_init_kwargs": {"use_kernels": True}},
    "cast_lm_head_to_fp32": {"cast_lm_head_to_fp32": True},
    "torch_compile": {"torch_compile": True},
    "torch_compile_backend": {"torch_compile_backend": "eager"},
    "torch_compile_mode": {"torch_compile_mode": "default"},
    "fsdp": {"fsdp": "full_shard"},
    "use_adaptive_entropy": {"use_adaptive_entropy": True},
    "optim": {"optim": "lomo"},
}
REFUSED_BY_ISOPO_UNTESTED = {"deepspeed", "parallelism_config"}
"""Options whose values need an installation that is not here; refused by the same table."""


def config(config_class: Any, folder: Path, **options: Any) -> Any:
    with quiet():
        return config_class(str(folder), **(SIZES | options))


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_options_of_other_losses(tmp_path: Path, config_class: Any, name: str) -> None:
    with pytest.raises(ProxstepError, match=name):
        config(config_class, tmp_path, **{name: REFUSED_BY_BOTH[name]})


@pytest.mark.parametrize("name", REFUSED_BY_ISOPO)
def test_what_isopo_refuses(tmp_path: Path, name: str) -> None:
    named = "torch_compile" if name.startswith("torch_compile") else name
    with pytest.raises(ProxstepError, match=named):
        config(IsopoConfig, tmp_path, **REFUSED_BY_ISOPO[name])


@pytest.mark.parametrize("config_class", CONFIGS)
def test_weights_per_token_are_refused(tmp_path: Path, config_class: Any) -> None:
    with pytest.raises(ProxstepError, match="vllm_importance_sampling_mode"):
        config(config_class, tmp_path, use_vllm=True, vllm_importance_sampling_mode="token_mask")


@pytest.mark.parametrize("loss_type", ALGORITHMS)
def test_isopo_takes_sequence_level_algorithms(tmp_path: Path, loss_type: str) -> None:
    if ALGORITHMS[loss_type].level == "sequence":
        assert config(IsopoConfig, tmp_path, loss_type=loss_type).objective().name == loss_type
        return
    with pytest.raises(ProxstepError, match="one coefficient per sequence"):
        config(IsopoConfig, tmp_path, loss_type=loss_type)


@pytest.mark.parametrize(
    ("loss_type", "message"),
    [
        ("", "loss_type is missing, the algorithm's name: one of reinforce, grpo"),
        ("dr_grpo", "loss_type is 'dr_grpo'.*Choices"),
        ("bnpo", "loss_type is 'bnpo'.*Choices"),
        ("isopo", r'loss_type is \'isopo\', which is a rule.*IsopoConfig\(rule="isopo"\)'),
    ],
)
def test_a_loss_type_that_is_no_algorithm(tmp_path: Path, loss_type: str, message: str) -> None:
    """No default takes its place."""
    with pytest.raises(ProxstepError, match=message):
        config(PolicyConfig, tmp_path, loss_type=loss_type)
    with pytest.raises(ProxstepError, match="loss_type is missing"), quiet():
        PolicyTrainer("some/model", text_reward)


@pytest.mark.parametrize("name", ["scale_rewards", "multi_objective_aggregation"])
def test_options_of_trl_s_advantages(tmp_path: Path, name: str) -> None:
    """They act where the algorithm's advantage is TRL's, and are refused where it is another."""
    value = {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"}[name]
    for loss_type, advantage in (("rloo", None), ("grpo", "batch-normalized")):
        options = {name: value, "loss_type": loss_type, "advantage": advantage}
        with pytest.raises(ProxstepError, match=f"{name} is an option of TRL's advantages"):
            config(PolicyConfig, tmp_path, **options)
    assert getattr(config(PolicyConfig, tmp_path, loss_type="grpo", **{name: value}), name) == value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rule": "isop"}, "rule is 'isop'"),
        ({"rule": "none"}, "rule"),
        ({"ntk_damping": 1.0}, "ntk_damping is not an option of isopo"),
        ({"num_overlap_positions": 0}, "num_overlap_positions is 0"),
        ({"alpha": 0.2}, "alpha is an option of opo, not of reinforce"),
        ({"loss_type": "gspo", "objective_beta": 1.0}, "objective_beta is an option of dro"),
        ({"loss_type": "gspo", "clip_ratio_low": -1.0}, "clip_ratio_low is -1.0"),
        ({"loss_type": "opo", "drive": "hard"}, "drive is 'hard'"),
        ({"loss_type": "opo", "tau_min": 0.5}, "tau_min"),
        ({"advantage": "best"}, "advantage is 'best'"),
        ({"loss_type": "opo", "alpha": 2.0}, "alpha is 2.0"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode"),
        ({"loss_type": "opo", "mu": "big"}, "mu is 'big'"),
    ],
)
def test_our_keys_are_checked(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ProxstepError, match=named):
        config(IsopoConfig, tmp_path, **options)


# -- what is passed on -----------------------------------------------------------------------------

OURS = {field.name for field in dataclasses.fields(IsopoConfig)} - {
    field.name for field in dataclasses.fields(GRPOConfig)
}
VALUES: dict[str, dict[str, Any]] = {
    "num_generations": {"num_generations": 2},
    "num_generations_eval": {"num_generations_eval": 2},
    "generation_batch_size": {"generation_batch_size": 8},
    "pad_to_multiple_of": {"pad_to_multiple_of": 4},
    "use_transformers_continuous_batching": {"use_transformers_continuous_batching": True},
    "log_completions_hub_repo": {"log_completions": True, "log_completions_hub_repo": "a/b"},
    "multi_objective_aggregation": {"multi_objective_aggregation": "normalize_then_sum"},
    "scale_rewards": {"scale_rewards": "none"},
    "vllm_importance_sampling_mode": {"vllm_importance_sampling_mode": "sequence_truncate"},
    "vllm_importance_sampling_clip_min": {"vllm_importance_sampling_clip_min": 0.1},
    "vllm_mode": {"vllm_mode": "server"},
    "vllm_model_impl": {"vllm_model_impl": "transformers"},
}


def of_grpo() -> list[str]:
    """The options that GRPOConfig adds to transformers', which we leave to it."""
    own = {field.name for field in dataclasses.fields(GRPOConfig)}
    own -= {field.name for field in dataclasses.fields(GRPOConfig.__mro__[2])}
    return sorted(own - set(REFUSED_BY_BOTH) - set(REFUSED_BY_ISOPO))


def other_value(field: dataclasses.Field[Any]) -> Any:
    """A value that is not the default, by the field's type."""
    # A text, unless a parser has resolved it in place: then "typing.Optional[int]" or "<class...".
    kind = re.sub(r"^(typing\.\w+\[|<class ')", "", str(field.type))
    default = field.default
    if isinstance(default, bool) or kind.startswith("bool"):
        return not default
    if "dict" in kind:
        return {"a": 1}
    if "list[float]" in kind:
        return [1.0]
    if isinstance(default, int) or kind.startswith("int"):
        return (default or 0) + 2
    if isinstance(default, float) or kind.startswith("float"):
        return (default or 0.0) + 0.25
    return "other"


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("name", of_grpo())
def test_options_are_passed_on(tmp_path: Path, config_class: Any, name: str) -> None:
    """An option gives the same configuration as in TRL, field by field."""
    field = next(field for field in dataclasses.fields(GRPOConfig) if field.name == name)
    options = VALUES[name] if name in VALUES else {name: other_value(field)}
    found = config(config_class, tmp_path, **options)
    expected = config(GRPOConfig, tmp_path, **options)
    assert getattr(found, name) != field.default
    for each in dataclasses.fields(GRPOConfig):
        if each.name not in ("loss_type", "logging_dir"):
            assert str(getattr(found, each.name)) == str(getattr(expected, each.name)), each.name


def test_every_option_is_known() -> None:
    """What neither TRL's nor our configuration has cannot be refused, and nothing is forgotten."""
    everything = {field.name for field in dataclasses.fields(GRPOConfig)}
    refused = set(REFUSED_BY_BOTH) | set(REFUSED_BY_ISOPO) | REFUSED_BY_ISOPO_UNTESTED
    assert refused <= everything
    assert not OURS & everything
    trainer = set(inspect.signature(GRPOTrainer.__init__).parameters) - {"self"}
    assert trainer == set(ARGUMENTS)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)
def test_every_algorithm_s_keys_are_options(tmp_path: Path, algorithm: Algorithm) -> None:
    """With their sentences and defaults, which TRL's command line shows."""
    fields = {field.name: field for field in dataclasses.fields(PolicyConfig)}
    shown = command_line_help()
    for key, described in algorithm.keys.items():
        field = fields[option_name(key, TRL_OPTIONS)]
        assert field.default is None
        assert described.help in field.metadata["help"].replace("%%", "%")
        assert str(algorithm.defaults[key]) in field.metadata["help"]
        assert f"--{field.name}" in shown
    found = config(PolicyConfig, tmp_path, loss_type=algorithm.name).objective()
    assert found.options() == algorithm.defaults
    assert found.advantage == algorithm.advantage


@functools.cache
def command_line_help() -> str:
    return TrlParser(PolicyConfig).format_help()


def test_our_keys_come_from_a_command_line(tmp_path: Path) -> None:
    with quiet():
        (found,) = TrlParser(IsopoConfig).parse_args_and_config(
            f"--output_dir {tmp_path} --loss_type opo --mu 2.5 --rule isopo-npg --bf16 False "
            "--num_overlap_positions 7 --use_cpu True".split()
        )
    assert (found.objective().mu, found.rule) == (2.5, "isopo-npg")
    assert found.geometry().num_overlap_positions == 7


# -- options that act where we step in, in real steps ----------------------------------------------

ACTIVE: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.1, "lora": True},
    "beta, several iterations": {"beta": 0.1, "lora": True, "num_iterations": 2, "max_steps": 2},
    "sync_ref_model": {"beta": 0.0},
    "entropy_coef": {"entropy_coef": 0.1},
    "mask_truncated_completions": {
        "mask_truncated_completions": True,
        "max_completion_length": 5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
    },
    "all completions masked": {
        "mask_truncated_completions": True,
        "max_completion_length": 2,
        "generation_kwargs": {"suppress_tokens": [0, 1]},  # padding and end
    },
    "temperature": {"temperature": 0.7},
    "scale_rewards": {"scale_rewards": "batch"},
    "steps_per_generation": {"steps_per_generation": 2, "max_steps": 2},
    "a completion twice in a step": {"steps_per_generation": 2, "num_iterations": 2},
    "bf16": {"bf16": True},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
    "num_generations_eval": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_generations_eval": 2,
        "per_device_eval_batch_size": 4,
        "eval_dataset": True,
    },
    "neftune_noise_alpha": {"neftune_noise_alpha": 0.1},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "log_completions": {"log_completions": True},
}
FAST_ACTIVE = {
    ("beta", IsopoTrainer),
    ("mask_truncated_completions", OpoTrainer),
    ("a completion twice in a step", IsopoTrainer),
    ("num_generations_eval", OpoTrainer),
    ("log_completions", OpoTrainer),
}
"""Of the reference model, of masks, of several updates, of evaluation and of what is written."""


@pytest.mark.parametrize(
    ("case", "trainer_class"),
    [each if each in FAST_ACTIVE else slow(each)[0] for each in product(ACTIVE, TRAINERS)],
)
def test_options_in_a_step(tmp_path: Path, trainer_class: Any, case: str) -> None:
    options = dict(ACTIVE[case])
    tokenizer, model = tiny(lora=options.pop("lora", False))
    if options.pop("eval_dataset", False):
        options["eval_dataset"] = dataset()
    trainer, watch = made(trainer_class, tmp_path, model, tokenizer, **options)
    trained(trainer)
    assert len(watch.gradients) == trainer.args.max_steps
    logged = {name for record in watch.logs for name in record}
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy", "grad_norm"} <= logged
    assert "rewards/text_reward/mean" in logged
    assert not [name for name in logged if name.startswith("clip_ratio")]
    for gradients in watch.gradients:
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    moved = any(gradient.any() for gradients in watch.gradients for gradient in gradients.values())
    assert moved == (case != "all completions masked")


class _Counts(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


ARGUMENTS = {
    *("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
    *("reward_processing_classes", "callbacks", "optimizers", "quantization_config"),
    *("peft_config", "tools", "rollout_func", "environment_factory"),
}


@pytest.mark.parametrize("trainer_class", [IsopoTrainer, *slow(OpoTrainer)])
def test_arguments_of_the_trainer(tmp_path: Path, trainer_class: Any) -> None:
    """Positional as in TRL, a path for the model, PEFT by its configuration, a rollout function."""
    from peft import LoraConfig

    tokenizer, model = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    callback, asked = _Counts(), []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        asked.append(len(prompts))
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        done = [[5 + index % 3, 6] for index in range(len(prompts))]
        return {
            "prompt_ids": ids,
            "completion_ids": done,
            "logprobs": [[-1.0, -1.0]] * len(prompts),
        }

    arguments = config(trainer_class.config_class, tmp_path / "run", optim="sgd")
    with quiet():
        trainer = trainer_class(
            *(str(tmp_path / "model"), [text_reward], arguments, dataset(), dataset(), tokenizer),
            reward_processing_classes=[None],
            callbacks=[callback],
            optimizers=(None, None),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
            tools=None,
            rollout_func=rollout,
            environment_factory=None,
            quantization_config=None,
        )
    trained(trainer)
    assert callback.steps == 1
    assert asked
    assert [name for name, _ in trainer.model.named_parameters() if "lora_A" in name]


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_configurations_of_another_trainer(tmp_path: Path, trainer_class: Any) -> None:
    tokenizer, model = tiny()
    with pytest.raises(ProxstepError, match=trainer_class.config_class.__name__), quiet():
        trainer_class(
            *(model, text_reward, config(GRPOConfig, tmp_path), dataset()),
            processing_class=tokenizer,
        )


def test_state_is_logged_once(tmp_path: Path) -> None:
    tokenizer, model = tiny()
    trainer, watch = made(IsopoTrainer, tmp_path, model, tokenizer)
    trained(trainer)
    assert {"geometry/weight_spread", "objective/ratio"} <= set(watch.logs[0])
    json.dumps(watch.logs)

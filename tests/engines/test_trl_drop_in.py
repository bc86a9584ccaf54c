"""Every option of GRPOConfig, TRL's and transformers': refused, acting as in TRL, or stored.

An option of `ACTS` changes what TRL's own trainer does in a tiny run, and ours do the same. One of
`STORED` cannot act here (another accelerator, the hub, several ranks) or not in so small a run; it
gives the same configuration, or the same complaint, as in TRL.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.test_trl_options import (
    REFUSED_BY_BOTH,
    REFUSED_BY_ISOPO,
    REFUSED_BY_ISOPO_UNTESTED,
    other_value,
)
from tests.engines.trl_case import SIZES, dataset, made, quiet, tiny, trained
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from proxstep.engines.trl import IsopoConfig, IsopoTrainer, OpoConfig, OpoTrainer
from proxstep.engines.trl.isopo import STATE_FILE

OURS = {OpoTrainer: OpoConfig, IsopoTrainer: IsopoConfig}
FIELDS = {field.name: field for field in dataclasses.fields(GRPOConfig)}
SAVING = {"save_strategy": "steps", "save_steps": 1}
EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 8,
    "eval_dataset": True,
}

ACTS: dict[str, dict[str, Any]] = {
    "output_dir": {**SAVING},
    "per_device_train_batch_size": {"per_device_train_batch_size": 8},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 0.5},
    "max_steps": {"max_steps": 2},
    "learning_rate": {"learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine", "max_steps": 2},
    "lr_scheduler_kwargs": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-3},
    },
    "warmup_steps": {"warmup_steps": 3},
    "optim": {"optim": "sgd"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.5"},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-3},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 4},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "activation_checkpointing": {"activation_checkpointing": False},
    "gradient_checkpointing": {"gradient_checkpointing": False},
    "neftune_noise_alpha": {"neftune_noise_alpha": 0.1},
    "logging_strategy": {"logging_strategy": "no"},
    "logging_steps": {"logging_steps": 2},
    "logging_first_step": {"logging_first_step": True, "logging_steps": 5, "max_steps": 2},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "report_to": {"report_to": "tensorboard"},
    "eval_strategy": EVALUATION,
    "eval_steps": EVALUATION | {"eval_steps": 2, "max_steps": 2},
    "eval_delay": EVALUATION | {"eval_delay": 2, "max_steps": 2},
    "per_device_eval_batch_size": EVALUATION | {"per_device_eval_batch_size": 4},
    "eval_on_start": EVALUATION | {"eval_on_start": True},
    "num_generations_eval": EVALUATION | {"num_generations_eval": 2},
    "save_only_model": SAVING | {"save_only_model": True},
    "save_strategy": {"save_strategy": "epoch"},
    "save_steps": SAVING | {"save_steps": 2, "max_steps": 3},
    "save_total_limit": SAVING | {"save_total_limit": 1, "max_steps": 2},
    "seed": {"seed": 1},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "model_init_kwargs": {"model_init_kwargs": {"dtype": "bfloat16"}, "path": True},
    "num_generations": {"num_generations": 2},
    "max_completion_length": {"max_completion_length": 2},
    "shuffle_dataset": {"shuffle_dataset": False},
    "pad_to_multiple_of": {"pad_to_multiple_of": 16},
    "generation_batch_size": {"generation_batch_size": 16},
    "steps_per_generation": {"steps_per_generation": 4},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 2},
    "min_p": {"min_p": 0.5},
    "generation_kwargs": {"generation_kwargs": {"suppress_tokens": [0, 1]}},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "beta": {"beta": 0.1, "path": True},
    "num_iterations": {"num_iterations": 2, "max_steps": 2},
    "reward_weights": {"reward_weights": [2.0]},
    "multi_objective_aggregation": {"multi_objective_aggregation": "normalize_then_sum"},
    "scale_rewards": {"scale_rewards": "none"},
    "mask_truncated_completions": {"mask_truncated_completions": True},
    "sync_ref_model": {
        "sync_ref_model": True,
        "beta": 0.1,
        "ref_model_sync_steps": 1,
        "path": True,
    },
    "entropy_coef": {"entropy_coef": 0.1},
    "log_completions": {"log_completions": True},
    "num_completions_to_print": {"log_completions": True, "num_completions_to_print": 1},
}
"""Options of tiny runs; "path" loads the model from a folder, as TRL does by name."""

STORED: dict[str, dict[str, Any]] = {
    "accelerator_config": {"accelerator_config": {"split_batches": True}},
    "activation_checkpointing_kwargs": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "dataloader_multiprocessing_context": {"dataloader_multiprocessing_context": "fork"},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
    "ddp_backend": {"ddp_backend": "gloo"},
    "dataloader_pin_memory": {"dataloader_pin_memory": True, "use_cpu": False},
    "disable_dropout": {"disable_dropout": True},
    "remove_unused_columns": {"remove_unused_columns": True},
    "disable_tqdm": {"disable_tqdm": False},
    "use_cpu": {"use_cpu": False},
    "debug": {"debug": "underflow_overflow"},
    "fsdp_config": {"fsdp_config": {"version": 2}},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "hub_strategy": {"hub_strategy": "end"},
    "include_for_metrics": {"include_for_metrics": ["inputs"]},
    "label_names": {"label_names": ["labels"]},
    "liger_kernel_config": {"liger_kernel_config": {"rope": True}},
    "load_best_model_at_end": EVALUATION | SAVING | {"load_best_model_at_end": True},
    "log_completions_hub_repo": {"log_completions": True, "log_completions_hub_repo": "a/b"},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "optim_target_modules": {"optim_target_modules": ["q_proj"]},
    "parallelism_config": {},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "vllm_importance_sampling_mode": {"vllm_importance_sampling_mode": "sequence_truncate"},
    "vllm_importance_sampling_clip_min": {"vllm_importance_sampling_clip_min": 0.1},
    "vllm_mode": {"vllm_mode": "server"},
    "vllm_model_impl": {"vllm_model_impl": "transformers"},
}
"""Where a value does not follow from the type; `BY_TYPE` are the others."""
BY_TYPE = """
    average_tokens_across_devices label_smoothing_factor bf16_full_eval fp16_full_eval tf32
    use_cache torch_empty_cache_steps log_on_each_node logging_nan_inf_filter run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id prediction_loss_only
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics
    save_on_each_node enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_always_push hub_revision metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism data_seed
    dataloader_drop_last dataloader_persistent_workers dataloader_in_order length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_timeout skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint
    local_rank trust_remote_code router_aux_loss_coef ds3_gather_for_generation
    chat_template_kwargs cache_implementation use_vllm vllm_enable_sleep_mode
    vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
    vllm_tensor_parallel_size ref_model_mixup_alpha ref_model_sync_steps entropy_coef_min
    entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations
    vllm_importance_sampling_correction vllm_importance_sampling_clip_max
    use_bias_correction_kl log_multimodal log_unique_prompts
    use_transformers_continuous_batching transformers_continuous_batching_config
    use_transformers_paged vllm_importance_sampling_cap
"""
STORED |= {name: {name: other_value(FIELDS[name])} for name in BY_TYPE.split() if name in FIELDS}


def test_every_option_is_in_one_class() -> None:
    """What a new release of TRL or transformers adds has to be looked at."""
    refused = {*REFUSED_BY_BOTH, *REFUSED_BY_ISOPO, *REFUSED_BY_ISOPO_UNTESTED}
    refused -= {"model_init_kwargs", "optim", "parallelism_config"}  # refused for some values
    classes = [refused, set(ACTS), set(STORED)]
    for name in FIELDS:
        assert sum(name in each for each in classes) == 1, name
    assert set().union(*classes) == set(FIELDS)


# -- stored ----------------------------------------------------------------------------------------


def outcome(config_class: Any, folder: Path, options: dict[str, Any]) -> Any:
    """The configuration as a dictionary, or the complaint about it."""
    options = {key: value for key, value in options.items() if key != "eval_dataset"}
    try:
        with quiet():
            made = config_class(**(SIZES | {"output_dir": str(folder)} | options))
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        return type(error), str(error)
    return {name: str(getattr(made, name)) for name in FIELDS if name != "loss_type"}


@functools.cache
def default_outcome(folder: Path) -> Any:
    return outcome(GRPOConfig, folder, {})


@pytest.mark.parametrize("name", sorted(STORED))
def test_an_option_is_stored_as_in_trl(tmp_path: Path, name: str) -> None:
    expected = outcome(GRPOConfig, tmp_path, STORED[name])
    if name != "parallelism_config":
        assert expected != default_outcome(tmp_path)
    for config_class in OURS.values():
        found = outcome(config_class, tmp_path, STORED[name])
        if isinstance(found, dict) and isinstance(expected, dict):
            assert {k for k in found if found[k] != expected[k]} == set()
        assert found == expected


# -- acting ----------------------------------------------------------------------------------------


def seen(trainer_class: Any, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a tiny run is like, but for the loss: its samples, logs, files, optimizer and state."""
    options = {"gradient_accumulation_steps": 2} | options
    tokenizer, model = tiny()
    if options.pop("path", False):
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        model = str(folder / "model")
    if options.pop("eval_dataset", False):
        options["eval_dataset"] = dataset()
    trainer, watch = made(trainer_class, folder / "run", model, tokenizer, **options)
    torch.manual_seed(0)
    trained(trainer)
    ours = ("objective/", "geometry/", "clip_ratio/", "policy_loss")
    timed = ("runtime", "per_second", "step_time")
    first = next((log for log in watch.logs if "reward" in log), {})
    groups = trainer.optimizer.param_groups
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    events = {path for path in files if "tfevents" in path.name}
    return {
        "keys": [
            sorted(
                k
                for k in log
                if not k.removeprefix("eval_").startswith(ours) and not k.endswith(timed)
            )
            for log in watch.logs
        ],
        "sampled": {k: v for k, v in first.items() if k.startswith(("reward", "completions/"))},
        "rates": [log["learning_rate"] for log in watch.logs if "learning_rate" in log],
        "tokens": [batch["completion_ids"].tolist() for batch in watch.microbatches[:2]],
        "masks": [batch["completion_mask"].tolist() for batch in watch.microbatches[:2]],
        "microbatches": [batch["prompt_ids"].shape for batch in watch.microbatches],
        "advantages": [batch["advantages"].tolist() for batch in watch.microbatches[:2]],
        "given": [sorted(k for k in b if "proxstep" not in k) for b in watch.microbatches],
        "steps": (trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch),
        "optimizer": (type(trainer.optimizer.optimizer), type(trainer.lr_scheduler)),
        "groups": [
            {k: str(v) for k, v in group.items() if k != "params"} | {"n": len(group["params"])}
            for group in groups
        ],
        "clipped": bool(_norm(watch.gradients[0]) < 0.101),
        "loading": trainer.callback_handler.train_dataloader.num_workers,
        "files": sorted(map(str, files - events)),
        "tracked": len(events),
        "model": (
            str(trainer.model.dtype),
            any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()),
            trainer.ref_model is None,
            trainer.accelerator.mixed_precision,
        ),
        "config": {
            name: str(getattr(trainer.args, name))
            for name in FIELDS
            if name not in ("output_dir", "loss_type", "logging_dir")
        },
    }


def _norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [IsopoTrainer, OpoTrainer])
@pytest.mark.parametrize("name", sorted(ACTS))
def test_an_option_acts_as_in_trl(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, trainer_class: Any, name: str
) -> None:
    expected = seen(GRPOTrainer, tmp_path / "trl", ACTS[name])
    found = seen(trainer_class, tmp_path / "ours", ACTS[name])
    found["files"] = [name for name in found["files"] if not name.endswith(STATE_FILE)]
    for what, value in expected.items():
        assert found[what] == value, what
    plain = default_run(tmp_path_factory.getbasetemp() / "plain")
    changed = {key for key in plain if expected[key] != plain[key]}
    assert changed, "it changes nothing that we look at"


@functools.cache
def default_run(folder: Path) -> dict[str, Any]:
    """What TRL's own trainer does without the option, but for the stored configuration."""
    found = seen(GRPOTrainer, folder, {})
    del found["config"]
    return found

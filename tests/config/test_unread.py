"""Every key of the recipe: a setting in which it is read, or an error that names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.config.recipe_case import mistake, nested

from proxstep.config.explain import describe_keys
from proxstep.config.loading import resolve
from proxstep.config.optimizer import OPTIMIZER_OPTIONS
from proxstep.config.unread import GEOMETRY, READ

SOURCE = Path(__file__).parents[2] / "src" / "proxstep"
TABLE = {"model": {"name": "m"}, "task": {"name": "table", "train": "org/data"}}
GSM8K = {"model": {"name": "m"}, "task": {"name": "gsm8k"}}
MATH = {"model": {"name": "m"}, "task": {"name": "math"}}

SOMETIMES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "model.warmup_score": (0.5, {}, {"model": {"name": "m"}}),
    "model.warmup_solutions": (16, {"model": {"name": "m"}}, {}),
    "model.warmup_learning_rate": (
        *(1e-4, {"model": {"name": "m", "warmup_solutions": 16}}, {"model": {"name": "m"}}),
    ),
    "task.difficulty": (2, {}, GSM8K),
    "task.level": (2, MATH, {}),
    "task.train": ("my_data.jsonl", TABLE, {}),
    "task.validation": ("my_data.jsonl", GSM8K, {}),
    "task.num_train": (8, GSM8K, {}),
    "task.prompt_column": ("question", TABLE, GSM8K),
    "task.answer_column": ("final", TABLE, MATH),
    "task.config": ("main", TABLE, {**TABLE, "task": {"name": "table", "train": "x.parquet"}}),
    "task.train_split": ("a", TABLE, {**TABLE, "task": {"name": "table", "train": "x.jsonl"}}),
    "task.validation_split": (
        *("a", {**TABLE, "task": {**TABLE["task"], "validation": "x.json"}}, TABLE),
    ),
    "task.prompt_format": ("plain", MATH, {}),
    "task.instruction": ("Be brief.", TABLE, {}),
    "task.system_prompt": (
        *("You add.", TABLE, {**MATH, "task": {"name": "math", "prompt_format": "plain"}}),
    ),
    "task.num_few_shot": (2, GSM8K, {}),
    "task.few_shot_seed": (1, {**GSM8K, "task": {"name": "gsm8k", "num_few_shot": 2}}, GSM8K),
    "task.chat_template_kwargs": ({"enable_thinking": False}, GSM8K, {}),
    "task.drop_long_prompts": (True, MATH, {}),
    "task.reward_weights": ([2.0], {"task": {"rewards": ["exact_match"]}}, {}),
    "regularizer.kl_estimator": ("k2", {"regularizer": {"kl_coef": 0.1}}, {}),
    "regularizer.kl_in": (
        *("reward", {"regularizer": {"kl_coef": 0.1, "kl_estimator": "k1"}}, {}),
    ),
    "rollout.overlong_penalty": (2.0, {"rollout": {"overlong_buffer": 8}}, {}),
    "rollout.gpu_memory_utilization": (0.5, {"rollout": {"engine": "vllm"}}, {}),
    "rollout.batch_size": (4, {}, {"rollout": {"engine": "vllm"}}),
    "optimizer.min_lr_rate": (0.1, {"optimizer": {"lr_scheduler_type": "linear"}}, {}),
    **{
        f"update.{key}": (value, {"update": {"kl_budget": 0.1}}, {})
        for key, value in [
            ("kl_budget_per", "token"),
            ("kl_control", "corrected"),
            ("kl_num_sequences", 8),
        ]
    },
    "evaluation.temperature": (0.6, {"evaluation": {"num_samples": 4}}, {}),
    "logging.project": ("mine", {"logging": {"tracker": "wandb"}}, {}),
    "geometry.fisher_power": (1.0, {"algorithm": "isopo"}, {"algorithm": "isopo-natural"}),
    "geometry.norm_power": (1.0, {"algorithm": "isopo"}, {"algorithm": "proma"}),
    "geometry.relative_fisher_power": (1.0, {"algorithm": "isopo"}, {"algorithm": "proma"}),
    "geometry.damping": (1.0, {"algorithm": "isopo"}, {"algorithm": "isopo-natural"}),
    "geometry.ntk_damping": (2.0, {"algorithm": "isopo-natural"}, {"algorithm": "isopo"}),
    "geometry.interact": ("group", {"algorithm": "isopo-natural"}, {"algorithm": "isopo"}),
    "geometry.damping_form": ("additive", {"algorithm": "isopo"}, {"algorithm": "proma"}),
    "geometry.scale": ("paper", {"algorithm": "isopo"}, {"algorithm": "proma"}),
    "geometry.other_parameters": ("freeze", {"algorithm": "proma"}, {}),
    "geometry.fisher": ("sequences", {"algorithm": "isopo"}, {"algorithm": "isopo-natural"}),
    "geometry.num_overlap_positions": (
        *(8, {"algorithm": "isopo"}, {"algorithm": "isopo", "geometry": {"fisher": "sequences"}}),
    ),
    "geometry.overlap_positions": (
        *("completion", {"algorithm": "isopo"}, {"algorithm": "isopo-euclidean"}),
    ),
    "geometry.overlap_source": ("microbatch", {"algorithm": "isopo"}, {"algorithm": "proma"}),
    "geometry.fisher_denominator": (
        *("trailing", {"algorithm": "isopo"}, {"algorithm": "isopo-natural"}),
    ),
    "geometry.decay": (0.5, {"algorithm": "isopo-natural"}, {"algorithm": "proma"}),
    "geometry.memory_mib": (64, {"algorithm": "isopo"}, {}),
    "geometry.diagnose_every": (5, {"algorithm": "isopo"}, {}),
    **{
        f"optimizer.{key}": (
            *(value, {"optimizer": {"name": "muon"}}, {"optimizer": {"name": other}}),
        )
        for key, value, other in [
            ("muon_learning_rate", 0.1, "adamw"),
            ("betas", [0.8, 0.9], "sgd"),
            ("eps", 1e-6, "kron"),
            ("momentum", 0.5, "soap"),
        ]
    },
}
"""By key: a value that is not the default, a setting that reads it, and one that does not."""

ALWAYS = {
    *("algorithm", "label", "external_lib", "seed", "steps", "device", "output_dir", "guard"),
    *("model.name", "model.dtype", "model.autocast", "model.head", "model.lora"),
    *(f"model.lora.{key}" for key in ("rank", "alpha", "dropout", "target_modules")),
    *("task.name", "task.num_validation", "task.max_prompt_length", "task.rewards"),
    *("task.reward_seconds", "geometry.rule", "regularizer.entropy_coef", "regularizer.kl_coef"),
    *("rollout.num_prompts", "rollout.num_generations", "rollout.max_completion_length"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.importance_cap"),
    *("rollout.stop", "rollout.prefill"),
    *("rollout.dynamic_sampling_max_batches", "rollout.mask_truncated_completions"),
    *("rollout.overlong_buffer", "update.num_minibatches", "update.num_iterations"),
    "update.kl_budget",
    *(
        "update.microbatch_size",
        "update.microbatch_tokens",
        "rollout.engine",
        "optimizer.name",
        "optimizer.learning_rate",
    ),
    *("optimizer.weight_decay", "optimizer.max_grad_norm", "optimizer.warmup_updates"),
    *("optimizer.lr_scheduler_type", "evaluation.patience"),
    *("evaluation.every", "evaluation.batch_size", "evaluation.num_probe_prompts"),
    *("evaluation.kl_policy_initial", "evaluation.baselines", "evaluation.remember_first"),
    *("evaluation.num_samples", "logging.tracker", "logging.num_samples"),
    "logging.checkpoint_last",
    *("logging.checkpoint_every", "logging.checkpoint_minutes", "logging.checkpoints_kept"),
}
"""Keys that every setting reads. The objective's are arguments of the algorithm's functions."""


def test_every_key_has_an_entry() -> None:
    keys = {key for key, *_ in describe_keys() if not key.startswith("objective.")}
    assert ALWAYS.isdisjoint(SOMETIMES)
    assert keys == ALWAYS | SOMETIMES.keys()
    assert READ.keys() | {f"geometry.{key}" for key in GEOMETRY} <= SOMETIMES.keys()


@pytest.mark.parametrize("key", sorted(ALWAYS | SOMETIMES.keys()))
def test_some_code_outside_of_the_recipe_reads_every_key(key: str) -> None:
    """By its name, as an attribute, a keyword, or a text."""
    name = key.rpartition(".")[2]
    pattern = re.compile(rf"\.{name}\b|[\"'.]{name}[\"']")
    rooms = [path for path in SOURCE.rglob("*.py") if path.parent.name != "config"]
    options = {option for own in OPTIMIZER_OPTIONS.values() for option in own}
    through_methods = {f"optimizer.{option}" for option in options} | {
        f"geometry.{field}"
        for field in ("fisher_power", "norm_power", "relative_fisher_power", "damping_form")
    }
    assert key in through_methods or any(pattern.search(path.read_text()) for path in rooms)


def with_key(setting: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    data = {"algorithm": "grpo", **setting}
    section, _, name = key.partition(".")
    return {**data, section: {**data.get(section, {}), **nested(name, value)}}


@pytest.mark.parametrize("key", SOMETIMES)
def test_a_key_is_read_in_one_setting_and_refused_in_another(key: str) -> None:
    value, reads, ignores = SOMETIMES[key]
    section, name = key.split(".")
    recipe = resolve(with_key(reads, key, value), {}, "test")
    assert getattr(getattr(recipe, section), name) == value
    message = mistake(with_key(ignores, key, value))
    assert message.startswith(key)
    assert message.count("\n") == 0


@pytest.mark.parametrize("key", sorted(k for k in SOMETIMES if k.startswith("geometry.")))
def test_without_a_rule_no_key_of_the_geometry_is_read(key: str) -> None:
    message = mistake(with_key({}, key, SOMETIMES[key][0]))
    assert message.startswith(f"{key} is of a rule, and algorithm grpo has none")


def test_a_diagnosis_reads_what_its_rule_does_not() -> None:
    data = {"algorithm": "proma", "geometry": {"num_overlap_positions": 8, "diagnose_every": 2}}
    assert resolve(data, {}, "test").geometry.num_overlap_positions == 8

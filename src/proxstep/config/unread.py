"""Keys that only some settings read: where one is set and would not be read, that is an error.

`READ` has an entry for every key that does not always count. A key at its default is not set: a
resolved recipe holds them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from proxstep.config.geometry import GeometrySection
from proxstep.config.sections import DRAWN_TASKS, EMBEDDED_MODELS
from proxstep.isopo import PRESETS

Reading = tuple[Callable[[Any], bool], str]
"""When a key is read, and what to say and to do where it is not."""

_FILES = (".jsonl", ".json", ".parquet")


def _files_end_in(recipe: Any, *endings: str) -> bool:
    """Whether all of the task's sources are files with one of these endings."""
    sources = [s for s in (recipe.task.train, recipe.task.validation) if s is not None]
    return bool(sources) and all(Path(source).suffix in endings for source in sources)


def _is_table(recipe: Any) -> bool:
    return recipe.task.name == "table"


_DATA = (
    lambda r: r.task.name not in DRAWN_TASKS,
    f"is of data, and task.name {', '.join(DRAWN_TASKS)} make their own problems: set task.name "
    "(table for a file of your own), or leave it out",
)
_TABLE = (_is_table, "is of task.name table: the other tasks know theirs; leave it out")
_KL = (
    lambda r: r.regularizer.kl_coef > 0,
    "is of a divergence that regularizer.kl_coef 0 does not price: raise kl_coef, or leave it out",
)
_LAID_OUT = (
    lambda r: r.task.name in ("gsm8k", "math", "svamp", "table"),
    "is of task.name gsm8k, math, svamp and table: the others' prompts are as they are; leave it "
    "out",
)
_SPLIT = (
    lambda r: _is_table(r) and not _files_end_in(r, ".jsonl", ".parquet"),
    "is of a hub data set or a .json file with several, read by task.name table: leave it out",
)

READ: Mapping[str, Reading] = {
    "model.warmup_score": (
        lambda r: r.model.name in EMBEDDED_MODELS,
        "is of model.name embedded and embedded-large: other models take model.warmup_solutions, "
        "or leave it out",
    ),
    "model.warmup_solutions": (
        lambda r: r.model.name not in EMBEDDED_MODELS,
        "is of every other model, and model.name embedded and embedded-large take "
        "model.warmup_score: leave it out",
    ),
    "model.warmup_learning_rate": (
        lambda r: r.model.warmup_solutions is not None,
        "is of model.warmup_solutions, which is null: give a number, or leave it out",
    ),
    "task.difficulty": (
        lambda r: r.task.name == "arithmetic",
        "is of task.name arithmetic: leave it out",
    ),
    "task.level": (
        lambda r: r.task.name == "math",
        "is of task.name math: only math has levels; leave it out",
    ),
    "task.train": _DATA,
    "task.validation": _DATA,
    "task.num_train": _DATA,
    "task.prompt_column": _TABLE,
    "task.answer_column": _TABLE,
    "task.config": (
        lambda r: _is_table(r) and not _files_end_in(r, *_FILES),
        "is of a hub data set, read by task.name table: leave it out",
    ),
    "task.train_split": _SPLIT,
    "task.validation_split": (
        lambda r: _SPLIT[0](r) and r.task.validation is not None,
        "is of task.validation, a hub data set or a .json file with several splits, read by "
        "task.name table: name one, or leave it out",
    ),
    **dict.fromkeys(
        ("task.prompt_format", "task.instruction", "task.num_few_shot", "task.drop_long_prompts"),
        _LAID_OUT,
    ),
    "task.few_shot_seed": (
        lambda r: r.task.num_few_shot > 0,
        "chooses the worked examples of task.num_few_shot, which is 0: leave it out",
    ),
    **dict.fromkeys(
        ("task.system_prompt", "task.chat_template_kwargs"),
        (
            lambda r: _LAID_OUT[0](r) and (r.task.prompt_format != "plain" or _is_table(r)),
            "is of prompts that are chats: set task.prompt_format to chat, or leave it out",
        ),
    ),
    "regularizer.kl_estimator": _KL,
    "regularizer.kl_in": _KL,
    "optimizer.min_lr_rate": (
        lambda r: r.optimizer.lr_scheduler_type != "constant",
        "is where optimizer.lr_scheduler_type linear and cosine end: choose one, or leave it out",
    ),
    "rollout.gpu_memory_utilization": (
        lambda r: r.rollout.engine == "vllm",
        "is of rollout.engine vllm: leave it out",
    ),
    "rollout.batch_size": (
        lambda r: r.rollout.engine == "transformers",
        "is of rollout.engine transformers, and vllm makes its own batches: leave it out",
    ),
    "rollout.overlong_penalty": (
        lambda r: r.rollout.overlong_buffer is not None,
        "is the largest punishment within rollout.overlong_buffer, which is null: give a number of "
        "tokens",
    ),
    **dict.fromkeys(
        ("update.kl_budget_per", "update.kl_control", "update.kl_num_sequences"),
        (
            lambda r: r.update.kl_budget is not None,
            "is of update.kl_budget, which is null: give a number of nats, or leave it out",
        ),
    ),
    "evaluation.temperature": (
        lambda r: r.evaluation.num_samples > 0,
        "is of evaluation.num_samples, which is 0, and a greedy score has none: give a number of "
        "samples, or leave it out",
    ),
    "logging.project": (
        lambda r: r.logging.tracker in ("trackio", "wandb"),
        "is of logging.tracker trackio and wandb: choose one, or leave it out",
    ),
}
"""By dotted key of the recipe."""


def _rule(section: GeometrySection) -> Any:
    return section.to_rule()


def _measures(section: GeometrySection) -> bool:
    """Whether Fisher norms are estimated, for the rule or for its diagnosis."""
    return _rule(section).needs.fisher or section.diagnose_every is not None


def _samples(section: GeometrySection) -> bool:
    return _measures(section) and section.fisher == "positions"


_FISHER = "is of the Fisher norm, which this geometry.rule does not look at: leave it out"
_POSITIONS = (
    _samples,
    "is of the positions that estimate the Fisher norm, which this geometry.rule or "
    "geometry.fisher does not look at: leave it out",
)

GEOMETRY: Mapping[str, Reading] = {
    "scale": (
        lambda s: "scale" in {field.name for field in dataclasses.fields(_rule(s))},
        "is of isometric rules and the natural one: leave it out",
    ),
    "fisher": (_measures, _FISHER),
    "num_overlap_positions": _POSITIONS,
    "overlap_positions": _POSITIONS,
    "overlap_source": _POSITIONS,
    "fisher_denominator": _POSITIONS,
    "decay": (
        lambda s: (
            bool(_rule(s).averages)
            or s.diagnose_every is not None
            or (_samples(s) and s.fisher_denominator == "trailing")
        ),
        "is of trailing means, and this geometry.rule keeps none: leave it out",
    ),
}
"""By key of the geometry's section, under a rule; without one none is read."""


def unread_key(recipe: Any) -> str | None:
    """Return what is wrong with the first key that is set and would not be read, or None."""
    for key, (is_read, remedy) in READ.items():
        section, name = key.split(".")
        part = getattr(recipe, section)
        if part.differs(name) and not is_read(recipe):
            return f"{key} {remedy}"
    if recipe.geometry.rule == "none":
        names = [name for name in type(recipe.geometry).model_fields if name != "rule"]
        for name in filter(recipe.geometry.differs, names):
            return (
                f"geometry.{name} is of a rule, and algorithm {recipe.algorithm} has none: choose "
                f"one of {', '.join(PRESETS)}, leave it out, or put it under the per_algorithm of "
                "those that have one"
            )
        return None
    return unread_geometry(recipe.geometry)


def unread_geometry(section: GeometrySection) -> str | None:
    """Return what is wrong with the first key of a rule that would not be read, or None."""
    for name, (is_read, remedy) in GEOMETRY.items():
        if section.differs(name) and not is_read(section):
            return f"geometry.{name} {remedy}"
    return None

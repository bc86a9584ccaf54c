"""A recipe's prompts as verl's Parquet files, in the order in which the local engine takes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.config.sections import EMBEDDED_MODELS
from proxstep.engines.verl.overrides import Prepared
from proxstep.errors import ProxstepError
from proxstep.tasks import Example, Task
from proxstep.training.models import load_tokenizer
from proxstep.training.prompts import Prompts, batch_rows, encode_prompt, load_prompts
from proxstep.training.source import model_source
from proxstep.training.task import load_task

PLAIN_TEMPLATE = "{{ messages[0].content }}"
"""A chat template under which a single message is the prompt itself."""


def plan(recipe: Recipe, note: Callable[[str], None] = lambda text: None) -> tuple[Prepared, Task]:
    """Return where `prepare` puts a recipe's files, and the task; no file of the run is written.

    `note` is told of a GGUF file's conversion.

    Raises:
        ProxstepError: If the task's data is missing or malformed.
    """
    folder = Path(recipe.output_dir).absolute() / "verl"
    embedded = recipe.model.name in EMBEDDED_MODELS
    source = recipe.model.name
    chat = False
    if not embedded:
        source = model_source(recipe, note)
        chat = load_tokenizer(source).chat_template is not None
    task = load_task(recipe, chat=chat)
    functions = recipe.task.rewards or task.rewards
    return Prepared(
        model=str(folder / "model") if embedded else _absolute(source),
        train=folder / "train.parquet",
        validation=folder / "validation.parquet",
        rewards=tuple(map(_absolute_reward, functions)),
        reward_weights=tuple(recipe.task.reward_weights or [1.0] * len(functions)),
        chat_template=PLAIN_TEMPLATE if isinstance(task.train[0].prompt, str) else None,
    ), task


def prepare(recipe: Recipe, note: Callable[[str], None]) -> Prepared:
    """Plan and write.

    Raises:
        ProxstepError: If the data, a reward or a prompt is wrong.
    """
    prepared, task = plan(recipe, note)
    write(recipe, prepared, task, note)
    return prepared


def write(recipe: Recipe, prepared: Prepared, task: Task, note: Callable[[str], None]) -> Prompts:
    """Write a recipe's prompts, and the embedded model, where `plan` says.

    The training file holds every step's prompts in the local engine's order, so that verl, without
    shuffling, sees the same ones at each step. `note` is told of the embedded model's warm-up.

    Returns:
        The validation prompts.

    Raises:
        ProxstepError: If a reward or a prompt is wrong.
    """
    source = model_source(recipe, note)
    tokenizer = load_tokenizer(source)
    train, validation = load_prompts(recipe, tokenizer, task, note)
    _check_tokens(tokenizer, prepared.chat_template, validation.examples)
    per_step = recipe.rollout.num_prompts
    rows = [
        row
        for step in range(recipe.steps)
        for row in batch_rows(len(train), per_step, step, recipe.seed)
    ]
    prepared.train.parent.mkdir(parents=True, exist_ok=True)
    _write(prepared.train, task.name, [train.examples[row] for row in rows])
    _write(prepared.validation, task.name, validation.examples)
    if recipe.model.name in EMBEDDED_MODELS:
        shutil.copytree(source, prepared.model, dirs_exist_ok=True)
    return validation


def messages(example: Example) -> list[dict[str, str]]:
    """Return a prompt as chat messages; a plain one is a single message."""
    if isinstance(example.prompt, str):
        return [{"role": "user", "content": example.prompt}]
    return example.prompt


def _write(path: Path, name: str, examples: Iterable[Example]) -> None:
    """Write examples under verl's column names, all or nothing."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for index, example in enumerate(examples):
        more = {"prompt": example.prompt, "columns": example.columns}
        try:
            text = json.dumps(more, ensure_ascii=False)
        except TypeError as error:
            raise ProxstepError(
                f"task: a column of {name} does not fit into JSON ({error}), in which verl's "
                "reward workers get it: drop the column, or make it text"
            ) from None
        rows.append(
            {
                "data_source": name,
                "prompt": messages(example),
                "reward_model": {"style": "rule", "ground_truth": example.answer},
                "extra_info": {"index": index, "example": text},
            }
        )
    scratch = path.with_suffix(".tmp")
    parquet.write_table(pyarrow.Table.from_pylist(rows), scratch)
    os.replace(scratch, path)


def _check_tokens(tokenizer: Any, template: str | None, examples: Iterable[Example]) -> None:
    """Refuse a tokenizer that would give plain prompts other tokens in verl than here.

    Raises:
        ProxstepError: If there is one: verl takes every prompt through a chat template, and adds no
            special tokens.
    """
    if template is None:
        return
    for example in examples:
        text = tokenizer.apply_chat_template(
            messages(example), chat_template=template, tokenize=False, add_generation_prompt=True
        )
        there = tokenizer(text, add_special_tokens=False)["input_ids"]
        if there != encode_prompt(tokenizer, example.prompt):
            raise ProxstepError(
                "task.prompt_format: the tokenizer adds special tokens to a plain prompt, which "
                "verl does not: use task.prompt_format chat, or prompts that are chats"
            )


def _absolute(source: str) -> str:
    """Return a local folder's whole path, from which verl's workers can read; a hub name as is."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _absolute_reward(specification: str) -> str:
    place, colon, name = specification.rpartition(":")
    if not place.endswith(".py"):
        return specification
    return f"{Path(place).absolute()}{colon}{name}"

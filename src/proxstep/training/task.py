"""From a recipe to its task: which function makes it, and with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.config.sections import DRAWN_TASKS
from proxstep.errors import ProxstepError
from proxstep.rewards import CODE_REWARDS
from proxstep.tasks import (
    REWARDS,
    Task,
    arithmetic_task,
    countdown_task,
    gsm8k_task,
    math_task,
    stories_task,
    svamp_task,
    table_task,
    worked_task,
)
from proxstep.tasks.worked import KINDS

CHAT_TASKS = {"gsm8k": gsm8k_task, "math": math_task, "svamp": svamp_task}
"""Tasks whose prompts are chats where the tokenizer has a template."""
LAYOUT_KEYS = ("system_prompt", "num_few_shot", "few_shot_seed")


def task_call(recipe: Recipe, *, chat: bool) -> tuple[Callable[..., Task], dict[str, Any]]:
    """Return the function that makes the recipe's task, and its keyword arguments.

    `chat` says whether the tokenizer has a chat template, for the tasks that can do either.
    """
    section = recipe.task
    if section.name in DRAWN_TASKS:
        function, options = drawn_task_call(section.name, section.difficulty)
        return function, options | {"num_validation": section.num_validation}
    keys = ("train", "validation", "num_train", "num_validation")
    if section.name == "math":
        keys += ("level",)
    if section.name == "table":
        keys += ("prompt_column", "answer_column", "config", "train_split", "validation_split")
    options = {key: getattr(section, key) for key in keys}
    options |= {key: getattr(section, key) for key in LAYOUT_KEYS}
    options["chat"] = chat if asks_tokenizer(recipe) else section.prompt_format == "chat"
    if section.instruction is not None:
        options["instruction"] = section.instruction
    if section.name == "table":
        return table_task, options | {"rewards": tuple(section.rewards or REWARDS["table"])}
    return CHAT_TASKS[section.name], options


def drawn_task_call(name: str, difficulty: int) -> tuple[Callable[..., Task], dict[str, Any]]:
    """Return the function that makes a task of problems that it draws, and what it needs."""
    if name == "arithmetic":
        return arithmetic_task, {"difficulty": difficulty}
    if name in KINDS:
        return worked_task, {"name": name}
    return {"countdown": countdown_task, "stories": stories_task}[name], {}


def asks_tokenizer(recipe: Recipe) -> bool:
    """Whether prompts are chats where the tokenizer has a template, and plain elsewhere."""
    section = recipe.task
    if section.name == "table" and not set(CODE_REWARDS).isdisjoint(section.rewards or ()):
        return False  # the completion goes on with the prompt's code
    return section.name in (*CHAT_TASKS, "table") and section.prompt_format == "auto"


def load_task(recipe: Recipe, *, chat: bool) -> Task:
    """Return the recipe's task; `chat` is as for `task_call`.

    Raises:
        ProxstepError: If the data is missing, empty or malformed.
    """
    function, options = task_call(recipe, chat=chat)
    try:
        task = function(**options)
    except ProxstepError as error:
        raise ProxstepError(f"task.train or task.validation: {error}") from None
    _refuse_chats_that_are_not_plain(recipe, task)
    return task


def _refuse_chats_that_are_not_plain(recipe: Recipe, task: Task) -> None:
    """Refuse a table whose prompts are chats where the recipe says that they are plain."""
    if recipe.task.name == "table" and recipe.task.prompt_format == "plain":
        for number, example in enumerate([*task.train, *task.validation], start=1):
            if not isinstance(example.prompt, str):
                raise ProxstepError(
                    f"task.prompt_format plain: prompt {number} of the data is a chat already; say "
                    "auto or chat"
                )

"""What the tasks that are read from rows share: prompts, loading, and splitting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from proxstep.errors import ProxstepError
from proxstep.rewards import final_number
from proxstep.tasks.base import REWARDS, Example, Prompt, Task
from proxstep.tasks.data import Row, load_rows

Source: TypeAlias = str | Path

DEFAULT_HELD_OUT = 256


def question_prompt(question: str, chat: bool) -> Prompt:
    """Return a question as a prompt."""
    return [{"role": "user", "content": question}] if chat else f"Question: {question}\nAnswer:"


def load_task_rows(
    hub_id: str, config: str | None, train: Source | None, validation: Source | None
) -> tuple[list[Row], list[Row] | None]:
    """Return training and validation rows, the hub's where no source is given."""
    hub = (hub_id, config)
    train_rows = load_rows(*hub, "train") if train is None else load_rows(train, split="train")
    if validation is not None:
        return train_rows, load_rows(validation, split="test")
    return train_rows, load_rows(*hub, "test") if train is None else None


def split_rows(
    train: list[Row],
    validation: list[Row] | None,
    num_train: int | None,
    num_validation: int | None,
) -> tuple[list[Row], list[Row]]:
    """Return at most so many rows of each, the validation rows held out of train where None."""
    for name, number in (("num_train", num_train), ("num_validation", num_validation)):
        if number is not None and number < 1:
            raise ProxstepError(f"{name} is {number}; give at least 1, or leave it out")
    if validation is None:
        held_out = num_validation or DEFAULT_HELD_OUT
        if held_out >= len(train):
            raise ProxstepError(
                f"{held_out} validation rows cannot be held out of {len(train)} training rows; "
                "set a smaller num_validation or give validation data"
            )
        train, validation = train[:-held_out], train[-held_out:]
    return train[:num_train], validation[:num_validation]


def task_of_rows(
    name: str,
    train: list[Row],
    validation: list[Row],
    to_example: Callable[[Row], Example],
    rewards: tuple[str, ...] | None = None,
) -> Task:
    """Return a task from rows; raise where a number is graded and an answer holds none."""
    graded_by = REWARDS[name] if rewards is None else rewards

    def checked(row: Row) -> Example:
        example = to_example(row)
        if "numeric_answer" in graded_by and final_number(example.answer) is None:
            raise ProxstepError(
                f"{row.where}: the answer {example.answer!r:.80} holds no number; "
                "correct it or choose another reward than numeric_answer"
            )
        return example

    return Task(
        name, [checked(row) for row in train], [checked(row) for row in validation], graded_by
    )

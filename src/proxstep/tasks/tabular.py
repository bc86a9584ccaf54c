"""Tasks read from rows: any table with a prompt and an answer, GSM8K, SVAMP and MATH."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from proxstep.errors import ProxstepError
from proxstep.rewards import (
    CODE_REWARDS,
    NOT_A_NUMBER,
    boxed_answer,
    completion_text,
    problem_of,
    reference_number,
)
from proxstep.tasks.base import REWARDS, Example, Task
from proxstep.tasks.data import (
    Row,
    answer_cell,
    cell,
    load_rows,
    other_cells,
    prompt_cell,
    text_cell,
)
from proxstep.tasks.layout import Layout

Source: TypeAlias = str | Path

DEFAULT_HELD_OUT = 256
# Source: verl, examples/data_preprocess/gsm8k.py.
STEP_BY_STEP = ' Let\'s think step by step and output the final answer after "####".'
"""What `gsm8k_task` puts after a question."""
LEVELS = range(1, 6)
# The mirror and the words of verl's examples/data_preprocess/math_dataset.py.
HUB_ID = "DigitalLearningGmbH/MATH-lighteval"
IN_A_BOX = r" Let's think step by step and output the final answer within \boxed{}."
"""What `math_task` puts after a question."""


def table_task(
    train: Source,
    validation: Source | None = None,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    solution_column: str | None = None,
    config: str | None = None,
    train_split: str = "train",
    validation_split: str = "test",
    num_train: int | None = None,
    num_validation: int | None = None,
    rewards: tuple[str, ...] = REWARDS["table"],
    chat: bool = False,
    instruction: str = "",
    system_prompt: str | None = None,
    num_few_shot: int = 0,
    few_shot_seed: int = 0,
) -> Task:
    """Return a task from any table with a prompt and an answer in each row.

    Args:
        train: A .jsonl, .json or .parquet file, or a folder or hub id that `datasets` reads.
        validation: The same; None holds out the last `num_validation` rows of train.
        prompt_column: Column of prompts: texts, or lists of {"role": ..., "content": ...}.
        answer_column: Column of reference answers: texts or numbers.
        solution_column: Column of reference completions as texts, or None.
        config: Configuration of a hub data set.
        train_split: Split of a folder or hub data set to train on.
        validation_split: Split of a folder or hub data set to validate on.
        num_train: Use at most so many training examples, the first ones; None for all.
        num_validation: Use at most so many validation examples, the first ones; None for all, or
            for `rows.DEFAULT_HELD_OUT` where they are held out of train.
        rewards: Default reward functions. With "numeric_answer" each answer must hold a number.
        chat: Whether a prompt that is a text becomes a user's chat message.
        instruction: As in `Layout`, as are the next three.
        system_prompt: A chat's first message.
        num_few_shot: Worked examples before each prompt.
        few_shot_seed: Which rows they are.

    Returns:
        The task. All other columns go to the reward functions.

    Raises:
        ProxstepError: A source cannot be read or a row is not as described.
    """
    layout = Layout(chat, instruction, system_prompt, num_few_shot, few_shot_seed)
    continued = not set(CODE_REWARDS).isdisjoint(rewards)

    def to_example(row: Row) -> Example:
        prompt = prompt_cell(row, prompt_column)
        if continued and isinstance(prompt, str) and layout != Layout():
            raise ProxstepError(
                f"{row.where}: the prompt is code that the completion continues, and nothing may "
                "stand around it: leave instruction, num_few_shot and prompt_format out, or "
                "make the prompts chats"
            )
        return Example(
            prompt=layout.table_prompt(prompt),
            answer=answer_cell(row, answer_column),
            solution=text_cell(row, solution_column) if solution_column else None,
            columns=other_cells(row, (prompt_column, answer_column, solution_column)),
            question=completion_text(prompt),
        )

    train_rows = load_rows(train, config, train_split)
    test_rows = None if validation is None else load_rows(validation, config, validation_split)
    split = split_rows(train_rows, test_rows, num_train, num_validation)
    return layout.apply(task_of_rows("table", *split, to_example, rewards))


def gsm8k_task(
    train: Source | None = None,
    validation: Source | None = None,
    *,
    num_train: int | None = None,
    num_validation: int | None = None,
    chat: bool = False,
    instruction: str = STEP_BY_STEP,
    system_prompt: str | None = None,
    num_few_shot: int = 0,
    few_shot_seed: int = 0,
) -> Task:
    r"""Return GSM8K: grade-school word problems with worked solutions (arXiv 2110.14168).

    A plain prompt is "Question: ...\nAnswer:", and its solution begins with a space.

    Args:
        train: A local file or folder with columns question and answer; None for the hub's.
        validation: The same. None for the hub's test split where train is None too, otherwise for
            the last `num_validation` rows of train.
        num_train: As in `table_task`.
        num_validation: As in `table_task`.
        chat: Whether prompts are a user's chat message rather than plain text.
        instruction: Text put after the question. The default asks for the answer format, in the
            words of verl's examples/data_preprocess/gsm8k.py.
        system_prompt: As in `Layout`, as are the next two.
        num_few_shot: Worked examples before each question.
        few_shot_seed: Which rows they are.

    Returns:
        The task, graded by the final number.

    Raises:
        ProxstepError: A source cannot be read, a row lacks a column or an answer lacks its "####".
    """
    layout = Layout(chat, instruction, system_prompt, num_few_shot, few_shot_seed)

    def to_example(row: Row) -> Example:
        solution, question = text_cell(row, "answer"), text_cell(row, "question")
        _, marker, answer = solution.rpartition("####")
        if not marker:
            raise ProxstepError(
                f"{row.where}: column 'answer' has no \"####\"; put it before the final answer"
            )
        return Example(
            prompt=layout.prompt(question),
            answer=answer.strip(),
            solution=solution if chat else f" {solution}",
            columns=other_cells(row, ("question", "answer")),
            question=question,
        )

    rows = load_task_rows("openai/gsm8k", "main", train, validation)
    split = split_rows(*rows, num_train, num_validation)
    return layout.apply(task_of_rows("gsm8k", *split, to_example))


def svamp_task(
    train: Source | None = None,
    validation: Source | None = None,
    *,
    num_train: int | None = None,
    num_validation: int | None = None,
    chat: bool = False,
    instruction: str = STEP_BY_STEP,
    system_prompt: str | None = None,
    num_few_shot: int = 0,
    few_shot_seed: int = 0,
) -> Task:
    """Return SVAMP: one-step word problems without worked solutions (arXiv 2103.07191).

    As `gsm8k_task`, from columns Body, Question and Answer.

    Args:
        train: A local file or folder with these columns; None for the hub's.
        validation: As in `gsm8k_task`.
        num_train: As in `gsm8k_task`.
        num_validation: As in `gsm8k_task`.
        chat: As in `gsm8k_task`.
        instruction: As in `gsm8k_task`.
        system_prompt: As in `gsm8k_task`.
        num_few_shot: As in `gsm8k_task`.
        few_shot_seed: As in `gsm8k_task`.
    """
    layout = Layout(chat, instruction, system_prompt, num_few_shot, few_shot_seed)

    def to_example(row: Row) -> Example:
        question = f"{text_cell(row, 'Body')} {text_cell(row, 'Question')}"
        return Example(
            prompt=layout.prompt(question),
            answer=answer_cell(row, "Answer"),
            columns=other_cells(row, ("Body", "Question", "Answer")),
            question=question,
        )

    rows = load_task_rows("ChilleD/SVAMP", None, train, validation)
    split = split_rows(*rows, num_train, num_validation)
    return layout.apply(task_of_rows("svamp", *split, to_example))


def math_task(
    train: Source | None = None,
    validation: Source | None = None,
    *,
    level: int | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    chat: bool = False,
    instruction: str = IN_A_BOX,
    system_prompt: str | None = None,
    num_few_shot: int = 0,
    few_shot_seed: int = 0,
) -> Task:
    r"""Return MATH, or one of its levels, graded by `math_verify`.

    As `gsm8k_task`, from columns problem, solution, level and type, of which level and type go to
    the reward functions. The reference answer is the column answer where there is one, and
    otherwise the last `\boxed{...}` of the column solution. With `level`, 1 to 5, only that level's
    problems are kept, before rows are counted; the column holds numbers or texts such as "Level 3".

    Args:
        train: A local file or folder with these columns; None for the hub's.
        validation: As in `gsm8k_task`.
        level: 1 to 5; None for all.
        num_train: As in `gsm8k_task`.
        num_validation: As in `gsm8k_task`.
        chat: As in `gsm8k_task`.
        instruction: As in `gsm8k_task`.
        system_prompt: As in `gsm8k_task`.
        num_few_shot: As in `gsm8k_task`.
        few_shot_seed: As in `gsm8k_task`.

    Raises:
        ProxstepError: A source cannot be read, a row has no answer, or no problem has the level.
    """
    if level is not None and level not in LEVELS:
        raise ProxstepError(f"level is {level!r}; choose one of {', '.join(map(str, LEVELS))}")
    layout = Layout(chat, instruction, system_prompt, num_few_shot, few_shot_seed)

    def to_example(row: Row) -> Example:
        solution = text_cell(row, "solution") if _has(row, "solution") else None
        if solution is not None and not chat:
            solution = f" {solution}"
        return Example(
            prompt=layout.prompt(text_cell(row, "problem")),
            answer=_reference(row),
            solution=solution,
            columns=other_cells(row, ("problem", "solution", "answer")),
            question=text_cell(row, "problem"),
        )

    train_rows, validation_rows = load_task_rows(HUB_ID, None, train, validation)
    if level is not None:
        train_rows = _of_level(train_rows, level)
        if validation_rows is not None:
            validation_rows = _of_level(validation_rows, level)
    split = split_rows(train_rows, validation_rows, num_train, num_validation)
    return layout.apply(task_of_rows("math", *split, to_example))


def _reference(row: Row) -> str:
    if _has(row, "answer"):
        return answer_cell(row, "answer")
    answer = boxed_answer(text_cell(row, "solution"))
    if answer is None:
        raise ProxstepError(
            f"{row.where}: column 'solution' has no \\boxed{{...}}; put the final answer in one, "
            "or into a column 'answer'"
        )
    return answer


def _has(row: Row, column: str) -> bool:
    """Whether a row has a value; Parquet fills with None what only other rows have."""
    return row.values.get(column) is not None


def _of_level(rows: list[Row], level: int) -> list[Row]:
    """Return a level's rows; raise where there is none."""
    kept = [row for row in rows if _level(row) == level]
    if not kept:
        raise ProxstepError(
            f"{rows[0].where}: neither this nor any other row has level {level}; choose another "
            "level, or null for all"
        )
    return kept


def _level(row: Row) -> int | None:
    """Return a row's level, None where the data say "Level ?"; raise where it is none.

    >>> [_level(Row("line 1", {"level": level})) for level in ("Level 3", 5, 4.0)]
    [3, 5, 4]
    """
    value = cell(row, "level")
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    text = str(whole).removeprefix("Level ")
    if text == "?":
        return None
    if not re.fullmatch("[1-5]", text):
        raise ProxstepError(
            f"{row.where}: column 'level' is {value!r:.80}; write 1 to 5, or \"Level 1\" to "
            '"Level 5"'
        )
    return int(text)


def load_task_rows(
    hub_id: str, config: str | None, train: Source | None, validation: Source | None
) -> tuple[list[Row], list[Row] | None]:
    """Return training and validation rows, from the hub where no source is given."""
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
    """Return a task from rows; raise where a number is graded and an answer is not one.

    Every example has every row's columns, None where its own row lacks one, as in a Parquet file:
    what reward functions are called with does not depend on the batch.
    """
    graded_by = REWARDS[name] if rewards is None else rewards

    def checked(row: Row) -> Example:
        example = to_example(row)
        if "numeric_answer" in graded_by and reference_number(example.answer) is None:
            raise ProxstepError(f"{row.where}: the answer {example.answer!r:.80} {NOT_A_NUMBER}")
        if not set(CODE_REWARDS).isdisjoint(graded_by):
            try:
                problem_of(example.columns)
            except ProxstepError as error:
                raise ProxstepError(f"{row.where}: {error}") from None
        return example

    of_train, of_validation = ([checked(row) for row in rows] for rows in (train, validation))
    names = dict.fromkeys(name for each in (*of_train, *of_validation) for name in each.columns)
    return Task(
        name,
        [_with_columns(each, names) for each in of_train],
        [_with_columns(each, names) for each in of_validation],
        graded_by,
    )


def _with_columns(example: Example, names: Iterable[str]) -> Example:
    return replace(example, columns={name: example.columns.get(name) for name in names})

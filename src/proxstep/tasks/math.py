r"""MATH: competition problems in seven subjects and five levels (arXiv 2103.03874)."""

from __future__ import annotations

import re

from proxstep.errors import ProxstepError
from proxstep.rewards import boxed_answer
from proxstep.tasks.base import Example, Task
from proxstep.tasks.cells import answer_cell, cell, other_cells, text_cell
from proxstep.tasks.data import Row
from proxstep.tasks.rows import Source, load_task_rows, question_prompt, split_rows, task_of_rows

LEVELS = range(1, 6)
# The mirror and the words of verl's examples/data_preprocess/math_dataset.py.
HUB_ID = "DigitalLearningGmbH/MATH-lighteval"
IN_A_BOX = r" Let's think step by step and output the final answer within \boxed{}."


def math_task(
    train: Source | None = None,
    validation: Source | None = None,
    *,
    level: int | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    chat: bool = False,
    instruction: str = IN_A_BOX,
) -> Task:
    r"""Return MATH, or one of its levels.

    The reference answer is the column answer where there is one, and otherwise the last
    `\boxed{...}` of the column solution. A plain prompt is "Question: ...\nAnswer:", and its
    solution begins with a space.

    Args:
        train: A local file or folder with columns problem, solution, level and type; None for the
            hub's mirror.
        validation: The same. None for the hub's test split where train is None too, otherwise for
            the last `num_validation` rows of train.
        level: Keep only this level's problems, 1 to 5, of training and validation; None for all.
            The column level holds numbers or texts such as "Level 3".
        num_train: As in `table_task`, of what is kept.
        num_validation: As in `table_task`, of what is kept.
        chat: Whether prompts are a user's chat message rather than plain text.
        instruction: Text put after the problem; the default asks for the answer format.

    Returns:
        The task, graded by `math_verify`. The columns level and type go to the reward functions.

    Raises:
        ProxstepError: A source cannot be read, a row has no answer, or no problem has the level.
    """
    if level is not None and level not in LEVELS:
        raise ProxstepError(f"level is {level!r}; choose one of {', '.join(map(str, LEVELS))}")

    def to_example(row: Row) -> Example:
        solution = text_cell(row, "solution") if _has(row, "solution") else None
        if solution is not None and not chat:
            solution = f" {solution}"
        return Example(
            prompt=question_prompt(text_cell(row, "problem") + instruction, chat),
            answer=_reference(row),
            solution=solution,
            columns=other_cells(row, ("problem", "solution", "answer")),
        )

    train_rows, validation_rows = load_task_rows(HUB_ID, None, train, validation)
    if level is not None:
        train_rows = _of_level(train_rows, level)
        if validation_rows is not None:
            validation_rows = _of_level(validation_rows, level)
    split = split_rows(train_rows, validation_rows, num_train, num_validation)
    return task_of_rows("math", *split, to_example)


def _reference(row: Row) -> str:
    """Return the reference answer of a row."""
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

    >>> _level(Row("line 1", {"level": "Level 3"})), _level(Row("line 2", {"level": 5}))
    (3, 5)
    """
    value = cell(row, "level")
    text = str(value).removeprefix("Level ")
    if text == "?":
        return None
    if not re.fullmatch("[1-5]", text):
        raise ProxstepError(
            f"{row.where}: column 'level' is {value!r:.80}; write 1 to 5, or \"Level 1\" to "
            '"Level 5"'
        )
    return int(text)

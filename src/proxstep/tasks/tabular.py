"""Tasks read from rows: any table with a prompt and an answer, GSM8K and SVAMP."""

from __future__ import annotations

from proxstep.errors import ProxstepError
from proxstep.tasks.base import REWARDS, Example, Task
from proxstep.tasks.cells import answer_cell, other_cells, prompt_cell, text_cell
from proxstep.tasks.data import Row, load_rows
from proxstep.tasks.rows import (
    Source,
    load_task_rows,
    question_prompt,
    split_rows,
    task_of_rows,
)

# Source: verl, examples/data_preprocess/gsm8k.py.
STEP_BY_STEP = ' Let\'s think step by step and output the final answer after "####".'


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

    Returns:
        The task. All other columns go to the reward functions.

    Raises:
        ProxstepError: A source cannot be read or a row is not as described.
    """

    def to_example(row: Row) -> Example:
        return Example(
            prompt=prompt_cell(row, prompt_column),
            answer=answer_cell(row, answer_column),
            solution=text_cell(row, solution_column) if solution_column else None,
            columns=other_cells(row, (prompt_column, answer_column, solution_column)),
        )

    train_rows = load_rows(train, config, train_split)
    test_rows = None if validation is None else load_rows(validation, config, validation_split)
    split = split_rows(train_rows, test_rows, num_train, num_validation)
    return task_of_rows("table", *split, to_example, rewards)


def gsm8k_task(
    train: Source | None = None,
    validation: Source | None = None,
    *,
    num_train: int | None = None,
    num_validation: int | None = None,
    chat: bool = False,
    instruction: str = STEP_BY_STEP,
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

    Returns:
        The task, graded by the final number.

    Raises:
        ProxstepError: A source cannot be read, a row lacks a column or an answer lacks its "####".
    """

    def to_example(row: Row) -> Example:
        solution = text_cell(row, "answer")
        _, marker, answer = solution.rpartition("####")
        if not marker:
            raise ProxstepError(
                f"{row.where}: column 'answer' has no \"####\"; put it before the final answer"
            )
        return Example(
            prompt=question_prompt(text_cell(row, "question") + instruction, chat),
            answer=answer.strip(),
            solution=solution if chat else f" {solution}",
            columns=other_cells(row, ("question", "answer")),
        )

    rows = load_task_rows("openai/gsm8k", "main", train, validation)
    return task_of_rows("gsm8k", *split_rows(*rows, num_train, num_validation), to_example)


def svamp_task(
    train: Source | None = None,
    validation: Source | None = None,
    *,
    num_train: int | None = None,
    num_validation: int | None = None,
    chat: bool = False,
    instruction: str = STEP_BY_STEP,
) -> Task:
    """Return SVAMP: one-step word problems without worked solutions (arXiv 2103.07191).

    Args:
        train: A local file or folder with columns Body, Question and Answer; None for the hub's.
        validation: As in `gsm8k_task`.
        num_train: As in `table_task`.
        num_validation: As in `table_task`.
        chat: As in `gsm8k_task`.
        instruction: As in `gsm8k_task`.

    Returns:
        The task, graded by the final number.

    Raises:
        ProxstepError: A source cannot be read or a row lacks a column.
    """

    def to_example(row: Row) -> Example:
        question = f"{text_cell(row, 'Body')} {text_cell(row, 'Question')}{instruction}"
        return Example(
            prompt=question_prompt(question, chat),
            answer=answer_cell(row, "Answer"),
            columns=other_cells(row, ("Body", "Question", "Answer")),
        )

    rows = load_task_rows("ChilleD/SVAMP", None, train, validation)
    return task_of_rows("svamp", *split_rows(*rows, num_train, num_validation), to_example)

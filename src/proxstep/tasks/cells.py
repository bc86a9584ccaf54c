"""Checked values of a row: prompts, answers and texts. Every error says which row and column."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.tasks.base import Prompt
from proxstep.tasks.data import Row

# Arguments that reward functions receive besides the data's columns.
RESERVED_COLUMNS = ("prompts", "completions", "answer")


def cell(row: Row, column: str) -> Any:
    """Return a value; raise where the row does not have the column, with the nearest names."""
    if column in row.values:
        return row.values[column]
    close = difflib.get_close_matches(column, row.values, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    names = ", ".join(row.values) or "none"
    raise ProxstepError(
        f"{row.where}: there is no column {column!r}{hint}; name one of its columns: {names}"
    )


def text_cell(row: Row, column: str) -> str:
    """Return a text; raise where it is not a string or is blank."""
    return _checked_text(cell(row, column), f"{row.where}: column {column!r}")


def answer_cell(row: Row, column: str) -> str:
    """Return a text or a number as text, whole floats without ".0"; raise where it is neither.

    >>> answer_cell(Row("line 1", {"Answer": 145.0}), "Answer")
    '145'
    """
    answer = cell(row, column)
    if isinstance(answer, float) and math.isfinite(answer):
        return str(int(answer)) if answer.is_integer() else repr(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    return text_cell(row, column).strip()


def prompt_cell(row: Row, column: str) -> Prompt:
    """Return a prompt, a text or chat messages; raise where it is neither or is empty."""
    prompt = cell(row, column)
    if not isinstance(prompt, list):
        return text_cell(row, column)
    if not prompt:
        raise ProxstepError(f"{row.where}: column {column!r} has no messages; give at least one")
    where = f"{row.where}: column {column!r}"
    return [_message(message, f"{where}, message {i}") for i, message in enumerate(prompt, 1)]


def other_cells(row: Row, used: Collection[str | None]) -> dict[str, Any]:
    """Return the columns that are not used; raise where one has the name of a reward argument."""
    others = {column: value for column, value in row.values.items() if column not in used}
    for column in RESERVED_COLUMNS:
        if column in others:
            raise ProxstepError(
                f"{row.where}: column {column!r} has the name of an argument of reward functions; "
                "rename or remove the column"
            )
    return others


def _message(message: Any, where: str) -> dict[str, str]:
    """Return a chat message with a role and a content and nothing else."""
    if not isinstance(message, dict):
        raise ProxstepError(
            f'{where} is a {type(message).__name__}; give an object with "role" and "content"'
        )
    # Parquet fills the fields that only other messages have with None.
    unknown = [key for key, value in message.items() if value is not None]
    unknown = [key for key in unknown if key not in ("role", "content")]
    if unknown:
        raise ProxstepError(
            f'{where} has {unknown[0]!r}; only "role" and "content" are read, so remove it'
        )
    return {
        key: _checked_text(message.get(key), f'{where}: "{key}"') for key in ("role", "content")
    }


def _checked_text(text: Any, where: str) -> str:
    """Return a text as it is; raise where it is not a string or is blank."""
    if text is None:
        raise ProxstepError(f"{where} is missing; give a text")
    if not isinstance(text, str):
        raise ProxstepError(f"{where} is a {type(text).__name__}; give a text")
    if not text.strip():
        raise ProxstepError(f"{where} is empty; give a text or remove the row")
    return text

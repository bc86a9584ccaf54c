"""Rows of local files, local folders and the Hugging Face hub, and their checked values.

pyarrow and datasets are imported where they are needed: neither is needed to import proxstep.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from proxstep.errors import ProxstepError, did_you_mean
from proxstep.hub import hub_or_cache
from proxstep.tasks.base import Prompt

JSONL_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIX = ".parquet"
# Arguments that reward functions receive besides the data's columns.
RESERVED_COLUMNS = ("prompts", "completions", "truncated")


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        where: Where the row is, for error messages: "train.jsonl, line 3".
        values: The row's values by column name.
    """

    where: str
    values: dict[str, Any]


def load_rows(source: str | Path, config: str | None = None, split: str = "train") -> list[Row]:
    """Return the rows of a local file, a local folder or a data set on the hub.

    Args:
        source: A path to a .jsonl, .json or .parquet file; or a folder or hub id that
            `datasets.load_dataset` reads.
        config: Name of the data set's configuration; for a folder or hub id only.
        split: Name of the split; for a folder, a hub id, or a JSON file with several.

    Returns:
        All rows, at least one.

    Raises:
        ProxstepError: The source cannot be read or has no rows.
    """
    path = Path(source)
    if path.is_file() or _suffix(path) in (*JSONL_SUFFIXES, PARQUET_SUFFIX):
        return read_rows(path, split)
    return load_hub_rows(str(source), config, split)


def read_rows(path: str | Path, split: str = "train") -> list[Row]:
    """Return the rows of a local file: JSON Lines (blank lines are skipped), JSON or Parquet.

    Args:
        path: A path that ends in .jsonl, .json or .parquet. What ends in .json may also be one
            array of objects, or one object with an array for each split.
        split: Name of the split, for a file with several.

    Returns:
        All rows, at least one. Lines and rows are counted from 1.

    Raises:
        ProxstepError: The file is missing, malformed or empty, or its suffix is another.
    """
    path = Path(path)
    if not path.is_file():
        raise ProxstepError(f"{path} is not a file; check the path")
    if _suffix(path) in JSONL_SUFFIXES:
        rows = _read_json(path, split)
    elif _suffix(path) == PARQUET_SUFFIX:
        rows = _read_parquet(path)
    else:
        known = ", ".join((*JSONL_SUFFIXES, PARQUET_SUFFIX))
        raise ProxstepError(f"{path} has an unknown file type; give a file that ends in {known}")
    if not rows:
        raise ProxstepError(f"{path} has no rows; give a file with at least one")
    return rows


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def load_hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """Return the rows of a data set that `datasets.load_dataset` finds.

    Args:
        name: A hub id, such as "openai/gsm8k", or a local folder.
        config: Name of the configuration, or None for the only one.
        split: Name of the split.

    Returns:
        All rows, at least one, counted from 1.

    Raises:
        ProxstepError: The data set, configuration or split does not exist or cannot be read.
    """
    what = f"data set {name!r}" + (f" ({config})" if config else "") + f", split {split!r}"
    remedy = "check the name and the connection, or give a local .jsonl or .parquet file"
    if not name.strip():
        raise ProxstepError(f"{what} has no name; {remedy}")
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ProxstepError(f"{what} needs `pip install proxstep[train]` ({error})") from error
    try:
        with hub_or_cache(name):
            rows = datasets.load_dataset(name, config, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # ValueError: no such configuration or split. RuntimeError: the data set is a script.
        reason = " ".join(str(error).split())
        raise ProxstepError(f"{what} cannot be loaded: {reason:.300}; {remedy}") from error
    if not len(rows):
        raise ProxstepError(f"{what} has no rows; choose another split")
    features = getattr(rows, "features", None)
    values: Iterable[dict[str, Any]] = map(dict, rows)
    if features is not None:
        values = (_short_floats(row, features.arrow_schema) for row in values)
    return [Row(f"{what}, row {number}", row) for number, row in enumerate(values, start=1)]


def _read_json(path: Path, split: str) -> list[Row]:
    """Return one row per line that is not blank, or the items of a file that is one document."""
    content = path.read_bytes()
    if _suffix(path) == ".json" and (document := _document(path, content)) is not None:
        return _items(path, document, split)
    lines = enumerate(content.split(b"\n"), start=1)
    numbered = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    return [Row(where, json_object(line, where)) for where, line in numbered]


def _document(path: Path, content: bytes) -> Any:
    """Return what a JSON file holds as a whole, unless it is an object a line or malformed."""
    try:
        document = _loads(content)
    except (ValueError, RecursionError):  # the reader of lines says where it is malformed
        return None
    if isinstance(document, dict):
        return document if _has_splits(document) else None
    return document if isinstance(document, list) else None


def _has_splits(document: dict[str, Any]) -> bool:
    """Whether an object holds a list for each split, and is no row with a chat in it."""
    values = list(document.values())
    lists = [value for value in values if isinstance(value, list)]
    firsts = [value[0] for value in lists if value and isinstance(value[0], dict)]
    if any({"role", "content"} <= first.keys() for first in firsts):
        return False
    return bool(lists) and all(isinstance(value, list | dict) for value in values)


def _items(path: Path, document: Any, split: str) -> list[Row]:
    """Return the objects of a JSON array, or of one split's array."""
    where = str(path)
    if isinstance(document, dict):
        if split not in document:
            raise ProxstepError(
                f"{path} has no split {split!r}{did_you_mean(split, document)}; it has "
                f"{', '.join(document)}: name one by task.train_split or task.validation_split"
            )
        document, where = document[split], f"{path}, split {split!r}"
    if not isinstance(document, list):
        raise ProxstepError(f"{where} is a JSON {type(document).__name__}; give a list of objects")
    rows = []
    for number, values in enumerate(document, start=1):
        if not isinstance(values, dict):
            raise ProxstepError(
                f"{where}, item {number}: a JSON {type(values).__name__}, not an object; "
                "write a list of objects"
            )
        rows.append(Row(f"{where}, item {number}", values))
    return rows


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object on one line, which a message calls `where`."""
    try:
        values = _loads(line)
    except json.JSONDecodeError as error:
        raise ProxstepError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}); "
            "write one JSON object per line"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, thousands of digits, too deep
        raise ProxstepError(f"{where}: not readable ({error}); correct the line") from error
    if not isinstance(values, dict):
        raise ProxstepError(
            f"{where}: a JSON {type(values).__name__}, not an object; write one object per line"
        )
    return values


class _TwiceError(ValueError):
    pass


def _loads(content: bytes) -> Any:
    """Return what JSON says; raise where an object has a key twice, of which one is lost."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _TwiceError(f"an object has the key {twice!r} twice")
        return found

    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=once)


def _read_parquet(path: Path) -> list[Row]:
    """Return one row per Parquet row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ProxstepError(f"{path} needs `pip install proxstep[train]` ({error})") from error
    try:
        table = parquet.read_table(path)
        values = [_short_floats(row, table.schema) for row in table.to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ProxstepError(f"{path} is not a readable Parquet file ({reason:.300})") from error
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(values, start=1)]


def _short_floats(value: Any, kind: Any) -> Any:
    """Return a value of a pyarrow type or schema, numbers of half and single precision shortest.

    The float32 nearest to 0.1 is 0.10000000149 in double precision; what was written is 0.1.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(value, dict) and (isinstance(kind, pyarrow.Schema) or types.is_struct(kind)):
        return {key: _short_floats(each, kind.field(key).type) for key, each in value.items()}
    if isinstance(value, list) and types.is_map(kind):  # pairs of a key and a value
        inside = (kind.key_type, kind.item_type)
        return [tuple(map(_short_floats, pair, inside)) for pair in value]
    if isinstance(value, list) and hasattr(kind, "value_type"):  # each kind of list
        return [_short_floats(each, kind.value_type) for each in value]
    if isinstance(value, float) and (types.is_float32(kind) or types.is_float16(kind)):
        return _shortest(value, "f" if types.is_float32(kind) else "e")
    return value


def _shortest(value: float, code: str) -> float:
    """Return the number of the fewest digits that rounds to a value in struct's format.

    >>> _shortest(0.10000000149011612, "f"), _shortest(16777216.0, "f")
    (0.1, 16777216.0)
    """
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.unpack(code, struct.pack(code, short))[0] == value:
                return short
        except OverflowError:  # the largest number, rounded up
            continue
    return value


def cell(row: Row, column: str) -> Any:
    """Return a value; raise where the row does not have the column, with the nearest names.

    A column inside another has a dotted path: "reward_model.ground_truth".
    """
    if column in row.values:
        return row.values[column]
    values: Any = row.values
    inside = ""
    for name in column.split("."):
        if not isinstance(values, dict) or name not in values:
            known = values if isinstance(values, dict) else {}
            hint, names = did_you_mean(name, known), ", ".join(map(str, known)) or "none"
            raise ProxstepError(
                f"{row.where}: there is no column {column!r}{hint}; name one of its columns"
                f"{f' in {inside}' if inside else ''}: {names}"
            )
        values, inside = values[name], f"{inside}.{name}" if inside else name
    return values


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
    if isinstance(answer, Decimal) and answer.is_finite():
        return f"{answer:f}"
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
    """Return the columns that are not used; raise where one has the name of a reward argument.

    A column `answer` beside the one that holds the reference answers is left out: reward functions
    get the reference under that name.
    """
    used = (*used, "answer")
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
    """Return a text unchanged; raise where it is not a string or is blank."""
    if text is None:
        raise ProxstepError(f"{where} is missing; give a text")
    if not isinstance(text, str):
        raise ProxstepError(f"{where} is a {type(text).__name__}; give a text")
    if not text.strip():
        raise ProxstepError(f"{where} is empty; give a text or remove the row")
    return text

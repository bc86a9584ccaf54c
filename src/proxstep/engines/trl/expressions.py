"""Calls that can be made and can be written out, so that a printed script is the run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from proxstep.errors import ProxstepError

_WIDTH = 70
"""Longest argument that stays on one line; something comes before it."""


class Name(NamedTuple):
    """Something that is imported from a module."""

    module: str
    name: str


class Call(NamedTuple):
    """A call of something that is imported; its arguments are plain values or expressions."""

    function: Name
    keywords: Mapping[str, Any]


class Shared(NamedTuple):
    """A count that the ranks of a run share out evenly, and the recipe's key it comes from."""

    count: int
    key: str


class Code(NamedTuple):
    """An expression that a script computes for itself."""

    text: str


def make(value: Any, world_size: int) -> Any:
    """Return what an expression stands for.

    Args:
        value: An expression, a plain value, or a list of them; no `Code`.
        world_size: Ranks of the run.

    Raises:
        ProxstepError: If the ranks cannot share a count out evenly.
    """
    if isinstance(value, Name):
        return getattr(importlib.import_module(value.module), value.name)
    if isinstance(value, Call):
        function = make(value.function, world_size)
        return function(**{name: make(each, world_size) for name, each in value.keywords.items()})
    if isinstance(value, Shared):
        if value.count % world_size:
            raise ProxstepError(
                f"{value.key}: {value.count} cannot be shared out over {world_size} ranks evenly; "
                "launch a number of them that divides it"
            )
        return value.count // world_size
    if isinstance(value, list):
        return [make(each, world_size) for each in value]
    return value


def write(value: Any, indent: int = 0) -> str:
    """Return an expression as Python code; what is too long for a line gets one for each part.

    Args:
        value: An expression, a plain value, or a list of them.
        indent: Spaces before the lines after the first.
    """
    if isinstance(value, Name):
        return value.name
    if isinstance(value, Shared):
        return f"{value.count} // world_size"
    if isinstance(value, Code):
        return value.text
    if isinstance(value, Call):
        parts = [f"{key}={write(each, indent + 4)}" for key, each in value.keywords.items()]
        return _listed(f"{value.function.name}(", parts, ")", indent)
    if isinstance(value, list):
        return _listed("[", [write(each, indent + 4) for each in value], "]", indent)
    if isinstance(value, tuple):
        return "(" + "".join(f"{write(each, indent)}, " for each in value).rstrip() + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(k)}: {write(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _listed(start: str, parts: list[str], end: str, indent: int) -> str:
    """Return the parts on one line, or where they do not fit on one line each."""
    line = f"{start}{', '.join(parts)}{end}"
    if "\n" not in line and indent + len(line) <= _WIDTH:
        return line
    inside = "".join(" " * (indent + 4) + f"{part},\n" for part in parts)
    return f"{start}\n{inside}{' ' * indent}{end}"


def imports_of(value: Any) -> set[tuple[str, str]]:
    """Return the module and name of everything that an expression imports."""
    if isinstance(value, Name):
        return {(value.module, value.name)}
    if isinstance(value, Call):
        below = [imports_of(each) for each in value.keywords.values()]
        return imports_of(value.function).union(*below)
    if isinstance(value, list):
        return set().union(*map(imports_of, value))
    return set()

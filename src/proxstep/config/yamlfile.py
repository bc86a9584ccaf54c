"""Recipes in YAML 1.2: 1e-6 is a number, 12:30 is text, a key given twice is a mistake.

So are another version of YAML, in which 12:30 is 750, and a value that contains itself, or so much
that nobody wrote it.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError

from proxstep.errors import ProxstepError

_MISTAKES = (YAMLError, ValueError, RecursionError)
"""Impossible dates, endless numbers and deep nesting are no YAMLErrors."""
_DIRECTIVE = re.compile(r"(\s*(#.*)?\n)*%")
_MOST_LEVELS, _MOST_VALUES = 20, 10_000


class _Composer(Composer):
    """Refuses deep nesting before it takes time."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._level += 1
        if self._level > _MOST_LEVELS:
            mark = self.parser.peek_event().start_mark
            raise ComposerError(None, None, f"more than {_MOST_LEVELS} levels deep", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


class _Constructor(SafeConstructor):
    """Says in which line an integer cannot be read."""

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > 1_000:
            raise _mistake(node, f"an integer of {len(node.value):,} digits")
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            raise _mistake(node, f"{node.value!r:.40} is no integer") from None


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)


def _mistake(node: Any, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Constructor = _Composer, _Constructor
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1000
    return yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ProxstepError: Naming the file and, where it is known, the line.
    """
    if path.is_dir():
        raise ProxstepError(f"{path}: a folder, not a recipe file; proxstep recipes lists examples")
    if not path.is_file():
        raise ProxstepError(f"{path}: no such recipe file; proxstep recipes lists examples")
    try:
        data = _load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ProxstepError(f"{path}: not a text file in UTF-8; a recipe is YAML") from None
    except _MISTAKES as error:
        raise ProxstepError(f"{path}{_line(error)}: not valid YAML: {_problem(error)}") from None
    if not isinstance(data, dict):
        raise ProxstepError(f"{path}: a recipe is a YAML mapping of keys to values")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Return one value.

    Raises:
        ProxstepError: Calling the place by `where`.
    """
    try:
        return _load(text)
    except _MISTAKES as error:
        raise ProxstepError(
            f"{where}: {text!r:.80} is not a valid YAML value: {_problem(error)}"
        ) from None


def _load(text: str) -> Any:
    """Return what a text holds, if it is a tree that somebody may have written."""
    if _DIRECTIVE.match(text):
        raise YAMLError("recipes are YAML 1.2: remove the line that begins with %")
    data = _yaml().load(text)
    _size(data, "", {})
    return data


def _size(value: Any, key: str, known: dict[int, int]) -> int:
    """Return how many values one is made of; those that anchors name are looked at once."""
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise YAMLError(f"{key or 'it'} holds a NUL or half a character (a lone surrogate)")
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        if known[id(value)] == 0:
            raise YAMLError(f"{key} contains itself, by its anchor")
        return known[id(value)]
    known[id(value)] = 0
    items = value.items() if isinstance(value, dict) else enumerate(value)
    size = 1
    for name, part in items:
        size += _size(part, f"{key}.{name}".strip("."), known)
    if size > _MOST_VALUES:
        raise YAMLError(f"{key or 'it'} has more than {_MOST_VALUES:,} values")
    known[id(value)] = size
    return size


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    if not isinstance(error, YAMLError):
        return "a value cannot be read"
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return problem.partition(" with value ")[0]  # of a key given twice


def dump_yaml(data: dict[str, Any]) -> str:
    """Return YAML that `read_yaml` reads back to the same."""
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()

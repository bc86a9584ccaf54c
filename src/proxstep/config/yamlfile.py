"""Recipes in YAML 1.2: 1e-6 is a number, 12:30 is text, a key given twice is a mistake."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from proxstep.errors import ProxstepError

_MISTAKES = (YAMLError, ValueError, RecursionError)
"""Impossible dates, endless numbers and deep nesting are no YAMLErrors."""


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1000
    return yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ProxstepError: Naming the file and, where it is known, the line.
    """
    if not path.is_file():
        raise ProxstepError(f"{path}: no such recipe file; recipes/ has examples")
    try:
        data = _yaml().load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ProxstepError(f"{path}: not a text file in UTF-8; a recipe is YAML") from None
    except _MISTAKES as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a value cannot be read"
        problem = problem.partition(" with value ")[0]  # of a key given twice
        raise ProxstepError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ProxstepError(f"{path}: a recipe is a YAML mapping of keys to values")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Return one value.

    Raises:
        ProxstepError: Calling the place by `where`.
    """
    try:
        return _yaml().load(text)
    except _MISTAKES:
        raise ProxstepError(f"{where}: {text!r:.80} is not a valid YAML value") from None


def dump_yaml(data: dict[str, Any]) -> str:
    """Return YAML that `read_yaml` reads back to the same."""
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()

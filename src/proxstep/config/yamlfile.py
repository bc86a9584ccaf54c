"""YAML as people mean it: 1e-6 is a number, a key given twice is a mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from proxstep.errors import ProxstepError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as a string; this reads the number, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
        list("-+.0123456789"),
    )
    _side.yaml_implicit_resolvers = {
        first: sorted(resolvers, key=lambda pair: pair[0] == "tag:yaml.org,2002:float")
        for first, resolvers in _side.yaml_implicit_resolvers.items()
    }

_MISTAKES = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises: impossible dates, endless numbers and deep nesting are no YAMLErrors."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ProxstepError: Naming the file and, where it is known, the line.
    """
    if not path.is_file():
        raise ProxstepError(f"{path}: no such recipe file; recipes/ has examples")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise ProxstepError(f"{path}: not a text file in UTF-8; a recipe is YAML") from None
    except _MISTAKES as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a value cannot be read"
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
        return yaml.load(text, Loader=_Loader)
    except _MISTAKES:
        raise ProxstepError(f"{where}: {text!r:.80} is not a valid YAML value") from None


def dump_yaml(data: dict[str, Any]) -> str:
    """Return YAML that `read_yaml` reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

"""Recipes by name and as files, with what the command line puts on top; without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxstep.errors import ProxstepError, did_you_mean

_PACKAGE = Path(__file__).parents[1]
RECIPES = next(
    (f for f in (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes") if f.is_dir()),
    _PACKAGE / "recipes",
)
"""The folder of our recipes: in the installed package, or in the checkout."""


def recipe_names() -> list[str]:
    """Return the names of our recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Return the path of the file that is named, or of our recipe of that name.

    Raises:
        ProxstepError: There is no such file, and one of ours has a name like it.
    """
    path, ours = Path(name), recipe_names()
    if path.exists() or path.name != str(name):
        return path
    if str(name) in ours:
        return RECIPES / f"{name}.yaml"
    if guess := did_you_mean(path.stem, ours):
        raise ProxstepError(f"{path}: no such recipe file{guess}")
    return path


def read_recipe(
    name: str | Path, overrides: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return what a recipe says, what goes on top of it, and where it is from.

    A relative path of a model, of data, of a reward or of `external_lib` in the file is relative to
    the file's folder, where it exists there; one in `overrides` is relative to the current folder.

    Args:
        name: A YAML file, or the name of one of our recipes.
        overrides: Pairs of a dotted key and a YAML value.

    Raises:
        ProxstepError: No such recipe, or it or a value is not YAML.
    """
    from proxstep.config.yamlfile import read_yaml

    path = find_recipe(name)
    changes = read_overrides(overrides)
    data = read_yaml(path)
    compare = data.get("compare")
    arms = compare.get("arms") if isinstance(compare, dict) else None
    for parts in ({"": data}, data.get("per_algorithm"), arms):
        for part in parts.values() if isinstance(parts, dict) else ():
            _find_files(part, path.parent)
    return data, changes, str(name)


def read_overrides(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return pairs of a dotted key and a YAML value as the mapping that they describe.

    Raises:
        ProxstepError: A value is not YAML, or a key is of a section that has a value.
    """
    from proxstep.config.yamlfile import parse_yaml

    changes: dict[str, Any] = {}
    for key, text in overrides:
        _set(changes, key, parse_yaml(text, f"--{key}"))
    return changes


def _set(target: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        below = target.setdefault(section, {})
        if not isinstance(below, dict):
            raise ProxstepError(f"--{key}: {section} was given a value already")
        target = below
    target[last] = value


def _find_files(part: Any, folder: Path) -> None:
    """Put a folder before the relative paths in a part of a recipe, where they exist there."""
    if not isinstance(part, dict) or folder == Path():
        return
    if "external_lib" in part:
        part["external_lib"] = _found(part["external_lib"], folder)
    for section, names in (("task", ("train", "validation", "rewards")), ("model", ("name",))):
        values = part.get(section)
        if not isinstance(values, dict):
            continue
        for name in names:
            value = values.get(name)
            if isinstance(value, list):
                values[name] = [_found(item, folder) for item in value]
            elif section == "task" or os.sep in str(value) or str(value).endswith(".gguf"):
                values[name] = _found(value, folder)  # a model's bare name is ours or the hub's


def _found(value: Any, folder: Path) -> Any:
    if not isinstance(value, str):
        return value
    place, colon, function = value.rpartition(":")
    path, rest = (place, colon + function) if place.endswith(".py") else (value, "")
    return f"{folder / path}{rest}" if path and (folder / path).exists() else value

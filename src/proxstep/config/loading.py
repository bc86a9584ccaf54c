"""Recipes as files and command lines: reading, overriding, resolving the algorithm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from proxstep.algorithms import ALGORITHMS
from proxstep.config.explain import explain
from proxstep.config.names import unknown_algorithm
from proxstep.config.reading import read_recipe
from proxstep.config.recipe import (
    Recipe,
    algorithm_names,
    meaning_of,
    recipe_of,
    undefined_composition,
)
from proxstep.config.sections import BUILTIN_MODELS
from proxstep.config.yamlfile import dump_yaml
from proxstep.errors import ProxstepError
from proxstep.isopo import PRESETS
from proxstep.rewards.modules import load_module


def load_recipe(
    path: str | Path,
    overrides: Sequence[tuple[str, str]] = (),
    part: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe, apply command-line overrides and check everything.

    Args:
        path: A YAML file, or the name of one of our recipes.
        overrides: Pairs of a dotted key and a YAML value, such as ("optimizer.learning_rate",
            "1e-5").
        part: What goes between the file and the overrides, such as an arm of a comparison.

    Returns:
        The recipe with every value resolved.

    Raises:
        ProxstepError: One message for whatever is wrong, naming file, key and remedy.
    """
    data, changes, source = read_recipe(path, overrides)
    return resolve(data, _merge(part or {}, changes, source), source)


def resolve(data: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> Recipe:
    """Return the recipe that a mapping and the changes on top of it describe.

    Args:
        data: What the recipe file says.
        changes: What goes on top, such as the command line's.
        source: Where `data` is from, for messages.

    Raises:
        ProxstepError: One message for whatever is wrong.
    """
    data, changes = dict(data), dict(changes)
    data.pop("compare", None)  # `proxstep compare` alone reads it
    library = changes.get("external_lib", data.get("external_lib"))
    if isinstance(library, str):
        load_module(library, f"{source}: external_lib {library}")
    for name in ALGORITHMS:
        if name in PRESETS and name != "reinforce":
            raise ProxstepError(
                f"{source}: algorithm {name}: a rule has that name; register the objective under "
                "another"
            )
    per_algorithm = data.pop("per_algorithm", None)
    for part in (per_algorithm, changes.pop("per_algorithm", None)):
        if part is not None and not isinstance(part, Mapping):
            raise ProxstepError(
                f"{source}: per_algorithm must map algorithms to parts of a recipe, got {part!r}"
            )
        per_algorithm = _merge(per_algorithm or {}, part or {}, source)
    algorithm = changes.get("algorithm", data.get("algorithm"))
    if algorithm is None:
        raise ProxstepError(
            f"{source}: algorithm is missing; choose one of {', '.join(algorithm_names())}"
        )
    for name in (algorithm, *per_algorithm):
        if meaning_of(str(name)) is None:
            where = "algorithm" if name == algorithm else "per_algorithm"
            raise ProxstepError(f"{source}: {unknown_algorithm(name, algorithm_names(), where)}")
    merged = meaning = meaning_of(str(algorithm)) or {}
    for name, part in per_algorithm.items():
        _check_part(str(name), part or {}, source)
    own = per_algorithm.get(algorithm) or {}
    for part in (data, own, changes):
        merged = _merge(merged, _without_empty_sections(part), source)
    _check_algorithm(algorithm, meaning, merged, source)
    recipe = recipe_of(ALGORITHMS[meaning["objective"]["name"]])
    try:
        return recipe.model_validate(merged)
    except ValidationError as error:
        raise ProxstepError(explain(error, source, recipe)) from None


def _check_part(name: str, part: Any, source: str) -> None:
    """Refuse keys and values of a part of per_algorithm, whether it is the one that is used or not.

    Raises:
        ProxstepError: Naming the part and the key.
    """
    place = f"{source}: per_algorithm.{name}"
    for key in ("algorithm", "external_lib"):
        if isinstance(part, Mapping) and key in part:
            raise ProxstepError(f"{place} cannot change the {key}")
    meaning = meaning_of(name) or {}
    merged = _merge(meaning, _without_empty_sections(part), place)
    _check_algorithm(name, meaning, merged, place)
    recipe = recipe_of(ALGORITHMS[meaning["objective"]["name"]])
    try:
        recipe.model_validate({"algorithm": name, **merged})
    except ValidationError as error:
        if any(detail["loc"] for detail in error.errors()):  # else it needs the rest of the recipe
            raise ProxstepError(explain(error, place, recipe)) from None


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return a recipe whose local model, data and reward files are found from any folder."""
    task, model = recipe.task, recipe.model
    sources: dict[str, Any] = {"train": _absolute(task.train)}
    sources["validation"] = _absolute(task.validation)
    sources["rewards"] = task.rewards and [_absolute_reward(spec) for spec in task.rewards]
    name = model.name
    if name not in BUILTIN_MODELS:
        name = _absolute(os.path.expanduser(name))
    return recipe.model_copy(
        update={
            "task": task.model_copy(update=sources),
            "model": model.model_copy(update={"name": name}),
            "external_lib": _absolute_file(recipe.external_lib),
        }
    )


def _absolute(source: str | None) -> str | None:
    """Return the absolute path of what exists here; anything else is a name on the hub."""
    return os.path.abspath(source) if source and os.path.exists(source) else source


def _absolute_reward(spec: str) -> str:
    place, colon, name = spec.rpartition(":")
    return f"{_absolute_file(place)}:{name}" if colon else spec


def _absolute_file(place: str | None) -> str | None:
    """Return the absolute path of a Python file; anything else is a module's name."""
    return _absolute(place) if place and place.endswith(".py") else place


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back."""
    return dump_yaml(recipe.model_dump())


def _check_algorithm(
    algorithm: str, meaning: Mapping[str, Any], merged: Mapping[str, Any], source: str
) -> None:
    """Refuse an objective or a geometry that is not the algorithm's."""
    objective, geometry = merged["objective"], merged["geometry"]
    if not isinstance(objective, dict) or not isinstance(geometry, dict):
        return  # the recipe's own check says it better
    name, rule = objective["name"], geometry["rule"]
    if name == meaning["objective"]["name"] and rule == meaning["geometry"]["rule"]:
        return
    if meaning_of(f"{rule}+{name}"):
        pair = f"for the two together say algorithm {rule}+{name}"
        remedy = undefined_composition(rule, name) or pair
    elif rule == "none" and meaning_of(str(name)):
        remedy = f"say algorithm {name}"
    else:
        remedy = "leave the two keys to the algorithm"
    raise ProxstepError(
        f"{source}: algorithm {algorithm} does not go with objective.name {name} and geometry.rule "
        f"{rule}: {remedy}"
    )


def _without_empty_sections(part: Any) -> Any:
    """Return a part of a recipe without headings that nothing follows: YAML reads null."""
    if not isinstance(part, Mapping):
        return part
    return {
        key: value
        for key, value in part.items()
        if value is not None
        or key not in Recipe.model_fields
        or Recipe.model_fields[key].annotation in (int, str)  # a value, not a heading
    }


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return base with over on top, section by section."""
    if not isinstance(over, Mapping):
        raise ProxstepError(f"{source}: expected a mapping of keys to values, got {over!r}")
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(dict(below or {}), value, source) if both else value
    return merged

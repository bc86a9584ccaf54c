"""Recipes as files and command lines: reading, overriding, errors with a remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from proxstep.config import (
    ALGORITHMS,
    ObjectiveSection,
    Recipe,
    meaning_of,
    undefined_composition,
)
from proxstep.errors import ProxstepError

_OBJECTIVES: dict[str, type[BaseModel]] = {
    get_args(section.model_fields["name"].annotation)[0]: section
    for section in get_args(get_args(ObjectiveSection)[0])
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as a string; this reads it as the number that everybody means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda pair: pair[0] == "tag:yaml.org,2002:float")
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe, apply command-line overrides and check everything.

    Args:
        path: A YAML file.
        overrides: Pairs of a dotted key and a YAML value, such as ("optimizer.learning_rate",
            "1e-5").

    Returns:
        The recipe with every value resolved.

    Raises:
        ProxstepError: One message for whatever is wrong, naming file, key and remedy.
    """
    path = Path(path)
    changes: dict[str, Any] = {}
    for key, text in overrides:
        _set(changes, key, _parse(text, f"--{key}"))
    return resolve(_read(path), changes, source=str(path))


def resolve(data: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> Recipe:
    """Return the recipe that a mapping and the changes on top of it describe.

    Args:
        data: What the recipe file says.
        changes: What goes on top, such as the command line's.
        source: Where `data` is from, for messages.

    Raises:
        ProxstepError: One message for whatever is wrong.
    """
    data = dict(data)
    per_algorithm = data.pop("per_algorithm", None) or {}
    algorithm = changes.get("algorithm", data.get("algorithm"))
    if algorithm is None:
        raise ProxstepError(
            f"{source}: algorithm is missing; choose one of {', '.join(ALGORITHMS)}"
        )
    if not isinstance(per_algorithm, dict):
        raise ProxstepError(f"{source}: per_algorithm must map algorithms to parts of a recipe")
    for name in (algorithm, *per_algorithm):
        if meaning_of(str(name)) is None:
            where = "algorithm" if name == algorithm else "per_algorithm"
            raise ProxstepError(
                f"{source}: {where} {name!r} is not known{_nearest(str(name), ALGORITHMS)}; choose "
                f"one of "
                f"{', '.join(ALGORITHMS)}, or RULE+OBJECTIVE such as isopo+opo"
            )
    meaning = meaning_of(algorithm) or {}
    merged = meaning
    for part in (data, per_algorithm.get(algorithm) or {}, changes):
        merged = _merge(merged, part, source)
    _check_algorithm(algorithm, meaning, merged, source)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise ProxstepError(_message(error, source)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def describe_keys() -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, sentence) for every key of a recipe, in order."""
    yield from _describe(Recipe, "")


def _describe(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if name == "objective" and not prefix:
            for objective, objective_section in _OBJECTIVES.items():
                for row in _describe(objective_section, "objective."):
                    if row[0] != "objective.name":
                        yield (f"{row[0]} ({objective})", *row[1:])
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _describe(field.annotation, f"{key}.")
            continue
        default = (
            "required" if field.is_required() else yaml.safe_dump(field.default).splitlines()[0]
        )
        kind = str(getattr(field.annotation, "__name__", field.annotation))
        kind = kind if field.annotation in (int, float, str, bool) else str(field.annotation)
        kind = re.sub(
            r"(typing\.|proxstep\.config\.|Literal|Annotated\[|, FieldInfo\(.*?\)\])", "", kind
        )
        yield key, kind, default, field.description or ""


def _check_algorithm(
    algorithm: str, meaning: Mapping[str, Any], merged: Mapping[str, Any], source: str
) -> None:
    """Refuse an objective or a geometry that is not the algorithm's."""
    objective, geometry = merged["objective"], merged["geometry"]
    if not isinstance(objective, dict) or not isinstance(geometry, dict):
        return  # the recipe's own check says it better
    if (objective["name"], geometry["rule"]) == (
        meaning["objective"]["name"],
        meaning["geometry"]["rule"],
    ):
        return
    pair = f"{geometry['rule']}+{objective['name']}"
    if meaning_of(pair):
        undefined = undefined_composition(geometry["rule"], objective["name"])
        remedy = undefined or f"for the two together say algorithm {pair}"
    else:
        remedy = "give the algorithm alone"
    raise ProxstepError(
        f"{source}: algorithm {algorithm} does not go with objective.name {objective['name']} and "
        f"geometry.rule "
        f"{geometry['rule']}: {remedy}"
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ProxstepError(f"{path}: no such recipe file; recipes/ has examples")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ProxstepError(f"{path}{line}: not valid YAML: {problem}") from None
    except UnicodeDecodeError:
        raise ProxstepError(f"{path}: not a text file in UTF-8; a recipe is YAML") from None
    if not isinstance(data, dict):
        raise ProxstepError(f"{path}: a recipe is a YAML mapping of keys to values")
    return data


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ProxstepError(f"{where}: {text!r} is not a valid YAML value") from None


def _set(target: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ProxstepError(f"--{key}: {section} was given a value already")
    target[last] = value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return base with over on top, section by section."""
    if not isinstance(over, Mapping):
        raise ProxstepError(f"{source}: expected a mapping of keys to values, got {over!r}")
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value, source) if both else value  # type: ignore[arg-type]
    return merged


def _message(error: ValidationError, source: str) -> str:
    """Return one line per mistake, in the user's terms."""
    lines = []
    for detail in error.errors(include_url=False):
        place = [str(part) for part in detail["loc"]]
        section = _section_of(place)
        if place[:1] == ["objective"] and len(place) > 1 and place[1] in _OBJECTIVES:
            del place[1]
        key = ".".join(place)
        if detail["type"] == "extra_forbidden":
            names = list(section.model_fields) if section else []
            lines.append(
                f"unknown key {key}{_nearest(place[-1], names)}; this section has "
                f"{', '.join(names)}"
            )
        elif not key:
            lines.append(detail["msg"].removeprefix("Value error, "))
        else:
            wrong = str(detail["msg"]).removeprefix("Value error, ")
            lines.append(f"{key}: {wrong[0].lower()}{wrong[1:]}, got {detail['input']!r}")
    return f"{source}: " + "\n  ".join(lines)


def _section_of(place: Sequence[str]) -> type[BaseModel] | None:
    """Return the section in which the last key of a place lies."""
    section: type[BaseModel] = Recipe
    for part in place[:-1]:
        if section is Recipe and part == "objective":
            continue
        if part in _OBJECTIVES and section is Recipe:
            section = _OBJECTIVES[part]
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return None
        section = found[0]
    return section


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""

"""A recipe's keys in words, and what is wrong with one."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from proxstep.algorithms import ALGORITHMS
from proxstep.config.names import did_you_mean_choice, unknown_key
from proxstep.config.objectives import section_of
from proxstep.config.recipe import Recipe
from proxstep.errors import shown


def describe_keys() -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, sentence) for every key of a recipe, in order."""
    yield from _describe(Recipe, "")


def _describe(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if section is Recipe and name == "objective":
            for algorithm in ALGORITHMS.values():
                own = _describe(section_of(algorithm), "objective.")
                for own_key, kind, default, text in own:
                    if own_key != "objective.name":
                        yield f"{own_key} ({algorithm.name})", kind, default, text
            continue
        below = _section_in(field.annotation)
        if below is None or type(None) in get_args(field.annotation):
            default = "required" if field.is_required() else _value(field.default)
            yield key, _kind(field.annotation), default, field.description or ""
        if below is not None:
            yield from _describe(below, f"{key}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation stands for, alone or as "section or null"."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _kind(annotation: Any) -> str:
    """Return a type in words."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(map(_kind, get_args(annotation)))
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "int", float: "float", str: "text", bool: "true | false"}[annotation]


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def explain(error: ValidationError, source: str, recipe: type[BaseModel] = Recipe) -> str:
    """Return one message with a line for every mistake, each naming its key.

    Args:
        error: What pydantic found.
        source: Where the values are from.
        recipe: The class that they were to be.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        place = _place(detail["loc"], recipe)
        key = ".".join(place)
        problem = str(detail["msg"]).removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            here = _names_at([str(part) for part in detail["loc"][:-1]], recipe)
            lines[key] = unknown_key(key, place[-1], here, _dotted(recipe), _owners())
        elif not key:
            lines[key] = problem
        elif detail["type"] in ("model_type", "model_attributes_type", "union_tag_not_found"):
            lines[key] = f"{key}: expected keys and values, got {shown(detail['input'])}"
        else:
            problem = f"{problem[0].lower()}{problem[1:]}"
            got = f", got {shown(detail['input'])}{_hint(detail)}"
            if detail["type"] == "literal_error" and lines.get(key, "").endswith(got):
                lines[key] = lines[key].removesuffix(got) + f", or {problem}{got}"
            else:
                lines.setdefault(key, f"{key}: {problem}{got}")
    return f"{source}: " + "\n  ".join(lines.values())


def _owners() -> dict[str, list[str]]:
    """Return which objectives have each key of their section."""
    owners: dict[str, list[str]] = {}
    for name, algorithm in ALGORITHMS.items():
        for key in algorithm.keys:
            owners.setdefault(key, []).append(name)
    return owners


def _dotted(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if below := _section_in(field.annotation):
            yield from _dotted(below, f"{prefix}{name}.")


def _hint(detail: Any) -> str:
    """Return the choice that may be meant, or what YAML 1.2 calls a word of YAML 1.1 or Python."""
    kind, value = detail["type"], detail["input"]
    if kind == "literal_error":
        return did_you_mean_choice(value, re.findall("'([^']*)'", detail["ctx"]["expected"]))
    word = value.lower() if isinstance(value, str) else ""
    if kind == "bool_type" and word in ("on", "yes", "y"):
        return "; YAML 1.2 writes true"
    if kind == "bool_type" and word in ("off", "no", "n"):
        return "; YAML 1.2 writes false"
    if kind in ("int_type", "float_type", "bool_type") and word:
        return "; write it without quotes" if re.fullmatch(_PLAIN, word) else ""
    return ""


_PLAIN = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|true|false"


def _place(location: Sequence[int | str], recipe: type[BaseModel]) -> list[str]:
    """Return the keys of a location, without the names of a union's branches."""
    place: list[str] = []
    section: type[BaseModel] | None = recipe
    for part in map(str, location):
        if section is not None and part in section.model_fields:
            place.append(part)
            section = _section_in(section.model_fields[part].annotation)
        elif section is None and part.isdigit():
            place[-1] = f"{place[-1]}[{part}]"
        elif section is not None and part != section.__name__:
            place.append(part)  # an unknown key
            section = None
    return place


def _names_at(location: Sequence[str], recipe: type[BaseModel]) -> Iterable[str]:
    """Return the keys known in the section at a location."""
    section: type[BaseModel] | None = recipe
    for part in location:
        if section is not None and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation)
    return section.model_fields if section else []

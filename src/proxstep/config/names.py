"""The names in a recipe: a misspelt one is found without torch, which takes seconds to import.

`keys.json` holds what `explain.describe_keys` yields; `make reference` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from proxstep.errors import ProxstepError, did_you_mean, shown

KEYS_FILE = Path(__file__).with_name("keys.json")
_NO_CHOICES = {"int", "float", "text", "mapping", "section", "true", "false"}


@cache
def described_keys() -> list[tuple[str, str, str, str]]:
    """Return (dotted key, type, default, sentence) of every key; an algorithm's own as KEY (NAME).

    >>> next(kind for key, kind, _, _ in described_keys() if key == "steps")
    'int'
    """
    return [tuple(row) for row in json.loads(KEYS_FILE.read_text(encoding="utf-8"))]


@cache
def _kinds(objective: str) -> dict[str, str]:
    """Return the type of each key of a recipe with that objective, sections included."""
    kinds: dict[str, str] = {}
    for described, kind, _, _ in described_keys():
        key, _, owner = described.partition(" ")
        if owner not in ("", f"({objective})"):
            continue
        above = key.rpartition(".")[0]
        if above and above not in kinds:
            kinds[above] = "section"
            if above == "objective":
                kinds["objective.name"] = "text"
        kinds[key] = kind
    return kinds


@cache
def _owners() -> dict[str, list[str]]:
    """Return which objectives have each key of their section."""
    owners: dict[str, list[str]] = {}
    for described, _, _, _ in described_keys():
        key, _, owner = described.partition(" ")
        if owner:
            owners.setdefault(key.removeprefix("objective."), []).append(owner.strip("()"))
    return owners


@cache
def _rules() -> list[str]:
    return choices_of(_kinds("")["geometry.rule"])


def task_names() -> list[str]:
    """Return what `task.name` may be."""
    return choices_of(_kinds("")["task.name"])


def known_algorithms() -> list[str]:
    """Return what `algorithm` may be, besides RULE+OBJECTIVE."""
    return [*_owners()["advantage"], *(r for r in _rules() if r not in ("none", "reinforce"))]


def objective_of(algorithm: str) -> str | None:
    """Return the objective that an algorithm's name stands for, None if it is unknown.

    >>> objective_of("isopo-natural+opo"), objective_of("isopo"), objective_of("grop")
    ('opo', 'reinforce', None)
    """
    rules = [rule for rule in _rules() if rule != "none"]
    found = rule_and_objective(algorithm, rules, _owners()["advantage"])
    return found[1] if found else None


def rule_and_objective(
    algorithm: str, rules: Container[str], objectives: Container[str]
) -> tuple[str, str] | None:
    """Return what an algorithm's name stands for, "none" for no rule; None if it is unknown.

    >>> rule_and_objective("isopo+opo", ["isopo"], ["opo"])
    ('isopo', 'opo')
    """
    rule, plus, objective = algorithm.partition("+")
    if not plus:
        rule, objective = ("none", rule) if rule in objectives else (rule, "reinforce")
    known = objective in objectives and (rule in rules or (rule == "none" and not plus))
    return (rule, objective) if known else None


def unknown_algorithm(name: Any, known: Sequence[str], where: str = "algorithm") -> str:
    """Return what to say of an algorithm that does not exist."""
    return (
        f"{where} {name!r} is not known{did_you_mean(name, known)}; choose one of "
        f"{', '.join(known)}, or RULE+OBJECTIVE such as isopo+opo"
    )


def unknown_key(
    key: str,
    name: str,
    here: Iterable[str],
    everywhere: Iterable[str],
    owners: Mapping[str, Sequence[str]],
) -> str:
    """Return what to say of a key that does not exist.

    Args:
        key: As it was given, with dots.
        name: Its last part.
        here: The names in its section.
        everywhere: All keys of the recipe, with dots.
        owners: The objectives that have each key of their section.
    """
    here = list(here)
    found = [other for other in everywhere if other.rpartition(".")[2] == name]
    if name in owners and f"objective.{name}" not in found:
        found.append(f"objective.{name} (of {', '.join(owners[name])})")
    if key.startswith("objective.") and name in owners:
        guess = f"; it belongs to {', '.join(owners[name])}"
    elif found:
        guess = f"; did you mean {' or '.join(found)}?"
    else:
        guess = did_you_mean(name, here)
    return f"unknown key {key}{guess} (known here: {', '.join(here)})"


def did_you_mean_choice(value: Any, choices: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest choice to a text."""
    return did_you_mean(value, choices) if isinstance(value, str) else ""


def check_names(data: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> None:
    """Refuse an algorithm, a key or a choice that does not exist, as `resolve` would.

    Args:
        data: What the recipe file says.
        changes: What goes on top, such as the command line's.
        source: Where `data` is from, for messages.

    Raises:
        ProxstepError: With a line for each.
    """
    algorithm = changes.get("algorithm", data.get("algorithm"))
    library = changes.get("external_lib", data.get("external_lib"))
    if algorithm is None or library is not None:
        return  # the recipe's own check says it, or knows what the library declares
    parts = [(str(algorithm), "algorithm", source, part) for part in (data, changes)]
    for part in (data, changes):
        if isinstance(per_algorithm := part.get("per_algorithm"), Mapping):
            parts += [
                (str(name), "per_algorithm", f"{source}: per_algorithm.{name}", own)
                for name, own in per_algorithm.items()
            ]
    for name, where, _, _ in parts:
        if objective_of(name) is None:
            raise ProxstepError(f"{source}: {unknown_algorithm(name, known_algorithms(), where)}")
    for place in dict.fromkeys(place for _, _, place, _ in parts):
        lines: dict[str, str] = {}
        for name, _, own_place, part in parts:
            if own_place == place and isinstance(part, Mapping):
                apart = ("per_algorithm", "compare")
                of_file = {key: value for key, value in part.items() if key not in apart}
                lines |= _mistakes(of_file if place == source else part, "", _kinds_of(name))
        if lines:
            raise ProxstepError(f"{place}: " + "\n  ".join(lines.values()))


def _kinds_of(algorithm: str) -> dict[str, str]:
    return _kinds(objective_of(algorithm) or "")


def _mistakes(part: Mapping[Any, Any], above: str, kinds: Mapping[str, str]) -> Iterator[Any]:
    """Yield (key, line) for each unknown name of a section and those in it."""
    for name, value in part.items():
        key = f"{above}{name}"
        if not isinstance(name, str) or "." in name or kinds.get(above[:-1]) == "mapping | null":
            continue  # the user's own, or left to the recipe's own check
        if key not in kinds:
            here = [k for k in kinds if k.rpartition(".")[0] == above[:-1]]
            below = [k.rpartition(".")[2] for k in here]
            yield key, unknown_key(key, name, below, kinds, _owners())
        elif isinstance(value, Mapping):
            yield from _mistakes(value, f"{key}.", kinds)
        elif (
            isinstance(value, str) and (choices := choices_of(kinds[key])) and value not in choices
        ):
            expected, guess = _alternatives(choices), did_you_mean_choice(value, choices)
            yield key, f"{key}: input should be {expected}, got {shown(value)}{guess}"


def choices_of(kind: str) -> list[str]:
    """Return the words that a value of a type may be, none where it may be anything else too.

    >>> choices_of("sequence | token"), choices_of("float | null")
    (['sequence', 'token'], [])
    """
    words = kind.removesuffix(" | null").split(" | ")
    return [] if any(w in _NO_CHOICES or w.startswith("list") for w in words) else words


def _alternatives(choices: Sequence[str]) -> str:
    """Return the choices as pydantic lists them."""
    quoted = [f"'{choice}'" for choice in choices]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)

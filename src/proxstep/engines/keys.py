"""What an engine makes of a recipe's keys: the dotted names, and refusing what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from proxstep.config.recipe import Recipe
from proxstep.config.sections import Section
from proxstep.errors import ProxstepError

Refusal = tuple[str, Callable[[Recipe], bool], str]
"""A dotted key, when an engine refuses its value, and the reason with the remedy."""


def leaves(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return every value of a recipe by its dotted key; a section that is null is one value.

    Args:
        section: The recipe, or one of its sections.
        prefix: What comes before the keys.
    """
    return {key: value for key, value, _ in _walk(section, prefix)}


def refuse(
    engine: str,
    recipe: Recipe,
    refusals: Iterable[Refusal],
    known: tuple[str, ...] | None = None,
) -> None:
    """Refuse the first key whose value an engine cannot honor.

    Args:
        engine: The engine's name.
        recipe: What was asked for.
        refusals: What the engine cannot do.
        known: Keys and sections that it makes something of; other keys are refused unless they are
            at their defaults. None where the caller looks after it.

    Raises:
        ProxstepError: Naming the key, its value and the remedy.
    """
    values = leaves(recipe)
    for key, applies, reason in refusals:
        if applies(recipe):
            raise _refused(engine, key, values.get(key), reason)
    for key, value, default in _walk(recipe, ""):
        if known is not None and not is_known(key, known) and value != default:
            raise _refused(engine, key, value, "it makes nothing of this key; leave it out")


def is_known(key: str, known: Iterable[str]) -> bool:
    """Whether a key is among them, or in a section that is.

    >>> is_known("task.level", ["task"]), is_known("tasks", ["task"])
    (True, False)
    """
    return any(key == name or key.startswith(f"{name}.") for name in known)


def _walk(section: Section, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value, default) for every value of a recipe."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, info.get_default(call_default_factory=True)


def _refused(engine: str, key: str, value: Any, reason: str) -> ProxstepError:
    shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
    return ProxstepError(f"{key} {shown} is not for --engine {engine}: {reason}")

"""What an engine makes of a recipe's keys: the dotted names, and refusing what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def refuse(engine: str, recipe: Recipe, refusals: Iterable[Refusal]) -> None:
    """Refuse the first key whose value an engine cannot honor.

    Args:
        engine: The engine's name.
        recipe: What was asked for.
        refusals: What the engine cannot do.

    Raises:
        ProxstepError: Naming the key, its value and the remedy.
    """
    values = leaves(recipe)
    for key, applies, reason in refusals:
        if applies(recipe):
            value = values.get(key)
            shown = str(value).lower() if isinstance(value, bool | None) else value
            shown = "null" if value is None else shown
            raise ProxstepError(f"{key} {shown} is not for --engine {engine}: {reason}")

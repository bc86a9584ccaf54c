"""A recipe's keys as fields of a host library's configuration: one default, one sentence each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from proxstep.config.objectives import OpoSection
from proxstep.config.sections import GeometrySection, Section
from proxstep.errors import ProxstepError
from proxstep.isopo import Rule

Refusal = tuple[str, Callable[[Any], Any], str]
"""An option of a host library, when ISOPO refuses its value, and the reason with the remedy."""


def field_of(section: type[Section], name: str) -> Any:
    """Return a dataclass field with a recipe section's default and sentence."""
    info = section.model_fields[name]
    text = (info.description or "").replace("%", "%%")  # argparse formats it
    return dataclasses.field(default=info.default, metadata={"help": text})


def read_section(section: type[Section], values: Mapping[str, Any], place: str = "") -> Any:
    """Return a recipe's section made of a configuration's values.

    Args:
        section: The section.
        values: By key.
        place: What stands before a key in the host library, for the message.

    Raises:
        ProxstepError: If one of them does not fit, by name.
    """
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = place + ".".join(str(part) for part in first["loc"][:1])
        raise ProxstepError(f"{name} is {first['input']!r}: {first['msg']}") from None


def known_fields(section: type[Section], config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are keys of a recipe's section, with their values."""
    names = set(section.model_fields) & {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names}


def rule_of(section: GeometrySection, place: str = "") -> Rule:
    """Return the rule that a geometry's keys describe.

    Raises:
        ProxstepError: If one of them, named as in the host library, is not of the preset's rule.
    """
    try:
        return section.to_rule()
    except ValueError as error:
        raise ProxstepError(place + str(error).removeprefix("geometry.")) from None


def refuse_with_isopo(config: Any, refusals: Iterable[Refusal], place: str = "") -> None:
    """Refuse the first option under which ISOPO's gradient would not be ISOPO's.

    Args:
        config: The host library's configuration.
        refusals: What does not go together with ISOPO.
        place: What stands before an option in the host library, for the message.

    Raises:
        ProxstepError: Naming the option and the remedy.
    """
    for name, applies, reason in refusals:
        if applies(config):
            raise ProxstepError(f"{place}{name} and ISOPO do not go together: {reason}")


@dataclass
class OpoKeys:
    """OPO's keys that all host libraries have, as in a recipe (docs/algorithms.md)."""

    alpha: float = field_of(OpoSection, "alpha")
    tau: float = field_of(OpoSection, "tau")
    adaptive_tau: bool = field_of(OpoSection, "adaptive_tau")
    mu: float | str = field_of(OpoSection, "mu")
    target_min: float | None = field_of(OpoSection, "target_min")
    surrogate: str = field_of(OpoSection, "surrogate")
    form: str = field_of(OpoSection, "form")
    drive: str = field_of(OpoSection, "drive")
    normalize: str = field_of(OpoSection, "normalize")
    anchor_correction: str = field_of(OpoSection, "anchor_correction")
    length_normalize: bool = field_of(OpoSection, "length_normalize")

    def opo_section(self, place: str = "") -> OpoSection:
        """Return them as a recipe has them.

        Raises:
            ProxstepError: If one of them does not fit, by its name after `place`.
        """
        return read_section(OpoSection, {"name": "opo", **known_fields(OpoSection, self)}, place)

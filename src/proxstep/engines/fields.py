"""A recipe's keys as fields of a host library's configuration: one default, one sentence each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from proxstep.errors import ProxstepError
from proxstep.sections import Section


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

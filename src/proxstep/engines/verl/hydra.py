"""Hydra overrides as text: one `key=value` each, in the grammar that hydra reads."""

from __future__ import annotations

import json
import re
from typing import Any

_BARE = re.compile(r"(\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*")
"""Strings that hydra takes as they are; what it would take for another type is not among them."""
_OTHER_TYPES = {"null", "true", "false", "inf", "nan", "yes", "no", "on", "off"}


def override(key: str, value: Any) -> str:
    r"""Return one override.

    >>> override("trainer.logger", ["console", "file"]), override("x", None), override("y", 1e-6)
    ('trainer.logger=[console,file]', 'x=null', 'y=1e-06')
    >>> override("data.train_files", "my runs/it's.parquet")
    "data.train_files='my runs/it\\'s.parquet'"
    """
    return f"{key}={text(value)}"


def text(value: Any) -> str:
    """Return a value in hydra's grammar: numbers, strings, booleans, null, lists and mappings."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{text(item)}" for name, item in value.items()) + "}"
    if _BARE.fullmatch(value) and value.lower() not in _OTHER_TYPES:
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"

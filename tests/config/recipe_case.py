"""Recipes that are refused, and the keys that a recipe has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxstep.algorithms import ALGORITHMS
from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError

COMPOSED = ["isopo+opo", "isopo-natural+gspo", "isopo-npg+reinforce", "reinforce+opo"]


def mistake(data: Any, **changes: Any) -> str:
    with pytest.raises(ProxstepError) as caught:
        resolve(data, changes, "test")
    message = str(caught.value)
    assert message.startswith("test: ")
    return message.removeprefix("test: ")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def known_here(message: str) -> list[str]:
    return message.partition("(known here: ")[2].removesuffix(")").split(", ")


LEAVES = [
    (objective, key)
    for objective in ALGORITHMS
    for key in leaves(resolve({"algorithm": objective}, {}, "test").model_dump())
    if (objective == "grpo" or key.startswith("objective."))
    and key not in ("algorithm", "objective.name", "geometry.rule", "model.lora")
]

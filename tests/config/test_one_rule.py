"""The library's rules are the recipe's: one name means one thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.models import tiny_qwen3

from proxstep import PRESETS, Isopo
from proxstep.config.loading import resolve

README = Path(__file__).parents[2] / "README.md"


def test_the_snippet_of_the_readme_and_the_recipe_build_the_same_rule() -> None:
    calls = re.findall(r"^isopo = Isopo\(model, rule=\"(.+)\"\)$", README.read_text("utf-8"), re.M)
    assert calls
    for name in calls:
        recipe = resolve({"algorithm": name}, {}, "test")
        assert Isopo(tiny_qwen3(), rule=name).rule == recipe.geometry.to_rule()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_rule_in_a_recipe(name: str) -> None:
    data = {"algorithm": f"{name}+reinforce"}
    assert resolve(data, {}, "test").geometry.to_rule() == PRESETS[name]

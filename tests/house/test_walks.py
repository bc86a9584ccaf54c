"""docs/architecture.md draws the calls that are really made."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALK = runpy.run_path(str(ROOT / "scripts" / "walk.py"))

Step = tuple[str, str]
"""A file of the package and a function in it."""


def drawn(heading: str) -> list[Step]:
    """The steps of a drawing, in order."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    drawing = section.split("```text\n")[1].split("```")[0]
    return re.findall(r"^ +(\S+\.py) +([\w.]+)", drawing, re.MULTILINE)


def called(call: Any) -> list[Step]:
    """All functions that are called, each at its first call."""
    names = [(c.file, c.function.rpartition(":")[0]) for c in call.everything()]
    return list(dict.fromkeys(names))


def functions(path: Path) -> set[str]:
    """The functions and methods of a file, by the names that a traceback has for them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        methods = (node for node in cls.body if isinstance(node, ast.FunctionDef))
        found |= {f"{cls.name}.{method.name}" for method in methods}
    return found


def out_of_order(wanted: list[Step], made: list[Step]) -> list[Step]:
    """Those that are not called, or not after the ones drawn above them."""
    wrong, last = [], -1
    for step in dict.fromkeys(wanted):
        place = made.index(step) if step in made else -1
        if place <= last:
            wrong.append(step)
        last = max(last, place)
    return wrong


@pytest.mark.parametrize("heading", ["The walk of an advantage", "The walk of a gradient"])
def test_what_is_drawn_exists(heading: str) -> None:
    steps = drawn(heading)
    assert len(steps) >= 10
    for file, function in steps:
        assert function in functions(ROOT / "src" / "proxstep" / file), (file, function)


def test_the_gradient_walks_as_drawn() -> None:
    made = called(WALK["linear_gradient"]())
    assert not out_of_order(drawn("The walk of a gradient"), made)


@pytest.mark.slow
def test_the_advantage_walks_as_drawn() -> None:
    WALK["OPTIONS"]["model.warmup_score"] = 0
    made = called(WALK["second_step"](WALK["train"]("isopo")))
    assert not out_of_order(drawn("The walk of an advantage"), made)


def test_another_order_is_noticed() -> None:
    made = [("a.py", "f"), ("b.py", "g"), ("c.py", "h")]
    assert not out_of_order([made[0], made[2]], made)
    assert out_of_order([made[2], made[0]], made) == [made[0]]
    assert out_of_order([("d.py", "i")], made) == [("d.py", "i")]


def test_the_rooms_are_those_of_the_package() -> None:
    section = PAGE.split("## The rooms\n")[1].split("\n## ")[0]
    named = set(
        re.findall(r"`(\w+)/?(?:\.py)?/?`", "\n".join(re.findall(r"^\| .*?\|", section, re.M)))
    )
    package = ROOT / "src" / "proxstep"
    there = {path.parent.name for path in package.glob("*/__init__.py")}
    there |= {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    assert named - {"src", "proxstep"} == there

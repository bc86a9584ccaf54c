"""Every public name is in docs/reference, with what a caller has to know of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "proxstep",
    "proxstep.algorithms",
    "proxstep.budget",
    "proxstep.engines.trl",
    "proxstep.isopo",
    "proxstep.rewards",
    "proxstep.tasks",
)


def public(module: ModuleType) -> list[str]:
    """The names of __all__, or without one those of what the module defines."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return getattr(module, "__all__", own)


def shown(target: str) -> Iterator[str]:
    """The names that mkdocstrings makes of one `::: target`."""
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError:
        yield target
        return
    below = {path.stem for path in Path(str(module.__file__)).parent.glob("*.py")}
    for name in public(module):  # where a module has the name, Griffe takes that for it
        if "__init__" not in str(module.__file__) or name not in below:
            yield f"{target}.{name}"


def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@cache
def reference() -> dict[int, str]:
    """What the pages show, by identity."""
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    targets = re.findall(r"^::: (\S+)", pages, re.MULTILINE)
    targets = [target for target in targets if not target.startswith("proxstep.engines.verl")]
    return {id(find(path)): path for target in targets for path in shown(target)}


@cache
def explained_constants() -> set[str]:
    """The names that a text follows where they are assigned, in any file."""
    names = set()
    for path in (ROOT / "src" / "proxstep").rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for assignment, text in pairwise(body):
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                targets = getattr(assignment, "targets", [getattr(assignment, "target", None)])
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def lacking(name: str, thing: Any) -> list[str]:
    """What a caller is not told."""
    thing = getattr(thing, "_init_fn", thing)  # of torch.library.custom_op
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return [] if name.rpartition(".")[2] in explained_constants() else ["a text below it"]
    text = inspect.getdoc(thing)
    if not text:
        return ["a docstring"]
    own = []
    if inspect.isfunction(thing) or (
        inspect.isfunction(thing.__init__) and "Attributes:" not in text  # a record's fields
    ):
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        parameters = inspect.signature(thing).parameters.values()
        own = [p.name for p in parameters if p.kind in named and p.name != "self"]
    found = [f"argument {a}" for a in own if not re.search(rf"^ +{a}(, \w+)*: ", text, re.M)]
    if inspect.isfunction(thing):
        returns = inspect.signature(thing).return_annotation
        said = re.match(r"r?(Return|Yield)", text) or re.search(r"^(Returns|Yields):", text, re.M)
        if returns not in (None, "None") and "Iterator" not in str(returns) and not said:
            found.append("what it returns")
        if "raise ProxstepError" in inspect.getsource(thing) and "Raises:" not in text:
            found.append("what it raises")
    return found


def members(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    yield path, thing
    if inspect.isclass(thing) and thing.__module__.startswith("proxstep."):
        for name, value in vars(thing).items():
            if getattr(value, "__name__", "") == "<lambda>":
                continue  # the default of a field
            if not name.startswith("_") and inspect.isfunction(inspect.unwrap(value)):
                yield f"{path}.{name}", inspect.unwrap(value)


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_on_a_page(room: str) -> None:
    module = importlib.import_module(room)
    things = {name: getattr(module, name) for name in module.__all__}
    shown_somewhere = reference()
    missing = [
        name
        for name, thing in things.items()
        if id(thing) not in shown_somewhere and not isinstance(thing, ModuleType)
    ]
    assert not missing


def test_verl_is_on_a_page() -> None:
    """It is not installed where this runs."""
    assert "::: proxstep.engines.verl\n" in (ROOT / "docs/reference/engines.md").read_text()
    source = (ROOT / "src/proxstep/engines/verl/actor_config.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for name in ("IsopoActorConfig", "IsopoEngineConfig"):
        assert ast.get_docstring(classes[name])


def test_every_name_on_a_page_says_what_a_caller_needs() -> None:
    found = {
        name: lacks
        for path in reference().values()
        if not path.startswith("proxstep.engines")  # their arguments are TRL's
        for name, thing in members(path, find(path))
        if (lacks := lacking(name, thing))
    }
    assert not found


def test_the_check_finds_what_is_missing() -> None:
    def silent(count: int) -> int:
        """Count."""
        return count

    assert lacking("silent", silent) == ["argument count", "what it returns"]
    assert lacking("proxstep.NO_SUCH_NAME", 3) == ["a text below it"]

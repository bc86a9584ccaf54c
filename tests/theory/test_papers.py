"""docs/papers.md names everything in the two papers, and code and tests that are there."""

from __future__ import annotations

import importlib.util
import re

import pytest
from scripts.paper_items import ISOPO, OPO, Item

from tests.theory.statements import STATEMENTS
from tests.theory.test_page import ROOT

ITEMS = {"ISOPO": ISOPO, "OPO": OPO}
ALL = [pytest.param(item, id=f"{paper} {item.number}") for paper in ITEMS for item in ITEMS[paper]]
NUMBERED = {
    "ISOPO": {"eq.": 7, "figure": 7},
    "OPO": {"eq.": 25, "figure": 7, "table": 2, "algorithm": 1},
}
NAMED = "definition 3.1, definition 4.1, proposition 4.2, theorem 4.3, lemma 6.1, remark 6.2, "
NAMED += "remark 6.3, theorem 8.1, corollary 8.2, proposition 8.3, proposition 8.4, lemma A.1, "
NAMED += "proposition A.2, proposition A.3"


def script():
    path = ROOT / "scripts" / "make_papers.py"
    spec = importlib.util.spec_from_file_location("make_papers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "papers.md").read_text() == script().papers_page(), "make reference"


@pytest.mark.parametrize("paper", ITEMS)
def test_nothing_of_a_paper_is_left_out(paper: str) -> None:
    numbers = [item.number for item in ITEMS[paper]]
    assert len(set(numbers)) == len(numbers)
    for kind, count in NUMBERED[paper].items():
        found = {int(n) for n in re.findall(rf"\b{kind} (\d+)", " ".join(numbers))}
        assert found == set(range(1, count + 1)), kind
    statements = {s.number: s for s in STATEMENTS if s.paper == paper}
    assert set(statements) <= set(numbers)
    for item in ITEMS[paper]:
        assert (item.number in statements) != bool(item.says), item.number
        assert item.says == "" or item.status, item.number


def test_the_named_statements_of_opo_are_there() -> None:
    numbers = " ".join(item.number for item in OPO)
    assert [name for name in NAMED.split(", ") if name not in numbers] == []


@pytest.mark.parametrize("item", ALL)
def test_what_is_named_is_there(item: Item) -> None:
    for name in item.code:
        assert script().resolved(name) is not None
    for check in item.checks:
        path, _, name = check.partition("::")
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), check


def test_a_name_that_is_gone_is_found() -> None:
    for gone in (
        Item("eq. 1", ("algorithms.opo.opposed",)),
        Item("eq. 1", (), ("tests/theory/test_pages.py",)),
        Item("eq. 1", (), ("tests/theory/test_page.py::test_nothing",)),
    ):
        with pytest.raises((AttributeError, AssertionError)):
            test_what_is_named_is_there(gone)

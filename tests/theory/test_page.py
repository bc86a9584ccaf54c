"""docs/theory.md says what the registry says, and its example does what it shows."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path

from tests.theory.statements import STATEMENTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "theory.md"


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_theory", ROOT / "scripts/make_theory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PAGE.read_text() == module.theory_page(), "run make reference"


def test_every_statement_is_on_the_page() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.endswith("` |")]
    assert [row.split("`")[-2] for row in rows] == [
        s.test_id for paper in ("OPO", "ISOPO") for s in STATEMENTS if s.paper == paper
    ]


def test_the_example_runs() -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert failed == 0
    assert tried > 5

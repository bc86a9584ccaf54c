"""The audit of dependencies is red for a finding alone, and never says more than was asked."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

AUDIT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "audit.py"))
FOUND: dict[str, Any] = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": []}]}
CLEAN: dict[str, Any] = {"name": "b", "version": "1", "vulns": []}
SKIPPED: dict[str, Any] = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([], 0, "NOT DONE"),
        ([SKIPPED, SKIPPED], 0, "NOT DONE"),
        ([CLEAN], 0, "1 packages without a known vulnerability"),
        ([CLEAN, SKIPPED], 0, "of 1 others nothing is known: c"),
        ([CLEAN, FOUND, SKIPPED], 1, "a 1: X-1, fixed in no version"),
    ],
)
def test_verdict(packages: list[dict[str, Any]], status: int, words: str) -> None:
    found, line = AUDIT["verdict"](packages)
    assert found == status
    assert words in line

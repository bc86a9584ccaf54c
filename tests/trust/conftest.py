"""Counts what the suites tried and what was lost, and prints the table at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

_KEY = "tried and lost"


@pytest.fixture
def counted(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Return a function that adds to the table: what was tried, how often, how much was lost."""

    def add(what: str, tried: int, lost: int = 0) -> None:
        record_property(_KEY, [what, tried, lost])

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table; the properties of tests also arrive from other processes."""
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        for key, value in getattr(report, "user_properties", []):
            if key == _KEY and report.when == "call":
                what, *numbers = value
                rows[what] = [have + new for have, new in zip(rows[what], numbers, strict=True)]
    if rows:
        terminalreporter.write_line("\n| tried | times | lost |\n|---|--:|--:|")
    for what, (tried, lost) in sorted(rows.items()):
        terminalreporter.write_line(f"| {what} | {tried:,} | {lost:,} |")

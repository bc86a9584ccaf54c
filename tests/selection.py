"""Which of a test's cases are fast, and which are left to the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Mark the cases as slow; a tuple is one case of several parameters.

    @pytest.mark.parametrize("rule", ["isopo", *slow("isopo-natural", "proma")])
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def square(*axes: Iterable[Any]) -> list[Any]:
    """Return all combinations, of which those of a Latin square are fast.

    With three axes every two values meet in a fast one, with two every value is in one.
    """
    values = [list(axis) for axis in axes]
    period = min(map(len, values))
    places = product(*(range(len(axis)) for axis in values))
    return [
        pytest.param(*cell, marks=() if sum(place) % period == 0 else pytest.mark.slow)
        for place, cell in zip(places, product(*values), strict=True)
    ]

"""A run that is killed, again and again, ends to the bit as one that nothing happened to."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trust.attempts import differences, run

KILLS_A_RUN = 9


@pytest.mark.parametrize("number", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_no_kill_costs_a_bit(tmp_path: Path, number: int, counted: Callable[..., None]) -> None:
    assert run(tmp_path / "whole") == 0
    events, seconds = map(float, (tmp_path / "measured").read_text().split())
    chance, tried = random.Random(number), Counter[str]()
    runs = (tmp_path / f"run-{count}" for count in itertools.count())
    folder = next(runs)
    while tried.total() < number:
        if tried["files"] <= tried["seconds"]:  # most of them lie in a save, some within a write
            delay = chance.choice([0.0, 0.0, 0.003])
            kill = ("files", chance.randint(1, int(events / 3)), delay)
        else:
            kill = ("seconds", chance.uniform(0, seconds / 2), 0.0)
        code = run(folder, kill)
        assert code in (0, -9), code
        tried[kill[0]] += code == -9
        if code == 0 or tried.total() == number or chance.random() < 1 / KILLS_A_RUN:
            assert code == 0 or run(folder) == 0
            assert differences(tmp_path / "whole", folder) == []
            folder = next(runs)
    counted("kills at a file operation, then resumed: bits lost", tried["files"])
    counted("kills at a random time, then resumed: bits lost", tried["seconds"])

"""Every wait of over two seconds is shown, with an estimate, and never drawn once it is over."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import pytest
from rich.console import Console
from tests.runs.test_console import RECIPE, plain, record, terminal

from proxstep.runs import waiting
from proxstep.runs.console import make_progress
from proxstep.runs.waiting import Wait


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "DELAYS", (0.02, 0.05))


def pipe() -> tuple[Any, io.StringIO]:
    file = io.StringIO()
    return make_progress(Console(file=file, width=40)), file


def test_what_a_wait_says() -> None:
    times = iter([10.0, 13.0, 20.0, 70.0])
    wait = Wait("greedy evaluation", 256, "completions", lambda: next(times))
    assert str(wait) == "greedy evaluation: 0 of 256 completions, 0:03"
    wait.advance(2)
    assert str(wait) == "greedy evaluation: 2 of 256 completions, 0:10"
    wait.advance(64)
    assert str(wait) == "greedy evaluation: 64 of 256 completions, 1:00, about 3:00 left"
    assert str(Wait("loading m", now=iter([0.0, 5.0]).__next__)) == "loading m, 0:05"


def test_a_pipe_gets_lines_now_and_then(quick: None) -> None:
    progress, file = pipe()
    with progress.wait("outer"), progress.wait("warming up", 10, "steps") as wait:
        wait.advance(5)
        time.sleep(0.15)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2  # then none for a minute
    assert all(line.startswith("warming up: 5 of 10 steps, 0:00, about") for line in lines)
    time.sleep(0.05)
    assert file.getvalue().splitlines() == lines


def test_short_waits_write_nothing_and_leave_no_thread() -> None:
    progress, file = pipe()
    before = threading.active_count()
    for _ in range(20):
        with progress.wait("short"):
            pass
    with pytest.raises(KeyboardInterrupt), progress.wait("interrupted"):
        raise KeyboardInterrupt
    assert file.getvalue() == ""
    assert threading.active_count() == before


def test_the_phases_of_a_step_are_no_news_after_the_first(quick: None) -> None:
    progress, file = pipe()
    for _ in range(2):
        with progress.wait("sampling", brief=True):
            time.sleep(0.04)
        progress.record(record(1))
    assert [line.split(",")[0][:8] for line in file.getvalue().splitlines()] == [
        "sampling",
        "step 1  ",
        "step 1  ",
    ]


def test_a_terminal_shows_the_innermost_wait_and_takes_it_away() -> None:
    console = terminal()
    progress = make_progress(console)
    with progress.wait("outer"):
        with progress.wait("baselines [1]", 20, "passes"):
            time.sleep(0.4)
        assert "baselines [1]: 0 of 20 passes, 0:00" in plain(console)
    progress.note("kept")
    written = plain(console)
    time.sleep(0.4)
    assert plain(console) == written
    progress.begin(RECIPE)
    with progress.wait("evaluating"):
        time.sleep(0.4)
        assert "evaluating, 0:00" in plain(console)
    progress.record(record(0))
    progress.end()
    text = plain(console)
    assert "evaluating" not in text[text.rindex("step  ") :]

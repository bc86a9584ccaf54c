"""What a person sees: plain lines in logs and pipes, a live table in a terminal."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from proxstep.algorithms import ALGORITHMS
from proxstep.config.loading import resolve
from proxstep.config.recipe import algorithm_names
from proxstep.runs.console import (
    COLUMNS,
    NUM_SHOWN,
    PlainProgress,
    TerminalProgress,
    advice,
    cell,
    make_progress,
)
from proxstep.runs.schema import FIELDS

RECIPE = resolve({"algorithm": "isopo+opo", "steps": 40}, {}, "test")


def record(step: int, **measured: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward": 0.5,
        "entropy": 1.2345,
        "grad_norm": 0.012345,
        "completions_mean_length": 4.25,
        "seconds_step": 0.126,
        **measured,
    }


EVALUATED = {"score": 0.25, "kl_policy_initial": 0.012345, "kl_initial_policy": 0.054321}


def plain(console: Console) -> str:
    """What a console wrote, without the codes that move the cursor and color."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Console:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Console(file=io.StringIO(), width=40)


def test_every_column_is_a_field_of_the_schema() -> None:
    assert set(COLUMNS) <= set(FIELDS)


def test_a_cell_is_formatted_or_a_dash() -> None:
    measured = record(3, **EVALUATED)
    cells = [cell(measured, name) for name in COLUMNS]
    assert cells == ["3", "0.500", "0.250", "0.0123", "0.0543", "1.234", "0.0123", "4.2", "0.13"]
    assert cell({"score": None}, "score") == cell({}, "reward") == "-"
    assert cell({"reward": float("nan")}, "reward") == "nan"


def test_the_place_decides_what_is_shown(pipe: Console) -> None:
    assert isinstance(make_progress(pipe), PlainProgress)
    assert isinstance(make_progress(terminal()), TerminalProgress)


def test_plain_lines_have_no_codes_and_are_never_wrapped(pipe: Console) -> None:
    progress = make_progress(pipe)
    progress.begin(RECIPE)
    progress.record(record(0, **EVALUATED))
    progress.record(record(1, score=None))
    progress.end()
    assert isinstance(pipe.file, io.StringIO)
    written = pipe.file.getvalue()
    assert "\x1b" not in written
    assert "\r" not in written
    first, hint, second, third = written.splitlines()
    assert first == "isopo+opo on arithmetic, 40 steps"
    assert "objective.mu changes nothing" in hint
    assert second == (
        "step 0  reward 0.500  greedy 0.250  KL(π‖π₀) 0.0123  KL(π₀‖π) 0.0543  entropy 1.234  "
        "|grad| 0.0123  length 4.2  s/step 0.13"
    )
    assert third == ("step 1  reward 0.500  entropy 1.234  |grad| 0.0123  length 4.2  s/step 0.13")


def test_a_terminal_gets_a_table_and_a_bar() -> None:
    console = terminal()
    progress = make_progress(console)
    progress.begin(RECIPE)
    progress.record(record(0, **EVALUATED))
    for step in range(1, 4):
        progress.record(record(step, score=None))
    progress.end()
    text = plain(console)
    for heading, _ in COLUMNS.values():
        assert heading in text
    last = text[text.rindex("step  ") :].splitlines()
    rows = [line.split() for line in last if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "3"]
    assert rows[0][1:5] == ["0.500", "0.250", "0.0123", "0.0543"]
    assert rows[1][1:5] == ["0.500", "-", "-", "-"]
    assert "isopo+opo on arithmetic" in last[-1]
    assert "3/40 steps" in last[-1]


def test_the_table_keeps_the_last_evaluations() -> None:
    console = terminal()
    progress = make_progress(console)
    progress.begin(RECIPE)
    for step in range(NUM_SHOWN + 4):
        progress.record(record(step, **EVALUATED))
        progress.record(record(step, score=None, reward=0.125))
    progress.end()
    text = plain(console)
    last = text[text.rindex("step  ") :].splitlines()
    steps = [int(line.split()[0]) for line in last if line.strip()[:1].isdigit()]
    assert len(steps) == NUM_SHOWN
    assert steps[-2:] == [NUM_SHOWN + 3, NUM_SHOWN + 3]


def test_the_table_shows_whole_numbers_at_80_columns() -> None:
    console = terminal(80)
    progress = make_progress(console)
    progress.begin(RECIPE)
    progress.record(record(100, **EVALUATED, entropy=-12.3456))
    progress.end()
    text = plain(console)
    assert "…" not in text
    last = text[text.rindex("step  ") :].splitlines()
    assert last[0].split() == [heading for heading, _ in COLUMNS.values()]
    expected = ["100", "0.500", "0.250", "0.0123", "0.0543", "-12.346", "0.0123", "4.2", "0.13"]
    assert last[1].split() == expected
    assert max(map(len, last)) <= 80


def test_notes_are_lines_in_a_pipe(pipe: Console) -> None:
    progress = make_progress(pipe)
    progress.note("a note that is longer than the forty columns of this pipe")
    progress.note("[bold]second")
    progress.begin(RECIPE)
    assert isinstance(pipe.file, io.StringIO)
    assert pipe.file.getvalue().splitlines()[:2] == [
        "a note that is longer than the forty columns of this pipe",
        "[bold]second",
    ]


def test_notes_in_a_terminal_stop_when_the_run_begins_or_ends() -> None:
    for finish in ("begin", "end"):
        console = terminal()
        progress = make_progress(console)
        progress.note("first")
        progress.note("warm-up step 25: 3%")
        if finish == "begin":
            progress.begin(RECIPE)
            progress.record(record(0, **EVALUATED))
        progress.end()
        written = len(plain(console))
        assert "warm-up step 25: 3%" in plain(console)
        time.sleep(0.2)  # the status draws itself again every 80 ms
        assert len(plain(console)) == written


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO())])
def test_ending_before_the_beginning_is_fine(console: Console) -> None:
    """A mistake in the data is found between the two."""
    make_progress(console).end()


def test_a_note_during_the_run_stands_above_the_table() -> None:
    console = terminal()
    progress = make_progress(console)
    progress.begin(RECIPE)
    progress.note("[one] prompt's weight")
    progress.record(record(0, **EVALUATED))
    progress.end()
    written = plain(console)
    assert "[one] prompt's weight" in written
    time.sleep(0.2)
    assert len(plain(console)) == len(written)


IDLE = {
    **dict.fromkeys(("grpo", "dr-grpo", "dapo", "gspo", "cispo"), "clips nothing"),
    "opo": "has no penalty to pay: objective.mu changes nothing",
    "dro": "has no penalty to pay: objective.beta changes nothing",
}


@pytest.mark.parametrize("algorithm", algorithm_names())
def test_what_one_update_per_rollout_leaves_idle(algorithm: str) -> None:
    recipe = resolve({"algorithm": algorithm}, {}, "test")
    declared = ALGORITHMS.get(algorithm)
    idle = IDLE.get(algorithm, declared.on_policy if declared else "")
    if not idle:
        assert advice(recipe) == []
        return
    (line,) = advice(recipe)
    assert f"every ratio is 1, so {algorithm} {idle}" in line
    for key in ("num_minibatches", "num_iterations"):
        assert advice(resolve({"algorithm": algorithm}, {"update": {key: 2}}, "test")) == []


@pytest.mark.parametrize(
    ("algorithm", "regularizer", "warning"),
    [
        ("grpo", {"kl_coef": 0.1, "kl_estimator": "k1"}, "its expected gradient is 0"),
        ("rloo", {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"}, None),
        (
            "reinforce",
            {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"},
            "the penalty alone is scaled up to a full advantage",
        ),
        ("reinforce", {"kl_coef": 0.1, "kl_estimator": "k2"}, None),
    ],
)
def test_a_penalty_that_misleads_is_named(
    algorithm: str, regularizer: Any, warning: str | None
) -> None:
    data = {"algorithm": algorithm, "regularizer": regularizer, "update": {"num_iterations": 2}}
    console = Console(file=io.StringIO(), width=40)
    make_progress(console).begin(resolve(data, {"steps": 7}, "test"))
    assert isinstance(console.file, io.StringIO)
    first, *lines = console.file.getvalue().splitlines()
    assert first.endswith("7 steps")
    assert [warning is not None and warning in line for line in lines] == [True] * len(lines)
    assert len(lines) == (warning is not None)

"""`proxstep train --engine verl`: the embedded task is learned, and a killed run goes on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from proxstep.runs.reading import load_run, load_samples

pytestmark = [pytest.mark.verl, pytest.mark.filterwarnings("default")]

RECIPE = Path(__file__).parents[2] / "recipes" / "arithmetic-isopo.yaml"
NUM_STEPS, KILLED_AFTER, CHECKPOINT_EVERY = 16, 7, 5
SECONDS = 720
"""For the whole: the issue of this engine says under 12 minutes on two cores."""


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `tests.verl.cpu_launch` is."""
    monkeypatch.chdir(RECIPE.parents[1])


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "tests.verl.cpu_launch", "train", *map(str, words)]


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def processes_in(folder: Path) -> list[str]:
    """Command lines of this run's verl."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words):
            found.append(" ".join(words)[:80])
    return found


def killed_run(folder: Path, end: float) -> list[dict[str, Any]]:
    """Begin a run, kill it after some steps, and return what it had written."""
    keys = {
        "steps": NUM_STEPS,
        "logging.checkpoint_every": CHECKPOINT_EVERY,
        "task.num_validation": 128,
        "evaluation.every": 8,
        "output_dir": folder,
    }
    options = [word for key, value in keys.items() for word in (f"--{key}", value)]
    path = folder.with_suffix(".log")
    with path.open("w") as log:
        words = command(RECIPE, "--engine", "verl", *options)
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    while len(records(folder)) <= KILLED_AFTER:
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.2)
    process.kill()
    process.wait()
    return records(folder)


@pytest.mark.slow
def test_it_learns_and_resumes_after_a_kill(tmp_path: Path) -> None:
    folder, began = tmp_path / "run", time.monotonic()
    before = killed_run(folder, began + SECONDS)
    for _ in range(60):
        if not processes_in(folder):
            break
        time.sleep(0.5)
    assert not processes_in(folder)
    subprocess.run(command("--resume", folder), check=True, timeout=SECONDS)
    seconds = time.monotonic() - began

    run = load_run(folder)
    assert run.info["engine"] == "verl"
    assert run.info["status"] == "finished"
    assert [record["step"] for record in run.records] == list(range(NUM_STEPS + 1))
    first, second = before[CHECKPOINT_EVERY + 1], run.records[CHECKPOINT_EVERY + 1]
    assert second["reward"] == first["reward"]  # the same policy draws the same completions
    assert second["entropy"] == pytest.approx(first["entropy"], rel=1e-3)
    rewards = run.series("reward")[1]
    assert statistics.mean(rewards[-4:]) > statistics.mean(rewards[:4]) + 0.05
    scores = run.series("score")[1]
    assert scores[-1] > scores[0] + 0.1
    assert run.series("geometry/weight_spread")[1][-1] > 0
    assert {sample["step"] for sample in load_samples(run)} == {0, 8, 16}
    said = f"{seconds:.0f} s, rewards {rewards}, greedy scores {scores}"
    print(said)  # noqa: T201  # for the log of the suite

    words = ["report", str(folder), "--output", str(tmp_path / "report.html")]
    subprocess.run([sys.executable, "-m", "proxstep", *words], check=True)
    over = subprocess.run(command("--resume", folder), capture_output=True, text=True)
    assert over.returncode == 2
    assert over.stderr == f"error: {folder}: the run is finished, at step 16 of 16\n"


@pytest.mark.slow
def test_what_fails_in_a_worker_is_said_in_a_line(tmp_path: Path) -> None:
    grader = tmp_path / "grader.py"
    grader.write_text(
        "def reward(prompts, completions, **columns):\n    raise ValueError('no such unit')\n"
    )
    words = ["--task.rewards", f"[{grader}:reward]", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        command(RECIPE, "--engine", "verl", *words),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: verl ended with status 1: ")
    assert "ValueError: no such unit" in done.stderr

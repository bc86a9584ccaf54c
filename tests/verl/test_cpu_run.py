"""verl's main program on the CPU: steps, weight sync, checkpoints, and no process left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.verl.cpu_run import Run, prepared

pytestmark = [pytest.mark.verl, pytest.mark.slow, pytest.mark.filterwarnings("default")]

SECONDS = 600
"""For one run; on an idle machine it takes one minute."""
STEPS = ["trainer.total_training_steps=3", "trainer.save_freq=2", "trainer.test_freq=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        for process in run.processes():
            process.kill()


def started(run: Run, runs: list[Run]) -> Run:
    runs.append(run)
    run.start()
    return run


def test_three_steps_and_the_last_one_again(folder: Path, runs: list[Run]) -> None:
    whole = started(Run(folder, STEPS), runs)
    steps = whole.finish(SECONDS)
    assert [step["training/global_step"] for step in steps] == [1, 2, 3]
    assert whole.none_left(60), whole.left()
    for step in steps:  # an update between them: with stale weights the two would be far apart
        assert step["training/rollout_probs_diff_max"] < 1e-5
        assert step["actor/grad_norm"] > 0
    assert 0 <= steps[2]["val-aux/arithmetic/reward/mean@1"] <= 1

    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints / "global_step_3")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    (last,) = started(Run(folder, STEPS), runs).finish(SECONDS)
    assert last["training/global_step"] == 3
    for name in ("critic/score/mean", "response_length/mean", "val-aux/arithmetic/reward/mean@1"):
        assert last[name] == steps[2][name]
    for name in ("actor/entropy", "actor/grad_norm"):
        assert last[name] == pytest.approx(steps[2][name], rel=1e-4)
        assert last[name] != pytest.approx(steps[1][name], rel=1e-3)


def test_nothing_outlives_a_killed_run(folder: Path, runs: list[Run]) -> None:
    run = started(Run(folder, [*STEPS, "trainer.resume_mode=disable"]), runs)
    run.wait_for("dataloader initialized", SECONDS)
    assert len(run.left()) > 4
    run.kill()
    assert run.none_left(60), run.left()

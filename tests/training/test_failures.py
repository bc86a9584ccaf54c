"""What a run that fails leaves behind, and that it goes on from there to the bit."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import (
    Silent,
    assert_same_records,
    made_trainer,
    records,
    spread_reward,
    tiny_recipe,
    weights,
)
from tests.selection import slow

from proxstep.errors import ProxstepError
from proxstep.runs import tracking
from proxstep.runs.checkpoint import checkpoints, latest_checkpoint, load_state
from proxstep.runs.folder import RunFolder
from proxstep.training import guarded, lifecycle, saving
from proxstep.training.objective import Objective

REWARD = """\
import os, signal, time




def flaky(prompts, completions, **columns):
    trouble = os.environ.get("TROUBLE", "")
    if trouble.startswith(str(len(completions))):  # 16 in training, 6 in validation
        os.environ["SEEN"] = str(int(os.environ.get("SEEN", "0")) + 1)
        if int(os.environ["SEEN"]) >= int(trouble.split()[1]):
            if "hang" in trouble:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            raise ConnectionError("no route to the judge")
    return [float(sum(map(ord, c)) % 17) for c in completions]
"""


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUBLE", "")
    monkeypatch.setenv("SEEN", "0")
    monkeypatch.setattr(guarded, "SECONDS_AFTER_SIGTERM", 0.2)


def recipe_in(folder: Path, algorithm: str = "isopo", **changes: Any) -> Any:
    file = folder.parent / "reward.py"
    file.write_text(REWARD)
    changes = {
        "task": {"rewards": [f"{file}:flaky"], "num_validation": 6},
        "geometry": {"fisher_denominator": "trailing", "overlap_source": "previous_step"},
        "steps": 4,
        "evaluation": {"baselines": False},  # its passes are calls of the reward function too
        **changes,
    }
    return tiny_recipe(folder, algorithm, **changes)


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


def check_same_run(first: Path, second: Path) -> None:
    """Two runs are the same, but for the time that they took."""
    a, b = weights(first), weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert_same_records(records(first), records(second))
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("nothing") / "whole"
    lifecycle.train(recipe_in(folder), Silent())
    return folder


@pytest.mark.parametrize(
    ("trouble", "kept", "lost"), [("16 3", 2, 3), *slow(("6 2", 2, 2), ("6 3", 4, 4))]
)
def test_a_reward_that_raises_costs_at_most_its_own_step(
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
    kept: int,
    lost: int,
) -> None:
    complaint = (
        f"step {lost}: reward function 'flaky' raised ConnectionError: no route to the judge"
    )
    folder, progress = tmp_path / "run", Silent()
    monkeypatch.setenv("TROUBLE", trouble)
    with pytest.raises(ProxstepError, match=complaint):
        lifecycle.train(recipe_in(folder), progress)
    assert status(folder) == "failed"
    assert load_state(latest_checkpoint(folder))["step"] == kept
    assert f"saved up to step {kept}: proxstep train --resume {folder}" in progress.notes
    monkeypatch.setenv("TROUBLE", "")
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def test_in_the_first_step_the_evaluation_before_it_is_kept(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    for trouble, complaint in (("6 1", "step 0: reward"), ("16 1", "step 1: reward")):
        assert checkpoints(folder) == []
        monkeypatch.setenv("TROUBLE", trouble)
        monkeypatch.setenv("SEEN", "0")
        with pytest.raises(ProxstepError, match=complaint):
            lifecycle.train(recipe_in(folder), Silent(), overwrite=True)
        assert status(folder) == "failed"
    monkeypatch.setenv("TROUBLE", "")
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def poison(monkeypatch: pytest.MonkeyPatch, update: int, what: str) -> None:
    """Make one update's loss or gradient not finite."""
    backward, done = Objective.backward, [0]

    def poisoned(self: Objective, log_prob_BT: torch.Tensor, *rest: Any, **options: Any) -> Any:
        done[0] += 1
        if done[0] != update:
            return backward(self, log_prob_BT, *rest, **options)
        if what == "gradient":
            log_prob_BT = log_prob_BT * float("inf")
        loss, metrics = backward(self, log_prob_BT, *rest, **options)
        return (loss * math.nan if what == "loss" else loss), metrics

    monkeypatch.setattr(Objective, "backward", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_no_step_and_the_run_is_kept(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 3, what)
        told = {
            "loss": "step 3, update 3: the loss is nan; the para",
            "gradient": "step 3: the sum of log-probabilities is -inf: no gradient was computed",
        }[what]
        with pytest.raises(ProxstepError, match=f"^{told}"):
            lifecycle.train(recipe_in(folder), Silent())
    assert load_state(latest_checkpoint(folder))["step"] == 2
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def test_half_a_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could go on from between two updates of one rollout."""
    changes: dict[str, Any] = {
        "update": {"num_minibatches": 2},
        "logging": {"checkpoint_every": 1},
        "geometry": {},
    }
    lifecycle.train(recipe_in(tmp_path / "whole", "grpo", **changes), Silent())
    with monkeypatch.context() as patch:
        poison(patch, 6, "gradient")
        with pytest.raises(ProxstepError, match="step 3, update 6: the gradient's norm is nan"):
            lifecycle.train(recipe_in(tmp_path / "run", "grpo", **changes), Silent())
    assert load_state(latest_checkpoint(tmp_path / "run"))["step"] == 2
    lifecycle.resume(tmp_path / "run", Silent())
    check_same_run(tmp_path / "whole", tmp_path / "run")


# Time, signals


def test_a_run_is_saved_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = saving.save_checkpoint

    def watched(folder: Path, step: int, *rest: Any) -> Path:
        saved.append(step)
        return save(folder, step, *rest)

    monkeypatch.setattr(saving, "save_checkpoint", watched)
    for minutes, expected in ((1e-6, [1, 2, 3]), (10.0, [3]), (None, [3])):
        saved.clear()
        logging = {"checkpoint_minutes": minutes}
        lifecycle.train(tiny_recipe(tmp_path / "run", logging=logging), Silent(), overwrite=True)
        assert saved == expected


def test_a_run_that_sigterm_stopped_leaves_no_trace_of_it(tmp_path: Path, whole: Path) -> None:
    class Impatient(Silent):
        def record(self, record: Any) -> None:
            super().record(record)
            if record["step"] in (0, 3):  # an evaluation is due after 2 and 4
                os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    assert lifecycle.train(recipe_in(folder), Impatient()) == "interrupted"
    assert lifecycle.resume(folder, Impatient()) == "interrupted"
    assert load_state(latest_checkpoint(folder))["step"] == 3
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def test_sigterm_ends_a_reward_that_hangs(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("TROUBLE", "16 3 hang")
    began = time.monotonic()
    assert lifecycle.train(recipe_in(folder), Silent()) == "interrupted"
    assert time.monotonic() - began < 30
    assert status(folder) == "interrupted"
    assert load_state(latest_checkpoint(folder))["step"] == 2
    monkeypatch.setenv("TROUBLE", "")
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def test_a_reward_that_hangs_is_named_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUBLE", "16 2 hang")
    monkeypatch.setattr(guarded, "SECONDS_AFTER_SIGTERM", 60)
    task = {"rewards": [f"{tmp_path}/reward.py:flaky"], "num_validation": 6, "reward_seconds": 1.0}
    expected = "^step 2: reward function 'flaky' took longer than task.reward_seconds 1 for 16"
    with pytest.raises(ProxstepError, match=expected):
        lifecycle.train(recipe_in(tmp_path / "run", task=task), Silent())
    assert load_state(latest_checkpoint(tmp_path / "run"))["step"] == 1


# Disks


def test_a_full_disk_at_a_row_costs_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", tracking.MetricsLog.write

    def full(self: Any, record: Any) -> None:
        if record["step"] == 2:
            self._file.write('{"step": 2, "num_')
            self._file.flush()
            raise OSError(28, "No space left on device")
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.MetricsLog, "write", full)
        expected = f"step 2: {folder} cannot be written .No space left on device.: make room or"
        with pytest.raises(ProxstepError, match=expected):
            lifecycle.train(recipe_in(folder), Silent())
    assert status(folder) == "failed"
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def test_a_row_that_cannot_be_flushed_is_told_once(tmp_path: Path, whole: Path) -> None:
    """What a file could not flush it tries again to flush when it is closed."""
    before, folder = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run"

    class Full(Silent):
        def record(self, record: Any) -> None:
            if record["step"] == 3:
                size = (folder / "metrics.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        with pytest.raises(ProxstepError, match=f"step 4: {folder} cannot be written .File too"):
            lifecycle.train(recipe_in(folder, logging={"checkpoint_every": 2}), Full())
        assert status(folder) == "failed"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


@contextmanager
def full_from(step: int) -> Iterator[Silent]:
    """No file may grow beyond 100 kB from a step on; the model has 3 MB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(Silent):
        def record(self, record: Any) -> None:
            if record["step"] == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        yield Full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_first_checkpoint_that_does_not_fit_is_no_promise_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with full_from(1) as progress, pytest.raises(ProxstepError) as caught:
        lifecycle.train(recipe_in(folder, logging={"checkpoint_every": 2}), progress)
    assert str(caught.value).startswith("step 2: the checkpoint cannot be written below")
    assert str(caught.value).endswith(
        "make room, then begin again with --overwrite: there is no checkpoint yet"
    )
    assert checkpoints(folder) == []
    with pytest.raises(ProxstepError, match="no checkpoint there"):
        lifecycle.resume(folder, Silent())


def test_a_checkpoint_that_does_not_fit_leaves_the_ones_before(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    with full_from(3) as progress, pytest.raises(ProxstepError) as caught:
        lifecycle.train(recipe_in(folder, logging={"checkpoint_every": 2}), progress)
    assert str(caught.value).startswith("step 4: the checkpoint cannot be written below")
    assert str(caught.value).endswith(f"last checkpoint: proxstep train --resume {folder}")
    assert status(folder) == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert lifecycle.resume(folder, Silent()) == "finished"
    check_same_run(whole, folder)


def test_a_disk_without_room_for_one_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 2**14

    monkeypatch.setattr("proxstep.runs.folder.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(ProxstepError, match=r"1\.5e-05 GiB are free, and one checkpoint's weights"):
        lifecycle.train(tiny_recipe(tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle, "load_model", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(ProxstepError, match="output_dir /proc/run cannot be written"):
        lifecycle.train(tiny_recipe(Path("/proc/run")), Silent())


def test_a_tracker_that_does_not_begin_is_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr("proxstep.training.trainer.Tracker", broken)
    with pytest.raises(ConnectionError):
        lifecycle.train(tiny_recipe(tmp_path / "run"), Silent())
    assert status(tmp_path / "run") == "failed"


# The folder


def test_nobody_else_writes_into_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused: list[str] = []

    class Rival(Silent):
        def record(self, record: Any) -> None:
            for attempt in (
                lambda: lifecycle.train(tiny_recipe(folder), Silent(), overwrite=True),
                lambda: lifecycle.resume(folder, Silent()),
            ):
                with pytest.raises(ProxstepError) as caught:
                    attempt()
                refused.append(str(caught.value))
            assert RunFolder(folder).status() == "running"

    assert lifecycle.train(tiny_recipe(folder, steps=1), Rival()) == "finished"
    assert len(refused) == 4
    assert set(refused) == {
        f"output_dir {folder} is being written by another process ({os.getpid()}): wait for it, "
        "stop it, or choose another folder"
    }


def test_a_run_that_was_killed_does_not_say_that_it_runs(tmp_path: Path) -> None:
    RunFolder(tmp_path).update_info(status="running")
    assert RunFolder(tmp_path).status() == "killed"


def test_logs_that_are_not_what_the_run_wrote_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    logging = {"checkpoint_every": 2}
    lifecycle.train(tiny_recipe(folder, steps=3, logging=logging), Silent())
    for path in (latest_checkpoint(folder) / "trainer_state.pt",):
        path.unlink()  # so that the run goes on from step 2
    for name in ("metrics.jsonl", "samples.jsonl"):
        file, held = folder / name, (folder / name).read_bytes()
        lines = held.splitlines(keepends=True)
        for damaged in (
            held.replace(b"0", b"1", 1),
            b"".join(lines[1:]),
            b"".join([*lines[:1], *lines[2:]]),
            lines[0],
            b"",
        ):
            file.write_bytes(damaged)
            with pytest.raises(ProxstepError, match=f"{name}.*(damaged|is not what the run wrote)"):
                lifecycle.resume(folder, Silent())
        file.write_bytes(held)
    (folder / "samples.jsonl").unlink()
    progress = Silent()
    assert lifecycle.resume(folder, progress) == "finished"
    notes = "\n".join(progress.notes)
    assert "step-000003 is damaged: trainer_state.pt is missing; using step-000002" in notes
    assert f"{folder}/samples.jsonl is missing: what it had of the steps up to 2 is lost" in notes
    assert [record["step"] for record in records(folder)] == [0, 1, 2, 3]


def test_a_run_is_continued_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spread_reward(tmp_path)
    recipe = tiny_recipe(Path("run"), task={"rewards": ["spread.py:spread"]})
    lifecycle.train(recipe.model_copy(update={"steps": 1}), Silent())
    text = Path("run/recipe.yaml").read_text().replace("steps: 1", "steps: 2")
    Path("run/recipe.yaml").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lifecycle.resume(tmp_path / "run", Silent()) == "finished"


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"optimizer": {"name": "adamw"}}, {"optimizer": {"name": "sgd"}}),
        ({"model": {"lora": {"rank": 2}}}, {"model": {"lora": {"rank": 3}}}),
        ({"model": {"lora": {"rank": 2}}}, {}),
    ],
)
def test_a_state_of_another_model_or_optimizer_is_refused(
    tmp_path: Path, changes: dict[str, Any], other: dict[str, Any]
) -> None:
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=1, **changes), Silent())
    state = load_state(latest_checkpoint(tmp_path / "run"))
    trainer = made_trainer(tmp_path / "run", **other)
    with pytest.raises(ProxstepError, match="optimizer state is of another model or optimizer"):
        trainer.restore(state)
    state["trained"] = trainer._trained()  # as if nobody had written down whose it is
    state["optimizer"]["param_groups"][0]["params"] = [0]
    with pytest.raises(ProxstepError, match="optimizer state is of another model or optimizer"):
        trainer.restore(state)


# Rewards that teach nothing


@pytest.mark.parametrize("value", ["None", "float('nan')", "0.5", "1.0"])
@pytest.mark.parametrize("steps", [3, 7])
def test_rewards_that_teach_nothing_are_spoken_of(tmp_path: Path, value: str, steps: int) -> None:
    file = tmp_path / "reward.py"
    file.write_text(f"def same(prompts, completions, **c): return [{value}] * len(prompts)\n")
    task = {"rewards": [f"{file}:same"]}
    progress = Silent()
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=steps, task=task), progress)
    cut_off, note = progress.notes
    assert "were cut off at rollout.max_completion_length 3" in cut_off
    assert note.startswith(
        f"{min(steps, 5)} steps in a row in which every reward was missing, not finite or equal"
    )


def test_a_penalty_does_not_hide_rewards_that_teach_nothing(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("def same(prompts, completions, **c): return [0.5] * len(prompts)\n")
    task, rollout = {"rewards": [f"{file}:same"]}, {"overlong_buffer": 3}
    progress = Silent()
    lifecycle.train(tiny_recipe(tmp_path / "run", task=task, rollout=rollout), progress)
    assert "3 steps in a row" in progress.notes[1]


def test_rewards_that_teach_something_are_not(tmp_path: Path) -> None:
    progress = Silent()
    task = spread_reward(tmp_path)
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=6, task=task), progress)
    assert all("were cut off" in note for note in progress.notes)

"""The run folder: taken ones are refused, run.json is never half-written, only runs are deleted."""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tests.engine import tiny_recipe

import proxstep
from proxstep.config.loading import load_recipe
from proxstep.errors import ProxstepError
from proxstep.runs.folder import RunFolder, check_file, describe_machine

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "run")


def test_a_new_run_says_what_it_does_and_on_what(folder: RunFolder) -> None:
    recipe = tiny_recipe(folder.path, "isopo+opo")
    folder.check_usable(overwrite=False)
    folder.create(recipe, CPU, num_parameters=1234)
    assert load_recipe(folder.path / "recipe.yaml") == recipe
    info = json.loads((folder.path / "run.json").read_text())
    assert info == folder.info()
    assert info["status"] == "running"
    assert info["num_parameters"] == 1234
    assert info["proxstep_version"] == proxstep.__version__
    assert info["torch_version"] == torch.__version__
    assert info["machine"] == describe_machine(CPU)
    assert datetime.fromisoformat(info["started"]).tzinfo is not None
    assert sorted(path.name for path in folder.path.iterdir()) == ["recipe.yaml", "run.json"]


def test_the_machine_is_described_on_one_line() -> None:
    text = describe_machine(CPU)
    assert text.endswith("1 torch threads, cpu")
    assert f"{os.cpu_count()} cores" in text
    assert "\n" not in text


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_absent_or_an_empty_folder_is_usable(folder: RunFolder, overwrite: bool) -> None:
    folder.check_usable(overwrite=overwrite)
    assert not folder.path.exists()
    folder.path.mkdir(parents=True)
    folder.check_usable(overwrite=overwrite)


def test_a_folder_with_a_run_is_usable_only_to_overwrite_it(folder: RunFolder) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    held = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(ProxstepError, match=r"already holds a run: choose another, continue it"):
        folder.check_usable(overwrite=False)
    folder.check_usable(overwrite=True)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == held


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["recipe.yaml", ".hidden", "checkpoints/model"])
def test_a_folder_with_anything_else_is_not_usable(
    folder: RunFolder, name: str, overwrite: bool
) -> None:
    file = folder.path / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ProxstepError, match="holds files that are no run: choose another folder"):
        folder.check_usable(overwrite=overwrite)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_neither_a_file_nor_what_is_below_one_is_usable(
    folder: RunFolder, below: str, overwrite: bool
) -> None:
    folder.path.parent.mkdir()
    folder.path.write_text("mine")
    path = folder.path / below
    with pytest.raises(ProxstepError) as caught:
        RunFolder(path).check_usable(overwrite=overwrite)
    expected = f"output_dir {path}: {folder.path} is a file; choose another folder"
    assert str(caught.value) == expected


def test_clearing_deletes_a_run_and_nothing_else(folder: RunFolder) -> None:
    folder.clear()
    assert not folder.path.exists()
    folder.create(tiny_recipe(folder.path), CPU, 1)
    for name in ("checkpoints/step-000001", "checkpoints/step-000002.incomplete", "figures"):
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "file").write_text("")
    for name in ("metrics.jsonl", "samples.jsonl", "events.out.tfevents.1.here", "notes.txt"):
        (folder.path / name).write_text("")
    beside = folder.path.with_name("beside.txt")
    beside.write_text("mine")
    folder.clear()
    assert sorted(path.name for path in folder.path.iterdir()) == ["figures", "notes.txt"]
    assert (folder.path / "figures" / "file").exists()
    assert beside.exists()

    (folder.path / "recipe.yaml").write_text("mine")  # without run.json it is nobody's run
    folder.clear()
    assert (folder.path / "recipe.yaml").read_text() == "mine"


def test_a_new_run_replaces_the_one_before(folder: RunFolder) -> None:
    folder.create(tiny_recipe(folder.path, "opo"), CPU, 1)
    folder.update_info(status="finished", mine=3)
    folder.metrics.write_text("old")
    (folder.path / "checkpoints" / "step-000003").mkdir(parents=True)
    (folder.path / "notes.txt").write_text("mine")
    recipe = tiny_recipe(folder.path, "grpo")
    folder.create(recipe, CPU, 2)
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["notes.txt", "recipe.yaml", "run.json"]
    assert load_recipe(folder.path / "recipe.yaml") == recipe
    assert (folder.info()["status"], folder.info()["num_parameters"]) == ("running", 2)
    assert "mine" not in folder.info()


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_file_to_write_gets_its_folder(tmp_path: Path, name: str) -> None:
    file = tmp_path / name / "page.html"
    check_file(file, "--output")
    assert file.parent.is_dir()
    assert not file.exists()
    file.write_text("old")
    check_file(file, "--output")
    assert file.read_text() == "old"


def test_where_no_file_can_be_written_none_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ProxstepError, match=f"--output {tmp_path} is a folder; name a file"):
        check_file(tmp_path, "--output")
    for below in ("x", "x/y"):
        with pytest.raises(ProxstepError, match=f"{tmp_path}/file is a file; choose another"):
            check_file(tmp_path / "file" / below, "--output")


def test_run_json_changes_all_or_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    before = folder.info()
    folder.update_info(status="finished", note="läuft")
    assert folder.info() == {**before, "status": "finished", "note": "läuft"}

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            folder.update_info(status="failed")
    assert folder.info()["status"] == "finished"
    folder.update_info(status="failed")
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["recipe.yaml", "run.json"]


def test_run_json_is_json_whatever_a_reward_function_gives(folder: RunFolder) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    folder.update_info(baselines={"constant": {"what": "7", "score": math.nan}, "all": [math.inf]})
    text = (folder.path / "run.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    found = folder.info()["baselines"]
    assert found == {"constant": {"what": "7", "score": None}, "all": [None]}


def test_no_run_has_no_info(folder: RunFolder) -> None:
    assert folder.info() == {}


def test_samples_are_appended_a_line_each(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    samples = [
        {"step": 0, "prompt": "1+1=", "completion": "2\n\u2028", "reward": 1.0},
        {"step": 0, "prompt": [{"role": "user", "content": "ø"}], "completion": "", "reward": None},
    ]
    folder.add_samples(samples[:1])
    folder.add_samples(samples[1:])
    folder.add_samples([])
    lines = folder.samples.read_bytes().split(b"\n")[:-1]
    assert [json.loads(line) for line in lines] == samples


def test_how_a_run_ended_fits_on_a_full_disk(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    before = folder.info()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("proxstep.runs.folder.write_file", full)
        folder.conclude("failed")
    assert folder.info() == {**before, "status": "failed"}
    assert sorted(path.name for path in folder.path.iterdir()) == ["recipe.yaml", "run.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_a_damaged_run_json_is_named(folder: RunFolder, content: bytes) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    (folder.path / "run.json").write_bytes(content)
    with pytest.raises(ProxstepError, match=r"run\.json: damaged, it holds no JSON object; resto"):
        folder.info()
    folder.create(tiny_recipe(folder.path), CPU, 1)  # which overwrites it
    assert folder.info()["status"] == "running"


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff\xfe"])
def test_damaged_diagnostics_are_named(folder: RunFolder, line: bytes) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    folder.diagnostics.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ProxstepError, match=r"diagnostics\.jsonl, line 2"):
        folder.find_diagnostics(1)


def test_a_killed_start_leaves_a_folder_that_can_be_used(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever `create` is killed, the folder is empty or holds a run that can be overwritten."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("proxstep.runs.durable.os.replace", "proxstep.runs.folder.write_file"):
        with monkeypatch.context() as patch:
            patch.setattr(name, killed)
            with pytest.raises(KeyboardInterrupt):
                folder.create(tiny_recipe(folder.path), CPU, 1)
        folder.check_usable(overwrite=True)
    folder.create(tiny_recipe(folder.path), CPU, 1)


def test_local_files_are_found_from_any_folder(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "r.py"):
        Path(name).write_text("")
    for name in ("model", "embedded"):
        Path(name).mkdir()
    task = {"name": "table", "train": "rows.jsonl", "validation": "hub/data"}
    task |= {"rewards": ["r.py:mine", "numeric_answer", "package.module:f"]}
    recipe = tiny_recipe(folder.path, model={"name": "model"}, task=task)
    folder.create(recipe, CPU, 1)
    written = load_recipe(folder.path / "recipe.yaml")
    assert written.model.name == str(tmp_path / "model")
    assert written.task.train == str(tmp_path / "rows.jsonl")
    assert written.task.validation == "hub/data"
    assert written.task.rewards == [f"{tmp_path}/r.py:mine", *task["rewards"][1:]]
    folder.create(tiny_recipe(folder.path), CPU, 1)
    assert load_recipe(folder.path / "recipe.yaml").model.name == "embedded"

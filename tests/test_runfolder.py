"""The run folder: taken ones are refused, run.json is never half-written, only runs are deleted."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch

import proxstep
from proxstep.errors import ProxstepError
from proxstep.recipes import load_recipe
from proxstep.runfolder import RunFolder, describe_machine
from tests.engine import tiny_recipe

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "run")


def test_a_new_run_says_what_it_does_and_on_what(folder: RunFolder) -> None:
    recipe = tiny_recipe(folder.path, "isopo+opo")
    folder.check_free()
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


def test_an_absent_or_an_empty_folder_is_free(folder: RunFolder) -> None:
    folder.check_free()
    assert not folder.path.exists()
    folder.path.mkdir(parents=True)
    folder.check_free()


def test_a_folder_with_a_run_is_not_free(folder: RunFolder) -> None:
    folder.create(tiny_recipe(folder.path), CPU, 1)
    with pytest.raises(ProxstepError, match=r"already holds a run: choose another, continue it"):
        folder.check_free()


@pytest.mark.parametrize("name", ["recipe.yaml", ".hidden", "checkpoints/model"])
def test_a_folder_with_anything_else_is_not_free(folder: RunFolder, name: str) -> None:
    file = folder.path / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ProxstepError, match="exists and is not a run: choose another folder"):
        folder.check_free()


def test_a_file_is_not_free(folder: RunFolder) -> None:
    folder.path.parent.mkdir()
    folder.path.write_text("mine")
    with pytest.raises(ProxstepError, match="exists and is not a run"):
        folder.check_free()


def test_clearing_deletes_a_run_and_nothing_else(folder: RunFolder) -> None:
    folder.clear()
    folder.create(tiny_recipe(folder.path), CPU, 1)
    (folder.path / "checkpoints").mkdir()
    beside = folder.path.with_name("beside.txt")
    beside.write_text("mine")
    folder.clear()
    assert not folder.path.exists()
    assert beside.exists()

    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    folder.clear()
    assert (folder.path / "notes.txt").read_text() == "mine"


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

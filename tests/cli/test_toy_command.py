"""`proxstep toy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxstep.cli import commands as cli
from tests.cli.command_case import mistake, run


@pytest.mark.parametrize("toy", ["saturation", "bandit"])
def test_a_toy_writes_its_files_and_prints_its_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, toy: str
) -> None:
    monkeypatch.setattr("proxstep.lab.toy_report.LOGITS", (0.0, 1.0))
    numbers = ["--seeds", "1", "--steps=2"] if toy == "bandit" else []
    printed = run(capsys, "toy", toy, "--out", "new/deep", *numbers)
    assert "gspo" in printed
    assert printed.endswith("done: new/deep\n")
    names = {f"{toy}.{ending}" for ending in ("png", "svg", "csv", "json")}
    assert {path.name for path in Path("new/deep").iterdir()} == names


def test_a_toy_names_the_file_that_it_cannot_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxstep.lab.toy_report.LOGITS", (0.0, 1.0))
    Path("taken/saturation.png").mkdir(parents=True)
    assert cli.main(["toy", "saturation", "--out", "taken"]) == 2
    assert "taken/saturation.png cannot be written (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("toy", ["saturation", "bandit"])
def test_help_of_a_toy_has_an_example(capsys: pytest.CaptureFixture[str], toy: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", toy, "--help"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert f"example:\n  proxstep toy {toy} --out " in out


def test_a_toy_needs_a_folder_that_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    message = mistake(capsys, "toy", "saturation", "--out", "locked")
    assert message == "--out locked cannot be written; choose another folder"

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = mistake(capsys, "toy", "bandit", "--out", "below")
    assert message == "--out below cannot be written; choose another folder"

"""Folders and files that are written: what is refused, what is kept, what is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from proxstep.runs.checkpoint import STATE_FILE, latest_checkpoint, publish
from tests.cli.command_case import REWARDS, TINY, make_run, mistake, run


@pytest.mark.usefixtures("unloaded")
class TestOutputFolders:
    def test_that_hold_other_files_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("run").mkdir()
        Path("run/notes.txt").write_text("mine")
        for more in ((), ("--overwrite",)):
            message = mistake(capsys, "train", "tiny.yaml", *more)
            assert message == "output_dir run holds files that are no run: choose another folder"
        assert Path("run/notes.txt").read_text() == "mine"

    def test_that_are_files_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        for path in ("tiny.yaml", "tiny.yaml/x"):
            for more in ((), ("--overwrite",)):
                message = mistake(capsys, "train", "tiny.yaml", "--output_dir", path, *more)
                assert message == f"output_dir {path}: tiny.yaml is a file; choose another folder"
        assert Path("tiny.yaml").read_text() == TINY

    def test_that_hold_a_run_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(Path("run"))
        message = mistake(capsys, "train", "tiny.yaml")
        assert message == (
            "output_dir run already holds a run: choose another, continue it with --resume, or "
            "delete it with --overwrite"
        )
        make_run(Path("compared/opo-seed0"))
        keys = ("--algorithms=opo", "--output=compared")
        message = mistake(capsys, "compare", "tiny.yaml", *keys)
        assert message.startswith("output compared already holds 1 run")
        assert Path("compared/opo-seed0/run.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--resume", "nowhere"], "nowhere: not a run folder, it has no recipe.yaml"),
            (["--resume", "tiny.yaml"], "tiny.yaml: not a run folder, it has no recipe.yaml"),
            (["--resume", "run"], "run: no checkpoint there; a run writes one when it ends or is"),
            (["tiny.yaml", "--resume", "run"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--seed=9"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--seed", "9"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--steps", "9"], "run: no checkpoint there; a run writes one"),
            (["--resume", "run", "--dry-run"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--overwrite"], "continues a run by its own recipe: give nothing"),
        ],
    )
    def test_that_cannot_be_resumed(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
    ) -> None:
        make_run(Path("run"))
        assert complaint in mistake(capsys, "train", *arguments)

    def test_with_a_damaged_state_cannot_be_resumed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_run(Path("run"))
        scratch = Path("run/checkpoints/mine")
        scratch.mkdir(parents=True)
        (scratch / STATE_FILE).write_bytes(b"PK\x03\x04 and then nothing")
        saved = publish(scratch, Path("run"), step=1, kept=2)
        message = mistake(capsys, "train", "--resume", "run")
        assert f"{saved / STATE_FILE}: cannot be read" in message
        (saved / STATE_FILE).write_bytes(b"")
        message = mistake(capsys, "train", "--resume", "run")
        assert f"{saved} is damaged: {STATE_FILE} is not what was saved" in message

    def test_with_a_damaged_run_json_cannot_be_resumed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_run(Path("run"))
        for content in (b"{", b"[1]", b"\xff"):
            Path("run/run.json").write_bytes(content)
            for command in (["train", "--resume", "run"], ["train", "tiny.yaml"]):
                message = mistake(capsys, *command)
                assert "run/run.json: damaged" in message or "already holds a run" in message

    def test_that_cannot_be_evaluated(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("folder").mkdir()
        assert "folder: not a run folder" in mistake(capsys, "eval", "folder")
        make_run(Path("run"))
        assert "run: no checkpoint there" in mistake(capsys, "eval", "run")
        assert "unknown key x" in mistake(capsys, "eval", "run", "--x", "3")
        make_run(Path("run"), recipe="algorithm: [")
        assert "run/recipe.yaml, line" in mistake(capsys, "eval", "run")

    def test_that_cannot_be_reported(self, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(Path("run"))
        Path("run/metrics.jsonl").write_text("")
        assert "run/metrics.jsonl: no step yet" in mistake(capsys, "report", "run")
        Path("run/run.json").write_text("{")
        assert "run/run.json: not valid JSON" in mistake(capsys, "report", "run")


@pytest.mark.parametrize(
    "keys",
    [
        ["--task.rewards=[r.py:one]"],
        ["--device=cuda:99"],
        ["--model.name=./none"],
        ["--model.lora.target_modules=[zzz]"],
    ],
)
def test_overwriting_keeps_the_old_run_until_the_new_one_can_begin(
    capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    run(capsys, "train", "tiny.yaml")
    Path("r.py").write_text(REWARDS)
    held = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    mistake(capsys, "train", "tiny.yaml", "--overwrite", *keys)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == held
    assert latest_checkpoint(Path("run")).name == "step-000002"


@pytest.mark.parametrize("keys", [["--task.rewards=[r.py:one]"], ["--device=cuda:99"]])
def test_comparing_again_keeps_the_old_runs_until_the_new_ones_can_begin(
    capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    make_run(Path("compared/opo-seed0"))
    Path("r.py").write_text(REWARDS)
    again = ("--algorithms=opo", "--output=compared", "--overwrite")
    mistake(capsys, "compare", "tiny.yaml", *again, *keys)
    assert Path("compared/opo-seed0/run.json").exists()


def test_overwriting_follows_a_link_and_leaves_it(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("elsewhere"))
    Path("elsewhere/notes.txt").write_text("mine")
    Path("link").symlink_to("elsewhere")
    assert "link already holds a run" in mistake(capsys, "train", "tiny.yaml", "--output_dir=link")
    run(capsys, "train", "tiny.yaml", "--output_dir=link", "--overwrite")
    assert Path("link").is_symlink()
    assert latest_checkpoint(Path("elsewhere")).name == "step-000002"
    assert Path("elsewhere/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("state", [[1], {"step": 1}])
def test_a_state_of_something_else_cannot_be_resumed(
    capsys: pytest.CaptureFixture[str], state: Any
) -> None:
    make_run(Path("run"))
    scratch = Path("run/checkpoints/mine")
    scratch.mkdir(parents=True)
    torch.save(state, scratch / STATE_FILE)
    path = publish(scratch, Path("run"), step=2, kept=2) / STATE_FILE
    assert f"{path}: cannot be read" in mistake(capsys, "train", "--resume", "run")


@pytest.mark.usefixtures("unloaded")
def test_a_scored_file_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for output, complaint in (
        ("folder", "--output folder is a folder; name a file"),
        ("tiny.yaml/x.jsonl", "--output tiny.yaml: tiny.yaml is a file"),
    ):
        assert complaint in mistake(capsys, "eval", "tiny.yaml", "--output", output)


def test_a_scored_file_gets_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "eval", "tiny.yaml", "--output", "new/deep/scored.jsonl")
    assert len(Path("new/deep/scored.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (["--figure=x.foo"], "--figure x.foo must end in one of .png, .svg, .pdf"),
        (["--figure=x"], "--figure x must end in one of"),
        (["--figure=tiny.yaml/x.png"], "tiny.yaml is a file"),
        (["--output=tiny.yaml/x.html"], "tiny.yaml is a file"),
        (["--output=folder"], "--output folder is a folder; name a file"),
    ],
)
def test_a_page_and_a_figure_need_a_place(
    capsys: pytest.CaptureFixture[str], keys: list[str], complaint: str
) -> None:
    make_run(Path("run"))
    Path("folder").mkdir()
    assert complaint in mistake(capsys, "report", "run", *keys)
    assert not Path("report.html").exists()
    if keys[0].startswith("--figure"):
        new = ("--algorithms=opo", "--output=new")
        assert complaint in mistake(capsys, "compare", "tiny.yaml", *new, *keys)
        assert not Path("new").exists()

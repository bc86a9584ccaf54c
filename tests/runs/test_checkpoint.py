"""Checkpoints appear complete or not at all, and reading one runs no code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import (
    MANIFEST,
    STATE_FILE,
    STATE_KEYS,
    checkpoints,
    damage,
    latest_checkpoint,
    load_state,
    save_checkpoint,
)


class Saved:
    """Stands in for a model or a tokenizer: writes one file, or fails half-way."""

    def __init__(self, name: str, text: str = "whole", error: Exception | None = None) -> None:
        self.name, self.text, self.error = name, text, error

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / self.name).write_text(self.text)
        if self.error is not None:
            raise self.error


def state_at(step: int) -> dict[str, Any]:
    return {**dict.fromkeys(STATE_KEYS), "step": step}


def save(folder: Path, step: int, text: str = "whole", **options: Any) -> Path:
    model: Any = options.get("model", Saved("model", text))
    tokenizer = options.get("tokenizer", Saved("tokenizer", text))
    state = options.get("state", state_at(step))
    return save_checkpoint(folder, step, model, tokenizer, state, options.get("kept", 2))


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_holds_model_tokenizer_and_state(tmp_path: Path) -> None:
    state = {
        **state_at(3),
        "tensor": torch.arange(3),
        "nested": {"rates": [0.1, None], "name": "x"},
    }
    saved = save(tmp_path, 3, state=state)
    assert saved == tmp_path / "checkpoints" / "step-000003" == latest_checkpoint(tmp_path)
    assert sorted(path.name for path in saved.iterdir()) == [
        *(MANIFEST, "model", "tokenizer", STATE_FILE)
    ]
    read = load_state(saved)
    assert torch.equal(read.pop("tensor"), state.pop("tensor"))
    assert read == state


@pytest.mark.parametrize("kept", [2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, kept: int) -> None:
    steps = [1, 2, 10, 11]
    for number, step in enumerate(steps, start=1):
        save(tmp_path, step, kept=kept)
        assert held(tmp_path) == [f"step-{n:06d}" for n in steps[:number][-kept:]]


def test_steps_of_more_digits_are_later(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, kept=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]
    save(tmp_path, 999_999, kept=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999999"]


def test_what_a_run_that_went_on_from_an_older_one_left_behind_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, kept=3)
    save(tmp_path, 2, "again")
    assert held(tmp_path) == ["step-000001", "step-000002"]
    assert (latest_checkpoint(tmp_path) / "model").read_text() == "again"


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 2, "old")
    assert (save(tmp_path, 2, "new") / "model").read_text() == "new"
    assert held(tmp_path) == ["step-000002"]


def test_leftovers_of_a_crash_are_ignored_and_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step-000004.incomplete"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("a file that no checkpoint has")
    assert checkpoints(tmp_path) == []
    with pytest.raises(ProxstepError, match="no checkpoint there; a run writes one when it ends"):
        latest_checkpoint(tmp_path)
    save(tmp_path, 3)
    assert held(tmp_path) == ["step-000003"]
    (leftover / "deep").mkdir(parents=True)
    (leftover / "half").write_text("a file that no checkpoint has")
    saved = save(tmp_path, 4)
    assert held(tmp_path) == ["step-000003", "step-000004"]
    assert not (saved / "half").exists()


@pytest.mark.parametrize("broken", ["model", "tokenizer", "state", "rename"])
def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, "good")
    full = OSError(28, "No space left on device")

    def fail(*arguments: Any, **options: Any) -> None:
        raise full

    parts = {broken: Saved(broken, error=full)} if broken in ("model", "tokenizer") else {}
    with monkeypatch.context() as patch:
        if broken == "state":
            patch.setattr(torch, "save", fail)
        if broken == "rename":
            patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, **parts)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    assert (latest_checkpoint(tmp_path) / "model").read_text() == "good"
    assert load_state(latest_checkpoint(tmp_path)) == state_at(1)
    assert held(tmp_path) == ["step-000001"]  # a full disk needs the room
    save(tmp_path, 2)
    assert held(tmp_path) == ["step-000001", "step-000002"]


def test_the_old_ones_go_only_when_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    seen = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append([path.name for path in checkpoints(tmp_path)])
        replace(source, target)
        seen.append([path.name for path in checkpoints(tmp_path)])

    save(tmp_path, 2)
    monkeypatch.setattr(os, "replace", watched)
    save(tmp_path, 3)
    old = ["step-000001", "step-000002"]
    assert seen == [old, [*old, "step-000003"]]
    assert held(tmp_path) == ["step-000002", "step-000003"]


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    replace, before = os.replace, []

    def named(source: Path, target: Path) -> None:
        before.extend(synced)
        replace(source, target)

    monkeypatch.setattr(os, "replace", named)
    save(tmp_path, 1)
    scratch = tmp_path / "checkpoints" / "step-000001.incomplete"
    names = ("model", "tokenizer", STATE_FILE, MANIFEST)
    assert set(before) == {str(scratch), *(str(scratch / name) for name in names)}
    assert synced[-1] == str(scratch.parent)


# Damage


@pytest.mark.parametrize("name", ["model", "tokenizer", STATE_FILE, MANIFEST])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / name).unlink()
    notes: list[str] = []
    assert latest_checkpoint(tmp_path, notes.append).name == "step-000001"
    assert notes == [
        f"{damaged} is damaged: {name} is missing; using step-000001, the one before it"
    ]
    (tmp_path / "checkpoints" / "step-000001" / "model").write_text("While")
    with pytest.raises(ProxstepError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{damaged} is damaged: {name} is missing; {damaged.parent}/step-000001 is damaged: model "
        "is not what was saved (its SHA-256 sum differs); no other checkpoint is there: restore "
        "one, or begin again with --overwrite"
    )


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    os.replace(save(tmp_path, 1), tmp_path / "checkpoints" / "step-000009")
    with pytest.raises(
        ProxstepError, match=r"step-000009 is damaged: its manifest\.json is of step-0"
    ):
        latest_checkpoint(tmp_path)


def test_a_file_too_many_is_damage_unless_it_is_hidden(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    (saved / ".DS_Store").write_text("a file browser's")
    assert damage(saved) is None
    (saved / "adapter_config.json").write_text("{}")  # it would be loaded
    assert damage(saved) == "adapter_config.json is none of its files"


def test_other_folders_are_not_checkpoints(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for name in ("step-best", "step-000007.incomplete", "step-", "old-step-000009", "mine"):
        (parent / name).mkdir(parents=True)
    save(tmp_path, 5)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005"]
    assert (parent / "mine").is_dir()
    assert (parent / "step-best").is_dir()


def test_a_run_without_the_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []
    with pytest.raises(ProxstepError, match=f"{tmp_path}: no checkpoint there"):
        latest_checkpoint(tmp_path)


# Reading the state


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_state_that_was_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    path = save(tmp_path, 1, state={**state_at(1), "tensor": torch.ones(100)}) / STATE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ProxstepError, match=f"{path}: cannot be read"):
        load_state(path.parent)


def test_a_missing_state_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    (saved / STATE_FILE).unlink()
    with pytest.raises(ProxstepError, match=r"trainer_state\.pt: cannot be read"):
        load_state(saved)


class Payload:
    """Unpickles to a call that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_reading_a_state_never_runs_code(tmp_path: Path, writer: str) -> None:
    path = save(tmp_path, 1) / STATE_FILE
    payload = {**state_at(1), "payload": Payload(tmp_path / "was-here")}
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(ProxstepError, match="cannot be read"):
        load_state(path.parent)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "content", [b"garbage", b"PK\x03\x04 and then nothing", b"\x80\x02.", b"h\x01."]
)
def test_a_state_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(ProxstepError, match=f"{STATE_FILE}: cannot be read"):
        load_state(tmp_path)


@pytest.mark.parametrize("state", [None, [1], {}, {"step": 1}, torch.ones(2), set(STATE_KEYS)])
def test_a_state_of_another_program_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / STATE_FILE)
    with pytest.raises(ProxstepError, match=r"cannot be read \(.*so the run cannot be continued"):
        load_state(tmp_path)


@pytest.mark.parametrize("key", sorted(STATE_KEYS))
def test_a_state_without_one_of_its_parts_is_refused(tmp_path: Path, key: str) -> None:
    state = state_at(1)
    del state[key]
    torch.save(state, tmp_path / STATE_FILE)
    with pytest.raises(ProxstepError, match="it is not a trainer's state"):
        load_state(tmp_path)

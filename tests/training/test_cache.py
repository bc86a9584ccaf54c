"""The cache of models: whole or not there, and made by one process at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proxstep.errors import ProxstepError
from proxstep.training.cache import is_kept, keep, making


class Saved:
    """What stands for a model and for a tokenizer."""

    def __init__(self, text: str = "{}") -> None:
        self.text = text

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(self.text)


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    folder, made, notes = tmp_path / "cache" / "model", [], []
    waits = threading.Event()

    def note(text: str) -> None:
        notes.append(text)
        waits.set()

    def ensure(number: int) -> None:
        with making(folder, note) as is_missing:
            if is_missing:
                made.append(number)
                assert waits.wait(20)  # until the other one came
                keep(folder, Saved(), Saved())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ensure, range(2)))
    assert len(made) == 1
    assert notes == [f"another process is making {folder}: waiting for it"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_after_a_failure_the_next_one_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def fail() -> None:
        with making(folder) as is_missing:
            assert is_missing
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    with making(folder) as is_missing:
        assert is_missing
        keep(folder, Saved(), Saved())
    with making(folder) as is_missing:
        assert not is_missing


def test_the_first_to_keep_a_model_wins(tmp_path: Path) -> None:
    keep(tmp_path / "model", Saved("first"), Saved("first"))
    keep(tmp_path / "model", Saved("second"), Saved("second"))
    assert (tmp_path / "model" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ProxstepError, match="make room, or set PROXSTEP_CACHE"):
        keep(tmp_path / "model", Saved(), Saved())
    assert not is_kept(tmp_path / "model")

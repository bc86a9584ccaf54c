"""One process writes into a folder, and its lock goes with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxstep.errors import ProxstepError
from proxstep.runs.lock import LOCK, is_locked, locked

HOLD = """
import sys, time
from pathlib import Path
from proxstep.runs.lock import locked
with locked(Path(sys.argv[1]), "output_dir"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock, and wait until it does."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.stdout.close()
    return process


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    process = hold(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(ProxstepError) as caught, locked(tmp_path, "output_dir"):
        pass
    assert str(caught.value) == (
        f"output_dir {tmp_path} is being written by another process ({process.pid}): wait for it, "
        "stop it, or choose another folder"
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_locked(tmp_path)
    with locked(tmp_path, "output_dir"):
        assert is_locked(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path, "output_dir"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path, "output_dir"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_made_for_the_lock_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", "output_dir"):
        assert is_locked(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b", "output_dir"):
        (tmp_path / "a" / "mine").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


@pytest.mark.parametrize("folder", ["/proc/run", "/proc/self/fd/0/run"])
def test_where_nothing_can_be_written_is_said_at_once(folder: str) -> None:
    with (
        pytest.raises(ProxstepError, match=f"output_dir {folder} cannot be written"),
        locked(Path(folder), "output_dir"),
    ):
        pass

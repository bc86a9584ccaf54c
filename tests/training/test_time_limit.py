"""What a run waits for ends in time, and soon after SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from proxstep.runs.stop import stop_on_signal
from proxstep.training import guarded
from proxstep.training.guarded import TimeIsUp, time_limit


@pytest.mark.parametrize("what", ["time.sleep(9)", "while True: pass", "os.read(pipe, 1)"])
def test_a_block_ends_in_time(what: str) -> None:
    pipe, other = os.pipe()
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    num_threads = threading.active_count()
    with pytest.raises(TimeIsUp), time_limit(0.2):
        exec(what, {"os": os, "time": time, "pipe": pipe})
    assert 0.2 <= time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.active_count() == num_threads
    os.close(pipe)
    os.close(other)


def test_a_block_that_catches_everything_ends_as_well() -> None:
    with pytest.raises(TimeIsUp), time_limit(0.1), suppress(BaseException):
        time.sleep(9)


def test_a_block_that_is_quick_enough_is_left_alone() -> None:
    for _ in range(200):
        with time_limit(10):
            pass
    with time_limit(0.3):
        time.sleep(0.01)
    time.sleep(0.4)


def _send_sigterm_and_sleep(seconds: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


def test_after_sigterm_little_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "SECONDS_AFTER_SIGTERM", 0.2)
    with stop_on_signal() as stop:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), time_limit(60):
            _send_sigterm_and_sleep(9)
        assert stop.made
        assert 0.2 <= time.monotonic() - began < 5
        stop.made = False
        with time_limit(60):
            _send_sigterm_and_sleep(0.05)  # what ends soon may end
        assert stop.made


def test_without_a_handler_sigterm_ends_the_process() -> None:
    program = (
        "import os, signal, time\n"
        "from proxstep.training.guarded import time_limit\n"
        "with time_limit(60):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGTERM


def test_other_threads_have_no_limit() -> None:
    ended = []

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.1)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]

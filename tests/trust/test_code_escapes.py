"""Suite 10: code that tries to leave its sandbox, or to pass without solving: none is rewarded.

Every attempt returns what the test expects only where the escape worked.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import code_sandbox, load_reward, run_code_tests
from proxstep.rewards.code_sandbox import Job, SandboxError, find_sandbox, run

# f() is to return 42. What each tries stands in its name.
# Programs whose f() is to return 42, by what each tries.
TEXT = Path(__file__).with_name("code_escapes.txt").read_text(encoding="utf-8")
ESCAPES = dict(part.rstrip().split("\n", 1) for part in TEXT.split("#### ")[1:])
# Without namespaces the code may read what you may read; docs/tasks.md says so.
READS = {
    "reading the home folder",
    "reading a secret",
    "reading a secret through dots",
    "/proc of the parent",
    "/proc/self/fd",
    "/proc",
    "/etc/passwd",
    "the name service",  # it reads /etc/hosts
}
TESTS = ("assert f() == 42",)


def works(sandbox: str) -> bool:
    try:
        return run(Job(("def f(): return 42",), TESTS), sandbox) is True
    except SandboxError:
        return False


WORKING = [sandbox for sandbox in code_sandbox.SANDBOXES if works(sandbox)]
FILTERED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def attempt(names: Iterable[str], sandbox: str, folder: Path) -> dict[str, bool | None]:
    """Try escapes four at a time; return the verdict of each."""
    (folder / "home").mkdir()
    canary = folder / "home" / "secret"
    canary.write_text("a secret")
    listener = socket.create_server(("127.0.0.1", 0))
    known = {"CANARY": str(canary), "PORT": str(listener.getsockname()[1])}
    known["HOME"] = repr(str(canary.parent))

    def verdict(name: str) -> bool | None:
        code = ESCAPES[name]
        for word, value in known.items():
            code = code.replace(word, value)
        job = Job((code,), TESTS)
        return run(job, sandbox, cpu_seconds=1, wall_seconds=5.0, memory_mib=256)

    with listener, ThreadPoolExecutor(4) as threads:
        found = dict(zip(names, threads.map(verdict, names), strict=True))
    assert canary.read_text() == "a secret"
    assert os.listdir(folder) == ["home"]
    assert os.listdir(canary.parent) == ["secret"]
    assert canary.stat().st_mode & 0o777 != 0o777
    assert not Path("/tmp/canary").exists()
    assert not Path("canary").exists()
    return found


CASES = [
    pytest.param((WORKING or ["none"])[0], 4),
    *(pytest.param(sandbox, 1, marks=pytest.mark.slow) for sandbox in [*WORKING, "none"]),
]


@pytest.mark.parametrize(("sandbox", "step"), CASES)
def test_no_escape_is_rewarded(
    sandbox: str,
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: Callable[..., None],
) -> None:
    """All of them in all sandboxes, and without one; the fast test tries every fourth."""
    monkeypatch.setenv("SECRET", "a secret")
    names = list(ESCAPES)[::step]
    if sandbox == "none":
        names = [name for name in names if FILTERED and name not in READS]
    verdicts = attempt(names, sandbox, tmp_path)
    assert {name: found for name, found in verdicts.items() if found} == {}
    assert not workers()
    counted(f"code that escapes or cheats ({sandbox}): succeeded", len(names))


def test_there_are_enough_escapes() -> None:
    assert len(ESCAPES) > 90
    assert set(ESCAPES) >= READS


def workers() -> list[str]:
    """The command lines of workers that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if str(code_sandbox.WORKER).encode() in command and os.getpid() != int(folder.name):
                state = (folder / "stat").read_text().rpartition(")")[2].split()
                found += [command.decode()] if int(state[1]) == os.getpid() else []
    return found


@pytest.mark.parametrize("sandbox", [*code_sandbox.SANDBOXES])
def test_what_does_not_work_here_is_refused(sandbox: str) -> None:
    if sandbox in WORKING:
        assert find_sandbox() in WORKING
        assert load_reward("run_code_tests") is run_code_tests
        return
    with pytest.raises(SandboxError):
        run(Job(("def f(): return 42",), TESTS), sandbox)
    if not WORKING:
        with pytest.raises(ProxstepError, match="keep it from reading your files"):
            load_reward("run_code_tests")


def test_nothing_is_run_where_nothing_confines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"

    def refused(*_: object, **__: object) -> None:
        raise SandboxError("not here")

    monkeypatch.setattr(code_sandbox, "run", refused)
    find_sandbox.cache_clear()
    columns = {"test_list": [["assert f() == 42"]]}
    code = f"```python\nopen({str(canary)!r}, 'w')\n```"
    for use in (
        lambda: load_reward("run_code_tests"),
        lambda: run_code_tests([""], [code], **columns),
    ):
        with pytest.raises(ProxstepError) as error:
            use()
        assert "bwrap: not here; namespaces: not here" in str(error.value)
        assert "run_code_tests_without_sandbox in task.rewards" in str(error.value)
    assert not canary.exists()
    find_sandbox.cache_clear()


@pytest.mark.parametrize("sandbox", [*WORKING, "none"])
def test_what_is_refused_can_be_caught(sandbox: str) -> None:
    code = (
        "import os, socket, threading\ndef f():\n    n = 0\n"
        "    for attempt in (os.fork, socket.socket, threading.Thread(target=int).start,\n"
        "                    lambda: open('canary', 'w'), lambda: os.kill(1, 9)):\n"
        "        try:\n            attempt()\n"
        "        except (OSError, RuntimeError):\n            n += 1\n"
        "    return 37 + n"
    )
    assert run(Job((code,), TESTS), sandbox) is FILTERED


@pytest.mark.parametrize("sandbox", [*WORKING, "none"])
def test_a_job_leaves_nothing_for_the_next(sandbox: str) -> None:
    seen = Job(("import sys\ndef f():\n    sys.seen = 42\n    return 42",), TESTS)
    assert run(seen, sandbox) is True
    code = "import sys\ndef f():\n    return getattr(sys, 'seen', 1)"
    assert run(Job((code,), TESTS), sandbox) is False


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", pytest.param("os._exit(0)", marks=pytest.mark.slow)]
)
def test_no_code_outlives_the_program(end: str) -> None:
    source = (
        "import os, threading, time\n"
        "from proxstep.rewards.code_sandbox import Job, find_sandbox, run\n"
        "try:\n    sandbox = find_sandbox()\n"
        "except Exception:\n    sandbox = 'none'\n"
        "job = Job(('import time\\ndef f():\\n    time.sleep(600)',), ('assert f() == 42',))\n"
        "threading.Thread(target=run, args=(job, sandbox), daemon=True).start()\n"
        f"time.sleep(1.0)\nprint(os.getpid(), flush=True)\n{end}\n"
    )
    before = running()
    subprocess.run([sys.executable, "-c", source], capture_output=True)
    deadline = time.monotonic() + 20
    while running() - before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running() -> set[str]:
    """Processes that run a worker's file, whosever."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"code_worker.py" in (folder / "cmdline").read_bytes():
                found.add(folder.name)
    return found

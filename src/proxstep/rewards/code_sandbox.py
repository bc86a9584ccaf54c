"""Two confined processes for each completion: one runs the code, the other the tests that call it.

What they may do, and how a call goes from the tests to the code, is in `code_worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

from proxstep.errors import ProxstepError

WORKER = Path(__file__).with_name("code_worker.py")
SANDBOXES = ("bwrap", "namespaces")
CPU_SECONDS, WALL_SECONDS, MEMORY_MIB = 5, 30.0, 512
TRIES = 3  # of a sandbox that does not start
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Job:
    """A completion to grade.

    Attributes:
        programs: What its code may be; the first that can be loaded is.
        tests: Python sources that call the code.
        setup: Python sources that run before the tests.
        prompt: Python that defines what the tests use besides the code; None, or text that is no
            Python, for nothing.
        entry_point: Name of the function under test; None for every name that the tests use and
            nothing else defines.
        has_check: Whether the tests define a function `check` that is to be called with it.
    """

    programs: tuple[str, ...]
    tests: tuple[str, ...]
    setup: tuple[str, ...] = ()
    prompt: str | None = None
    entry_point: str | None = None
    has_check: bool = False


class SandboxError(Exception):
    """A sandbox did not start; the message says why."""


def grade(jobs: Sequence[Job], sandbox: str) -> list[bool | None]:
    """Return for each job whether its tests pass; None where they went over a limit.

    Args:
        jobs: What to grade, in up to four sandboxes at a time.
        sandbox: One of `SANDBOXES`, or "none".

    Raises:
        ProxstepError: A sandbox does not start, several times in turn.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        futures = [threads.submit(_verdict, job, sandbox) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _verdict(job: Job, sandbox: str) -> bool | None:
    for last in (False, False, True):
        try:
            return run(job, sandbox)
        except SandboxError as error:
            if last:
                raise ProxstepError(
                    f"a process that runs a model's code does not start ({error}), {TRIES} times "
                    "in turn: is memory short, or does something end processes here?"
                ) from error
    raise AssertionError


@cache
def find_sandbox() -> str:
    """Return the first of `SANDBOXES` that works here.

    Raises:
        ProxstepError: None does.
    """
    job = Job(("def f(x):\n    return x + 1",), ("assert f(1) == 2",))
    reasons = []
    for sandbox in SANDBOXES:
        try:
            if run(job, sandbox):
                return sandbox
            reasons.append(f"{sandbox}: the code does not run in it")
        except SandboxError as error:
            reasons.append(f"{sandbox}: {error}")
    raise ProxstepError(
        "reward 'run_code_tests' runs what a model wrote, and here nothing would keep it from "
        f"reading your files ({'; '.join(reasons):.400}). Install bubblewrap (bwrap), or allow "
        "user namespaces. On a machine where it may read all that you may, and that you can lose, "
        "write run_code_tests_without_sandbox in task.rewards instead"
    )


def run(
    job: Job,
    sandbox: str,
    *,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory_mib: int = MEMORY_MIB,
) -> bool | None:
    """Return whether a job's tests pass; None where they went over a limit.

    Args:
        job: What to grade.
        sandbox: One of `SANDBOXES`, or "none".
        cpu_seconds: Processor time of each of the two processes.
        wall_seconds: Wall-clock time, for code that waits.
        memory_mib: Address space of each, in MiB.

    Raises:
        SandboxError: It does not start here.
    """
    limits = [str(cpu_seconds), str(memory_mib)]
    token = secrets.token_hex(16)  # that there is an end to the tests is told by it alone
    with contextlib.ExitStack() as stack:
        errors, given = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        given.write(json.dumps({**asdict(job), "token": token}).encode())
        given.seek(0)
        with contextlib.ExitStack() as closing:
            pipes = [os.pipe() for _ in range(3)]
            (verdict, verdict_out), (code_in, code_out), (tests_in, tests_out) = pipes
            stack.callback(os.close, verdict)
            for descriptor in (verdict_out, code_in, code_out, tests_in, tests_out):
                closing.callback(os.close, descriptor)
            stack.enter_context(_process("solution", sandbox, limits, code_in, tests_out))
            own = (given.fileno(), verdict_out)
            stack.enter_context(_process("tests", sandbox, limits, tests_in, code_out, own, errors))
        reply = _read(verdict, time.monotonic() + wall_seconds)
        errors.seek(0)
        reason = errors.read(300).decode(errors="replace")
    if not reply.startswith(b"R"):
        reason = f"{reply.decode(errors='replace')} {reason}"
        raise SandboxError(" ".join(reason.split()) or "it ended at once, or hung")
    if reply == f"R{token}?".encode():
        raise SandboxError("the process of the code ended before it began")
    return {f"R{token}1".encode(): True, f"R{token}0".encode(): False}.get(reply)


def _command(role: str, sandbox: str, limits: Sequence[str], own: Sequence[int]) -> list[str]:
    """Return the command of one process."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    visible = [path for path in _SYSTEM if os.path.lexists(path)]
    visible += [path for path in (sys.base_prefix,) if not path.startswith("/usr/")]
    wrapper, worker = [], str(WORKER)
    if sandbox == "bwrap":
        bwrap = shutil.which("bwrap") or "bwrap"
        wrapper, worker = [bwrap, "--unshare-all", "--die-with-parent", "--clearenv"], "/worker.py"
        wrapper += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        wrapper += ["--setenv", "PYTHONHASHSEED", "0"]
        for path in visible:
            is_link = os.path.islink(path)
            wrapper += (
                ["--symlink", os.readlink(path), path] if is_link else ["--ro-bind", path, path]
            )
        wrapper += ["--ro-bind", str(WORKER), worker, "--dev-bind", "/dev/null", "/dev/null"]
        wrapper += ["--remount-ro", "/", "--chdir", "/", "--"]
    # -s -S -P: nothing but the standard library is imported. -B: nothing is written.
    command = [python, "-s", "-S", "-P", "-B", worker, role, sandbox, *limits]
    return [*wrapper, *command, ",".join(map(str, own)), *visible]


@contextlib.contextmanager
def _process(
    role: str,
    sandbox: str,
    limits: Sequence[str],
    stdin: int,
    stdout: int,
    own: tuple[int, ...] = (),
    stderr: IO[bytes] | None = None,
) -> Iterator[None]:
    """Start a process in a session and an environment of its own; end it, and its children."""
    try:
        process = subprocess.Popen(
            _command(role, sandbox, limits, own),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr or subprocess.DEVNULL,
            pass_fds=own,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"{error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(descriptor: int, deadline: float) -> bytes:
    """Return what is written up to the end, or up to the deadline."""
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            piece = os.read(descriptor, 1024)
            found += piece
            if not piece:
                break
    return found

"""Processes that grade answers: a hang, a crash or a memory bomb costs one answer.

They are plain child processes that run one file of this package: they start the same way from
daemons and threads, and share no memory with the caller.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from proxstep.errors import ProxstepError

WORKER = Path(__file__).with_name("grading_worker.py")
STARTING_SECONDS = 120.0
JOBS_PER_WORKER = 5_000  # the grammar's cache grows with every new answer


class _Worker:
    """One process, and what it is doing."""

    def __init__(self, cpu_seconds: float, memory_mib: int) -> None:
        # -P: the modules beside the worker's file are not to be imported by their bare names.
        # Its own process group: Ctrl-C reaches the caller alone. A fixed hash seed: sympy's
        # order of terms is the same in every process.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(WORKER), str(cpu_seconds), str(memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            process_group=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        self.ready = False
        self.job: int | None = None
        self.num_jobs = 0
        self.deadline = time.monotonic() + STARTING_SECONDS

    def send(self, job: int, pair: tuple[str, str], wall_seconds: float) -> None:
        """Begin a job; if the process has died, the next `read` returns nothing."""
        self.job, self.deadline = job, time.monotonic() + wall_seconds
        self.num_jobs += 1
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")

    def read(self) -> bytes:
        """Return what the process wrote, nothing if it has died."""
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 1024)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class GradingPool:
    """Compares answers in processes that it starts when they are needed and replaces when lost.

    Args:
        num_workers: Largest number of processes; None for one per usable core, at most 4.
        cpu_seconds: Processor time that one comparison may take. Not wall-clock time, so that
            what is graded does not depend on what else the machine does.
        wall_seconds: Wall-clock time after which a process that does nothing is given up.
        memory_mib: Address space of one process, in MiB.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        cpu_seconds: float = 2.0,
        wall_seconds: float = 60.0,
        memory_mib: int = 1024,
    ) -> None:
        self._num_workers = num_workers or min(4, _usable_cores())
        self._limits = (cpu_seconds, memory_mib)
        self._wall_seconds = wall_seconds
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Return for each pair of a reference and an answer whether they are equal.

        Returns:
            None where that could not be decided within the limits.

        Raises:
            ProxstepError: If no process can be started.
        """
        equal: list[bool | None] = [None] * len(pairs)
        waiting = deque(range(len(pairs)))
        with self._lock, contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close)  # half-done jobs would answer the next call's
            while waiting or any(worker.job is not None for worker in self._workers):
                self._hand_out(waiting, pairs)
                self._collect(equal)
            on_failure.pop_all()
        return equal

    def close(self) -> None:
        """End all processes; the next call starts new ones."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        while self._workers:
            self._workers.pop().close()

    def _hand_out(self, waiting: deque[int], pairs: Sequence[tuple[str, str]]) -> None:
        """Give every idle process a job, and start processes for what is left."""
        for worker in list(self._workers):
            if waiting and worker.ready and worker.job is None:
                if worker.num_jobs >= JOBS_PER_WORKER or worker.process.poll() is not None:
                    self._drop(worker)
                    continue
                job = waiting.popleft()
                worker.send(job, pairs[job], self._wall_seconds)
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._num_workers and starting < len(waiting):
            self._workers.append(_Worker(*self._limits))
            starting += 1

    def _collect(self, equal: list[bool | None]) -> None:
        """Wait until a process replies or its time is up, and store the verdicts."""
        active = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            nearest = min(worker.deadline for worker in active)
            events = selector.select(max(nearest - time.monotonic(), 0))
        spoke = [key.data for key, _ in events]
        for worker in active:
            if worker in spoke:
                self._hear(worker, worker.read(), equal)
            elif time.monotonic() > worker.deadline:
                self._hear(worker, b"", equal)

    def _hear(self, worker: _Worker, reply: bytes, equal: list[bool | None]) -> None:
        """Handle what one process wrote; an empty message means that it died or hangs."""
        if reply == b"R":
            worker.ready = True
        elif not worker.ready:
            reason = reply.removeprefix(b"E").decode(errors="replace") or "it ended or hung"
            raise ProxstepError(
                f"math_verify: a grading process does not start ({reason:.300}); reinstall "
                'with `pip install "proxstep[train]"`'
            )
        elif reply in (b"0", b"1"):
            assert worker.job is not None
            equal[worker.job], worker.job = reply == b"1", None
        else:
            self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()


_POOLS: dict[int, GradingPool] = {}
"""By process id: a fork must not use its parent's processes."""


def shared_pool() -> GradingPool:
    """Return this process's pool; its workers start with the first call and end with it."""
    pid = os.getpid()
    if pid not in _POOLS:
        _POOLS.setdefault(pid, GradingPool())
    return _POOLS[pid]


@atexit.register
def _close_pool() -> None:
    if pool := _POOLS.pop(os.getpid(), None):
        pool.close()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

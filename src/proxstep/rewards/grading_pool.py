"""Processes that grade answers: a hang, a crash or a memory bomb costs one answer.

They are plain child processes that run one file of this package: they start the same way from
daemons and threads, and share no memory with the caller.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import selectors
import signal
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
TRIES = 3  # of a job whose process was lost, and of a process that does not start
# A process that ends so was at its limits, and would be again with the same answer.
_AT_A_LIMIT = (-signal.SIGPROF, 3)

_log = logging.getLogger(__name__)


class _Batch:
    """The pairs of one call, what was found of each, and how often each was tried."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.pairs = pairs
        self.equal: list[bool | None] = [None] * len(pairs)
        self.waiting = deque(range(len(pairs)))
        self._num_lost = [0] * len(pairs)

    def lost(self, job: int, ending: str) -> None:
        """Grade a job again whose process was lost, unless that happened too often."""
        self._num_lost[job] += 1
        if self._num_lost[job] < TRIES:
            self.waiting.append(job)
            return
        _log.warning(
            "math_verify: %d grading processes in turn were lost at the answer %.80r (the last %s);"
            " it is graded 0 and counted as ungraded",
            TRIES,
            self.pairs[job][1],
            ending,
        )


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

    def end(self) -> str:
        """End the process if it has not ended by itself, and return in words how it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a little earlier
            self.process.wait(1.0 if time.monotonic() < self.deadline else 0.0)
        code = self.process.returncode
        self.close()
        if code is None:
            return "did not answer in time"
        return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"

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
        self._num_failed_starts = 0
        self._lock = threading.Lock()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Return for each pair of a reference and an answer whether they are equal.

        Returns:
            None where that could not be decided within the limits.

        Raises:
            ProxstepError: If no process can be started.
        """
        batch = _Batch(pairs)
        with self._lock, contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close)  # half-done jobs would answer the next call's
            self._num_failed_starts = 0
            while batch.waiting or any(worker.job is not None for worker in self._workers):
                self._hand_out(batch)
                self._collect(batch)
            on_failure.pop_all()
        return batch.equal

    def close(self) -> None:
        """End all processes; the next call starts new ones."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        while self._workers:
            self._workers.pop().close()

    def _hand_out(self, batch: _Batch) -> None:
        """Give every idle process a job, and start processes for what is left."""
        waiting = batch.waiting
        for worker in list(self._workers):
            if waiting and worker.ready and worker.job is None:
                if worker.num_jobs >= JOBS_PER_WORKER or worker.process.poll() is not None:
                    self._drop(worker)
                    continue
                job = waiting.popleft()
                worker.send(job, batch.pairs[job], self._wall_seconds)
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._num_workers and starting < len(waiting):
            self._workers.append(_Worker(*self._limits))
            starting += 1

    def _collect(self, batch: _Batch) -> None:
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
                self._hear(worker, worker.read(), batch)
            elif time.monotonic() > worker.deadline:
                self._hear(worker, b"", batch)

    def _hear(self, worker: _Worker, reply: bytes, batch: _Batch) -> None:
        """Handle what one process wrote; an empty message means that it died or hangs."""
        if reply == b"R":
            worker.ready, self._num_failed_starts = True, 0
        elif not worker.ready:
            self._not_started(self._drop(worker), reply.removeprefix(b"E").decode(errors="replace"))
        elif reply in (b"0", b"1"):
            assert worker.job is not None
            batch.equal[worker.job], worker.job = reply == b"1", None
        else:
            ending = self._drop(worker)
            assert worker.job is not None
            if worker.process.returncode not in _AT_A_LIMIT:
                batch.lost(worker.job, ending)

    def _not_started(self, ending: str, reason: str) -> None:
        """Raise where a process cannot start, or where several in turn did not."""
        self._num_failed_starts += 1
        if reason:
            remedy = 'reinstall with `pip install "proxstep[train]"`'
        elif self._num_failed_starts < TRIES:
            return
        else:
            reason = "it ended or hung"
            remedy = (
                f"{TRIES} in turn, and the last {ending}: is memory short, or does something end "
                "processes here?"
            )
        raise ProxstepError(
            f"math_verify: a grading process does not start ({reason:.300}); {remedy}"
        )

    def _drop(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        return worker.end()


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

"""Ranks of torch.distributed: processes that are started once and then run one function after
another.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NUM_RANKS = 2
SECONDS = 120
"""What one call may take, and one collective of it."""


class Ranks:
    """Processes of one gloo group on the CPU.

    They are started by the first call, which costs the import of torch and transformers, and again
    by the next one after a call that failed: a rank whose partner is gone would wait for it.

    Args:
        folder: Where the processes find each other; nothing else may be in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what the function returns on each rank.

        Args:
            function: One that a module's name and its own name find again.
            args: Its arguments, the same on all ranks.

        Raises:
            RuntimeError: If it raises or does not return on one of them.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, args)))
        results: dict[Any, Any] = {}
        while len(results) < NUM_RANKS:
            waiting = [c for c in self._connections if c not in results]
            ready = wait(waiting, timeout=SECONDS)
            if not ready:
                self.close()
                raise RuntimeError(f"{function.__name__} did not return on a rank")
            for connection in ready:
                results[connection] = self._receive(connection)
        return [results[connection] for connection in self._connections]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = self._folder / str(self._starts)
        self._starts += 1
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, rendezvous), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _receive(self, connection: Any) -> Any:
        try:
            failed, value = pickle.loads(connection.recv_bytes())
        except EOFError:
            failed, value = True, "a rank ended"
        if failed:
            self.close()
            raise RuntimeError(value)
        return value


def _serve(connection: Any, rank: int, rendezvous: Path) -> None:
    """Run what is asked for, with warnings as errors."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=SECONDS),
    )
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                value = function(*args)
        except BaseException:
            connection.send_bytes(pickle.dumps((True, traceback.format_exc())))
            raise
        connection.send_bytes(pickle.dumps((False, value)))

"""Training loops that take turns: one step of each at a time, in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seconds:
    """Processor time of one training step, in seconds.

    Attributes:
        step: Of all of it.
        update: Of what is not sampling and grading: forward, backward, optimizer, bookkeeping.
    """

    step: float
    update: float


class _Closed(BaseException):
    """Unwinds a training loop that is not needed any more; no handler of errors sees it."""


class Turns:
    """A training loop in a thread of its own that runs only while its next step is asked for.

    Args:
        run: The loop; it gets this object, says with `measure` what is the update, and calls
            `end_of_step` after every step.
    """

    def __init__(self, run: Callable[[Turns], object]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closing, self._is_update, self._inside = False, False, 0.0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, args=(run,), daemon=True)
        self._thread.start()

    def _main(self, run: Callable[[Turns], object]) -> None:
        self._go.acquire()
        try:
            run(self)
            self._failure = RuntimeError("the training loop ended before the benchmark")
        except _Closed:
            pass
        except BaseException as error:  # noqa: BLE001  # handed to whoever asked for the step
            self._failure = error
        self._done.release()

    def step(self) -> Seconds:
        """Run one step: from the end of the last one to the end of this one."""
        self._inside = 0.0
        start = time.process_time()
        self._go.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure
        total = time.process_time() - start
        return Seconds(total, self._inside if self._is_update else total - self._inside)

    def end_of_step(self) -> None:
        """Hand over, until the next step is asked for."""
        self._done.release()
        self._go.acquire()
        if self._closing:
            raise _Closed

    def measure(self, owner: Any, method: str, *, is_update: bool) -> None:
        """Take the processor time of an object's method: it is the update, or what is none."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            self._inside += time.process_time() - start
            return result

        self._is_update = is_update
        setattr(owner, method, timed)

    def close(self) -> None:
        """End the loop."""
        self._closing = True
        self._go.release()
        self._thread.join()

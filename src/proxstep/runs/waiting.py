"""Waits that a person should know of: what is waited for, how far it is, how long it will take."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

DELAYS = (2.0, 8.0, 20.0, 30.0)
"""Seconds between the lines of one wait where lines stay; then a minute each."""
_LATER = 60.0
_TOLD = 0.1
"""Share of the work from which on the time left is told: the first to end measure little."""


class Wait:
    """One wait.

    Args:
        what: What is waited for.
        total: How much there is to do, in `unit`; None where nobody knows.
        unit: What is counted.
        now: The clock, in seconds.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        unit: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit, self._now = what, total, unit, now
        self._done, self._began = 0.0, now()

    def say(self, text: str) -> None:
        """Say what is done now."""
        self._what = text

    def advance(self, done: float) -> None:
        """Say how much is done in all."""
        self._done = done

    def __str__(self) -> str:
        """Return what there is to say.

        >>> clock = iter([0.0, 30.0])
        >>> wait = Wait("greedy evaluation", 100, "prompts", lambda: next(clock))
        >>> wait.advance(25)
        >>> str(wait)
        'greedy evaluation: 25 of 100 prompts, 0:30, about 1:30 left'
        """
        elapsed = self._now() - self._began
        if self._total is None:
            return f"{self._what}, {clock_time(elapsed)}"
        text = f"{self._what}: {self._done:.0f} of {self._total:.0f} {self._unit}".rstrip()
        text += f", {clock_time(elapsed)}"
        if self._done >= _TOLD * self._total > 0:
            left = elapsed * max(self._total - self._done, 0) / self._done
            text += f", about {clock_time(left)} left"
        return text


class Waits(Protocol):
    """What shows waits."""

    def wait(
        self, what: str, total: float | None = None, unit: str = "", *, brief: bool = False
    ) -> AbstractContextManager[Wait]:
        """Show a wait while it lasts; `brief` ones are no news once a run has taken a step."""
        ...


class _Unseen:
    """Shows no wait."""

    @contextmanager
    def wait(
        self, what: str, total: float | None = None, unit: str = "", *, brief: bool = False
    ) -> Iterator[Wait]:
        """Show nothing."""
        del brief
        yield Wait(what, total, unit)


UNSEEN: Waits = _Unseen()


def clock_time(seconds: float) -> str:
    """Return a duration.

    >>> clock_time(5), clock_time(3725)
    ('0:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def told(write: Callable[[], None]) -> Iterator[None]:
    """Call `write` now and then while the block lasts: after 2 seconds first, then ever less."""
    over = threading.Event()

    def tell() -> None:
        for delay in itertools.chain(DELAYS, itertools.repeat(_LATER)):
            if over.wait(delay):
                return
            write()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

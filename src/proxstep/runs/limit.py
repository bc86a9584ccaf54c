"""A time limit on what a run waits for, and what SIGTERM does meanwhile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_AFTER_SIGTERM = 5.0
"""How long what is waited for may go on after SIGTERM: clusters kill after half a minute."""


class TimeIsUp(BaseException):
    """The limit is over. Not an `Exception`, which a reward function may well catch itself."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End a block that takes too long.

    It ends where Python runs or waits, and not inside of other code. In another than the main
    thread, and on Windows, there is no limit.

    Args:
        seconds: Longest time; after SIGTERM at most `SECONDS_AFTER_SIGTERM` more.

    Raises:
        TimeIsUp: If it took too long, even where the block has caught the exception.
        KeyboardInterrupt: The same after SIGTERM.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main or not hasattr(signal, "pthread_kill"):
        yield
        return
    number = signal.SIGTERM  # wakes a block that sleeps or waits, and is nobody's timer
    before: Any = signal.getsignal(number)
    timers: list[threading.Timer] = []
    ended: list[type[BaseException]] = []
    inside = True

    def start(delay: float, error: type[BaseException]) -> None:
        def end() -> None:
            ended.append(error)
            signal.pthread_kill(main.ident or 0, number)

        timers.append(threading.Timer(delay, end))
        timers[-1].daemon = True
        timers[-1].start()

    def on_signal(*arguments: Any) -> None:
        if ended:
            if inside:
                raise ended[0]
        elif callable(before):
            before(*arguments)
            start(SECONDS_AFTER_SIGTERM, KeyboardInterrupt)
        elif before == signal.SIG_DFL:
            signal.signal(number, before)
            signal.raise_signal(number)

    signal.signal(number, on_signal)
    start(seconds, TimeIsUp)
    try:
        yield
    finally:
        inside = False
        for timer in timers:
            timer.cancel()
            timer.join()
        signal.signal(number, before)
    if ended:
        raise ended[0]

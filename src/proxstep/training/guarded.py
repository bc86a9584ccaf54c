"""A reward function that ends in time, and whose exceptions say which completion they are about."""

from __future__ import annotations

import functools
import inspect
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.rewards import MeasuredRewards, RewardFunction, reward_name
from proxstep.rewards.modules import place_of
from proxstep.rewards.returns import awaited, checked_rewards
from proxstep.rewards.scoring import apart

_SECONDS_TO_SEARCH = 60.0
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


def guarded(function: RewardFunction, seconds: float) -> RewardFunction:
    """Return a reward function that raises a `ProxstepError` for whatever goes wrong in it.

    Args:
        function: The reward function.
        seconds: Longest time that one call may take.
    """
    name = reward_name(function)

    @functools.wraps(function)
    def call(*arguments: Any, **columns: Any) -> list[Any]:
        given = _by_name(function, arguments, columns)
        try:
            with time_limit(seconds):
                rewards = awaited(function(**apart(given)))
            if isinstance(rewards, MeasuredRewards):
                return rewards
            return checked_rewards(name, rewards, len(given["completions"]))
        except TimeIsUp:
            raise ProxstepError(
                f"reward function {name!r} took longer than task.reward_seconds {seconds:g} for "
                f"{len(given['completions'])} completions: mend it, or raise the limit"
            ) from None
        except ProxstepError:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            own = getattr(getattr(function, "__code__", None), "co_filename", None)
            text = f": {error}" if str(error) else ""
            raise ProxstepError(
                f"reward function {name!r} raised {type(error).__name__}{text} "
                f"({place_of(error, own)}) on {_culprit(function, given, error)}"
            ) from error

    call.__name__ = name
    return call


def _by_name(
    function: RewardFunction, arguments: tuple[Any, ...], columns: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    signature = inspect.signature(function)
    given = dict(signature.bind(*arguments, **columns).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def _culprit(function: RewardFunction, given: Mapping[str, Any], error: BaseException) -> str:
    """Return the first completion that raises the same when it is graded alone."""
    number = len(given["completions"])

    def alone(index: int, values: Any) -> Any:
        whole = isinstance(values, list) and len(values) == number
        return values[index : index + 1] if whole else values

    with suppress(TimeIsUp, Exception, SystemExit), time_limit(_SECONDS_TO_SEARCH):
        for index in range(number):
            try:
                part = {key: alone(index, value) for key, value in given.items()}
                awaited(function(**apart(part)))
            except type(error):
                return f"completion {index}: {given['completions'][index]!r:.200}"
    return f"{number} completions, not on one of them alone"

"""A reward function that ends in time, and whose exceptions say which completion they are about."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.rewards import RewardFunction, reward_name
from proxstep.runs.limit import TimeIsUp, time_limit

_SECONDS_TO_SEARCH = 60.0


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
                return function(**given)
        except TimeIsUp:
            raise ProxstepError(
                f"reward function {name!r} took longer than task.reward_seconds {seconds:g} for "
                f"{len(given['completions'])} completions: mend it, or raise the limit"
            ) from None
        except ProxstepError:
            raise
        except Exception as error:  # whatever a user's function raises
            text = f": {error}" if str(error) else ""
            raise ProxstepError(
                f"reward function {name!r} raised {type(error).__name__}{text} "
                f"({_place(function, error)}) on {_culprit(function, given, error)}"
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


def _place(function: RewardFunction, error: Exception) -> str:
    """Return the line that raised, in the function's own file if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    frame = next((f for f in reversed(frames) if f.filename == own), frames[-1])
    return f"{frame.filename}, line {frame.lineno}"


def _culprit(function: RewardFunction, given: Mapping[str, Any], error: Exception) -> str:
    """Return the first completion that raises the same when it is graded alone."""
    number = len(given["completions"])

    def alone(index: int, values: Any) -> Any:
        whole = isinstance(values, list) and len(values) == number
        return values[index : index + 1] if whole else values

    with suppress(TimeIsUp, Exception), time_limit(_SECONDS_TO_SEARCH):
        for index in range(number):
            try:
                function(**{key: alone(index, values) for key, values in given.items()})
            except type(error):
                return f"completion {index}: {given['completions'][index]!r:.200}"
    return f"{number} completions, not on one of them alone"

"""What reward functions return: lists, arrays, or something to wait for; checked, as numbers."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import threading
from decimal import Decimal
from numbers import Real
from typing import Any

from proxstep.errors import ProxstepError

_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}


def awaited(value: Any) -> Any:
    """Return a value, after waiting for it where it is a coroutine or another awaitable.

    All of a process's are waited for in one event loop, in a thread of its own: sessions and locks
    that a function keeps from call to call stay usable, and the caller may itself be in a loop.
    """
    if not inspect.isawaitable(value):
        return value

    async def finish() -> tuple[Any, SystemExit | None]:
        try:
            return await value, None
        except SystemExit as error:  # it would end the loop, and nobody would be told
            return None, error

    future = asyncio.run_coroutine_threadsafe(finish(), _loop())
    try:
        result, exited = future.result()
    finally:
        future.cancel()  # where the wait was interrupted
    if exited is not None:
        raise exited
    return result


def _loop() -> asyncio.AbstractEventLoop:
    if os.getpid() not in _LOOPS:
        loop = _LOOPS[os.getpid()] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
    return _LOOPS[os.getpid()]


def checked_rewards(name: str, rewards: Any, num_completions: int) -> list[float | None]:
    """Return a function's rewards as a list of numbers and None.

    Args:
        name: Of the function.
        rewards: A list or tuple, or a one-dimensional array or tensor.
        num_completions: How many there must be.

    Raises:
        ProxstepError: They are not one number or None per completion.
    """
    kind = type(rewards).__name__
    if hasattr(rewards, "tolist") and hasattr(rewards, "ndim"):
        if rewards.ndim != 1:
            raise ProxstepError(
                f"reward function {name!r} returned a {kind} of {rewards.ndim} dimensions; return "
                "one number or None for each completion"
            )
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple):
        raise ProxstepError(
            f"reward function {name!r} returned a {kind}; return a list of numbers or None, or an "
            "array"
        )
    if len(rewards) != num_completions:
        raise ProxstepError(
            f"reward function {name!r} returned {len(rewards)} rewards for "
            f"{num_completions} completions; return one each"
        )
    return [_checked_reward(name, index, reward) for index, reward in enumerate(rewards)]


def _checked_reward(name: str, index: int, reward: Any) -> float | None:
    """Return a reward as a float or None; raise where it is neither."""
    kind = type(reward).__name__
    if getattr(reward, "ndim", None) == 0 and hasattr(reward, "item"):
        reward = reward.item()
    if reward is None:
        return None
    if not isinstance(reward, Real | Decimal):
        raise ProxstepError(
            f"reward function {name!r} returned a {kind} for completion {index}; "
            "return a number or None"
        )
    try:
        return float(reward)
    except OverflowError:  # an integer beyond the largest float
        return math.inf

"""Countdown: from three numbers to a target, by trial and error that is written down.

A problem `3,7,5:26` is solved by `3+7=10,10*5=50;3*7=21,21+5=26`: attempts with a semicolon between
them, of which the last one counts. Each step takes two of the numbers that are left and puts their
sum, difference or product back; every number is used, and the target is what remains at the end.

The reference solutions try at random, one to six attempts, and stop at the one that is right. Who
imitates them wanders; rewards teach to try what is likely, to calculate well and to stop in time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from proxstep.rewards.countdown import result_of
from proxstep.tasks.base import Example, Task, drawn_task

_NUMBERS = range(2, 16)
_TARGETS = range(10, 100)
_MOST_ATTEMPTS = 6


def _attempt(numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
    """Return an attempt at random, without negative results, and what it leaves."""
    steps, (value, *others) = [], rng.sample(numbers, len(numbers))
    for number in others:
        left, right = max(value, number), min(value, number)
        operator = rng.choice("+-*")
        if operator != "-":
            left, right = value, number
        value = result_of(left, operator, right)
        steps.append(f"{left}{operator}{right}={value}")
    return ",".join(steps), value


def _draw(rng: random.Random) -> Example:
    while True:
        numbers = [rng.choice(_NUMBERS) for _ in range(3)]
        right, target = _attempt(numbers, rng)
        if target in _TARGETS and target not in numbers:
            break
    attempts: list[str] = []
    wrong = rng.randrange(_MOST_ATTEMPTS)
    while len(attempts) < wrong:
        attempt, value = _attempt(numbers, rng)
        if value != target and attempt not in attempts:
            attempts.append(attempt)
    return Example(
        f"{','.join(map(str, numbers))}:{target}?",
        str(target),
        solution=";".join([*attempts, right]),
        columns={"numbers": numbers},
    )


def countdown_task(num_validation: int = 256, seed: int = 0) -> Task:
    """Return countdown problems, with no problem in both training and validation.

    Args:
        num_validation: Number of distinct validation problems, at least 1.
        seed: Seed of the training sequence and of the validation problems.

    Raises:
        ProxstepError: num_validation is below 1.

    >>> countdown_task().train[0].prompt
    '11,10,15:14?'
    """
    return drawn_task("countdown", _draw, num_validation, seed)

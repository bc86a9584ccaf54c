"""The reward of countdown: whether the last attempt gets from its numbers to the target.

Completions are hostile input: they are read by one regular expression, and nothing is evaluated but
sums, differences and products of integers of up to six digits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from proxstep.rewards.functions import check_length, cut_off, last_of, text_of

_NUMBER = "(0|[1-9][0-9]{0,5})"
_STEP = re.compile(rf"{_NUMBER}([-+*]){_NUMBER}={_NUMBER}")


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    numbers: Sequence[Sequence[int]],
    truncated: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float]:
    """Return 1 for each completion whose last attempt solves the problem, else 0.

    Attempts have a semicolon between them, the steps of one a comma. What was cut off at the length
    limit is wrong.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages.
        answer: B targets.
        numbers: B lists of the numbers to be used.
        truncated: B times whether the completion was cut off; None for never.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0.

    Raises:
        ProxstepError: There are not B targets or B lists of numbers.

    >>> countdown([""], ["3+7=10,10*5=50;3*7=21,21+5=26"], answer=["26"], numbers=[[3, 7, 5]])
    [1.0]
    """
    del prompts, columns
    check_length("countdown", completions, answer)
    check_length("countdown", completions, numbers)
    return [
        float(not was_cut and solves(last_of(text_of(completion)), given, int(target)))
        for completion, given, target, was_cut in zip(
            completions, numbers, answer, cut_off(completions, truncated), strict=True
        )
    ]


def solves(attempt: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an attempt's steps are right, use each number once, and leave the target.

    >>> solves("3*7=21,21+5=26", [3, 7, 5], 26), solves("3+7=10,10+16=26", [3, 7, 5], 26)
    (True, False)
    """
    left = Counter(numbers)
    for step in attempt.split(","):
        found = _STEP.fullmatch(step)
        if not found:
            return False
        x, y, result = int(found[1]), int(found[3]), int(found[4])
        left.subtract((x, y))
        if min(left[x], left[y]) < 0 or result_of(x, found[2], y) != result:
            return False
        left[result] += 1
    return +left == Counter([target])


def result_of(left: int, operator: str, right: int) -> int:
    """Return a sum, a difference or a product."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]

"""A reward function's failures: which function, which completion, and after how long."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import check_rewards, numeric_answer, reward_name, score_completions
from proxstep.training.guarded import guarded


def divides(prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any) -> Any:
    return [1 / len(completion) for completion in completions]


def unreachable(completions: list[Any], **columns: Any) -> Any:
    raise ConnectionError


def leaves(completions: list[Any], **columns: Any) -> Any:
    return [1.0 if completion else sys.exit(3) for completion in completions]


async def leaves_later(completions: list[Any], **columns: Any) -> Any:
    return leaves(completions)


def needs_two(completions: list[Any], **columns: Any) -> Any:
    if len(completions) > 1:
        raise KeyError("mean")
    return [0.0]


class Judge:
    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> Any:
        return [1.0] * len(completions)


def graded(function: Any, completions: list[str], seconds: float = 60) -> list[float]:
    columns = {"answer": ["1"] * len(completions)}
    functions = [guarded(function, seconds)]
    check_rewards(functions, [1.0], columns)
    prompts = ["?"] * len(completions)
    return score_completions(functions, [1.0], prompts, completions, columns).total


def test_a_function_that_works_is_called_as_it_is() -> None:
    assert graded(numeric_answer, ["1", "2"]) == [1.0, 0.0]
    assert graded(Judge(), ["1", "2"]) == [1.0, 1.0]
    assert reward_name(guarded(Judge(), 1)) == "Judge"
    assert reward_name(guarded(numeric_answer, 1)) == "numeric_answer"


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (divides, r"ZeroDivisionError: .* \(.*test_guarded.py, line 17\) on completion 2: ''"),
        (unreachable, r"ConnectionError \(.*, line 21\) on completion 0: 'a'"),
        (leaves, r"SystemExit: 3 \(.*test_guarded.py, line \d+\) on completion 2: ''"),
        (leaves_later, r"SystemExit: 3 .* on completion 2: ''"),
        (needs_two, r"KeyError: 'mean' .* on 3 completions, not on one of them alone"),
    ],
)
def test_an_exception_says_which_completion(function: Any, complaint: str) -> None:
    with pytest.raises(
        ProxstepError, match=f"reward function '{function.__name__}' raised {complaint}"
    ):
        graded(function, ["a", "ab", ""])


def test_an_error_in_plain_words_stays_as_it_is() -> None:
    with pytest.raises(ProxstepError, match=r"^numeric_answer: the reference answer"):
        guarded(numeric_answer, 9)(["?"], ["1"], answer=["none"])


def test_a_function_that_hangs_is_named() -> None:
    def hangs(completions: Any, **columns: Any) -> Any:
        time.sleep(60)

    expected = r"'hangs' took longer than task.reward_seconds 0.1 for 2 completions: mend it, or"
    with pytest.raises(ProxstepError, match=expected):
        graded(hangs, ["a", "b"], seconds=0.1)


def test_what_does_not_fit_is_refused_as_before() -> None:
    with pytest.raises(ProxstepError, match="'one' does not accept the data's columns"):
        graded(one, ["a"])


def one(x: Any) -> Any:
    return [1.0]

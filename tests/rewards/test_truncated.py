"""A completion that was cut off has an answer only where no continuation could change it."""

from __future__ import annotations

import pytest

from proxstep.rewards import (
    exact_match,
    final_number,
    load_reward,
    math_verify,
    numeric_answer,
    reward_name,
    score_completions,
    told_of_truncation,
)

CUT = [
    " 20 - 11 = 1",
    " 420 / 30 = ",
    "so she has 15",
    "so she has 15.",
    "15 apples",
    "#### 15",
    "#### 15.",
    "#### 15,",
    "#### 15 ",
    "#### $15",
    "#### **15**",
    "#### 15 m",
    "#### 15 mil",
    "#### 15 * 2",
    "#### 15 /",
    "#### 15 + 3 =",
    "####",
    "#### -",
    "The answer is 15",
    "The answer is 15.",
    "The answer is 15 * 2 = 3",
    "The answer is",
    r"\boxed{15",
    r"\boxed{\frac{15}{2}",
    r"\boxed{15} or \boxed{3",
    "answer: 15)",
]
ENDED = [
    "#### 15\n",
    "#### 15\nBecause",
    "#### 15 apples are l",
    "#### 15. And then",
    "#### 15\n#### Explanation: add 3 and",
    "#### 15\n#### 3",
    "The answer is 15, because 3 * 5",
    "The answer is 15.\nThis is 3 * 5 = 1",
    "The answer is 3 * 5 = 15 because of 3",
    r"\boxed{15}",
    r"#### \boxed{15}",
    r"\boxed{15} and then 3 * 5 = 1",
    r"The answer is \boxed{15}. It is 3",
]


@pytest.mark.parametrize("text", CUT)
def test_no_answer_where_the_text_was_cut(text: str) -> None:
    assert final_number(text, truncated=True) is None


@pytest.mark.parametrize("text", ENDED)
def test_an_answer_that_ended_before_the_cut(text: str) -> None:
    assert final_number(text, truncated=True) == 15


@pytest.mark.parametrize("text", [text for text in ENDED if "box" not in text and text[-1] != "3"])
def test_no_continuation_changes_it(text: str) -> None:
    for more in ("0", ".5", " million", " * 2 = 30", "k", "/2", " or 16", "\nThe end."):
        assert final_number(text + more, truncated=True) in (15, None)


def test_the_reward_is_told() -> None:
    completions = ["so 15", "so 15", "#### 15\n"]
    columns = {"answer": ["15"] * 3}
    told = score_completions(
        [numeric_answer], [1.0], [""] * 3, completions, columns, truncated=[True, False, True]
    )
    assert told.total == [0.0, 1.0, 1.0]
    assert (
        score_completions([numeric_answer], [1.0], [""] * 3, completions, columns).total == [1] * 3
    )


def test_a_function_is_told_if_it_asks() -> None:
    seen = []

    def asks(prompts, completions, truncated, **columns):
        seen.append(truncated)
        return [0.0] * len(completions)

    def does_not(prompts, completions, answer):
        return [0.0] * len(completions)

    def takes_all(prompts, completions, **columns):
        assert set(columns) == {"answer"}
        return [0.0] * len(completions)

    functions = [asks, does_not, takes_all, exact_match, load_reward("math_verify")]
    score_completions(functions, [1.0] * 5, [""], ["2"], {"answer": ["2"]}, truncated=[True])
    score_completions(functions, [1.0] * 5, [""], ["2"], {"answer": ["2"]})
    assert seen == [[True], [False]]


def test_what_is_equal_to_the_letter_counts_when_cut() -> None:
    assert exact_match([""], ["579"], ["579"]) == [1.0]
    assert math_verify([""], [r"\boxed{2} and so"], ["2"]) == [1.0]


def test_trl_s_completions_are_cut_off_at_the_limit() -> None:
    told = told_of_truncation(numeric_answer, max_completion_length=3)
    assert reward_name(told) == "numeric_answer"
    rewards = told(
        prompts=[""] * 3,
        completions=["so 15", "so 15", "#### 15\nso"],
        answer=["15"] * 3,
        completion_ids=[[1, 2], [1, 2, 3], [1, 2, 3]],
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, 1.0]

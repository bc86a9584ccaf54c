"""The strict reward for a stated answer."""

from __future__ import annotations

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import stated_answer, stated_number


@pytest.mark.parametrize(
    "text", ["The answer is 18.", " 3 * 6 = 18. The answer is 18", "the answer is 18. \n"]
)
def test_right(text: str) -> None:
    assert stated_answer([""], [text], answer=["18"]) == [1.0]
    chat = [[{"role": "assistant", "content": text}]]
    assert stated_answer([""], chat, answer=["18"]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        *("", "18", "The answer is 36/2.", "The answer is 18.5.", "The answer is 18 or 19."),
        *("The answer is 18. Or 19.", "The answer is 17. The answer is 18.", "The answer is 018."),
        *("The answer is 18.0.", "Otheranswer is 18.", "xThe answer is 18.", "The answer is -18."),
        *("The answer is 1" + "8" * 5000, "The answer is \u0661\u0668."),
    ],
)
def test_wrong(text: str) -> None:
    assert stated_answer([""], [text], answer=["18"]) == [0.0]


def test_what_was_cut_off_is_wrong() -> None:
    texts = ["The answer is 18."] * 2
    assert stated_answer(texts, texts, answer=["18"] * 2, truncated=[False, True]) == [1.0, 0.0]


def test_no_text_and_unequal_numbers() -> None:
    assert stated_number("") is None
    assert stated_answer([""], [None], answer=["1"]) == [0.0]
    with pytest.raises(ProxstepError, match="1 completions but 2 answers"):
        stated_answer([""], ["1"], answer=["1", "2"])

"""The built-in reward functions, with TRL's signature: f(prompts, completions, **columns)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from proxstep.errors import ProxstepError, shown
from proxstep.rewards.answers import (
    boxed_answer,
    boxed_list,
    final_number,
    is_taken_back,
    reference_number,
)
from proxstep.rewards.equality import decided, spelled
from proxstep.rewards.grading_pool import shared_pool

# Completions are hostile input. MATH's longest answers have some hundred characters.
LONGEST_ANSWER = 1_000
NOT_A_NUMBER = (
    "holds no number, or more than one, or a sum that is not done; write one number (18, -2.5, "
    "1,080, 3/4, 2 1/2, 1.5e3), or choose another reward than numeric_answer"
)
"""What is said of a reference that `numeric_answer` cannot read."""


class MeasuredRewards(list[float]):
    """A reward function's list of B rewards, with other values of each completion.

    `score_completions` reports them; for any other caller it is the list alone.

    Args:
        rewards: B rewards.
        measured: By name, B values, reported as rewards/FUNCTION/NAME.

    >>> MeasuredRewards([1.0, 0.0], {"ungraded": [0.0, 1.0]})
    [1.0, 0.0]
    """

    def __init__(self, rewards: list[float], measured: dict[str, list[float]]) -> None:
        super().__init__(rewards)
        self.measured = measured


def numeric_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    truncated: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float]:
    """Return 1 for each completion whose final number equals the reference answer's, else 0.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages. What is neither is wrong.
        answer: B reference answers: numbers, or texts that `reference_number` reads, such as "18"
            or a whole GSM8K solution.
        truncated: B times whether the completion was cut off at the length limit; None for never.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0.

    Raises:
        ProxstepError: A reference answer is not one number, or there are not B of them.

    >>> numeric_answer(["6*3?", "6*3?"], ["It is $18.00.", "It is 19."], answer=["18", "#### 18"])
    [1.0, 0.0]
    """
    del prompts, columns
    check_length("numeric_answer", completions, answer)
    references = [_reference(index, reference) for index, reference in enumerate(answer)]
    return [
        float(final_number(text_of(completion), truncated=bool(was_cut)) == reference)
        for completion, reference, was_cut in zip(
            completions, references, cut_off(completions, truncated), strict=True
        )
    ]


def _reference(index: int, answer: Any) -> Fraction:
    """Return the number that a reference answer is; raise where it is not one."""
    number = reference_number(answer)
    if number is None:
        raise ProxstepError(
            f"numeric_answer: the reference answer {shown(answer)} (index {index}) {NOT_A_NUMBER}"
        )
    return number


def exact_match(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Return 1 for each completion that is the reference answer, outer white space aside, else 0.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages.
        answer: B reference answers; a number is compared as Python writes it.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0.

    Raises:
        ProxstepError: There are not B reference answers.

    >>> exact_match(["123+456=", "1+1="], ["579", "2."], answer=["579", "2"])
    [1.0, 0.0]
    """
    del prompts, columns
    check_length("exact_match", completions, answer)
    references = _texts("exact_match", answer)
    return [
        float(text_of(completion).strip() == reference)
        for completion, reference in zip(completions, references, strict=True)
    ]


_STATED = re.compile(r"(?:^|(?<=\s))The answer is (-?[0-9]{1,30})\.?", re.IGNORECASE)


def stated_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    truncated: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float]:
    """Return 1 for each completion that ends with "The answer is N." for the reference N, else 0.

    Stricter than `numeric_answer`: the sentence stands once, at the very end, and N is an integer
    in digits. What was cut off at the length limit is wrong.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages.
        answer: B reference answers, integers.
        truncated: B times whether the completion was cut off; None for never.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0.

    Raises:
        ProxstepError: There are not B reference answers.

    >>> texts = ["3 * 6 = 18. The answer is 18.", "The answer is 36/2."]
    >>> stated_answer(["6*3?", "6*3?"], texts, answer=["18", "18"])
    [1.0, 0.0]
    """
    del prompts, columns
    check_length("stated_answer", completions, answer)
    references = _texts("stated_answer", answer)
    return graded(stated_number, completions, references, truncated)


def stated_number(text: str) -> str | None:
    """Return the integer of a text's only "The answer is N.", where it is the end; else None.

    Args:
        text: A completion, or a reference solution.

    >>> stated_number("7 - 2 = 5. The answer is 5."), stated_number("The answer is 5 or 6.")
    ('5', None)
    """
    found = list(_STATED.finditer(text))
    if len(found) != 1 or text[found[0].end() :].strip():
        return None
    return found[0][1]


def last_item(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    truncated: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float]:
    """Return 1 for each completion whose text after the last semicolon is the answer, else 0.

    The steps before it are not graded. What was cut off at the length limit is wrong, and so is an
    answer with anything around it.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages.
        answer: B reference answers; a number is compared as Python writes it.
        truncated: B times whether the completion was cut off; None for never.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0.

    Raises:
        ProxstepError: There are not B reference answers.

    >>> last_item(["7+5=", "7+5="], ["7+5=12;12", "12;13"], answer=["12", "12"])
    [1.0, 0.0]
    """
    del prompts, columns
    check_length("last_item", completions, answer)
    references = _texts("last_item", answer)
    return graded(last_of, completions, references, truncated)


def last_of(text: str) -> str:
    """Return what follows the last semicolon.

    >>> last_of("7+5=12;12")
    '12'
    """
    return text.rpartition(";")[2]


def graded(
    answer_of: Callable[[str], str | None],
    completions: Sequence[Any],
    references: Sequence[str],
    truncated: Sequence[bool] | None,
) -> list[float]:
    """Return 1 for each whole completion whose answer is the reference, else 0."""
    return [
        float(not was_cut and answer_of(text_of(completion)) == reference)
        for completion, reference, was_cut in zip(
            completions, references, cut_off(completions, truncated), strict=True
        )
    ]


def cut_off(completions: Sequence[Any], truncated: Sequence[bool] | None) -> Sequence[bool]:
    """Return which completions were cut off at the length limit; none where nobody says."""
    return [False] * len(completions) if truncated is None else truncated


def math_verify(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> MeasuredRewards:
    r"""Return 1 for each completion whose last box equals the reference answer, else 0.

    Equality is mathematical: \frac{1}{2} is 0.5, [0, 1) is not (0, 1), \{1, 2\} is \{2, 1\}, and
    units and dollar signs do not count. Where the reference is in numbers, what is still to
    be computed is wrong; where it is a list, the last boxes may hold its items. An answer of more
    than `LONGEST_ANSWER` characters is wrong unless it is the reference answer to the letter.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages. What is neither is wrong.
        answer: B reference answers, in LaTeX, without the box.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0, and as `ungraded` a 1.0 for each answer that math-verify could not
        compare within the limits of `GradingPool`; its reward is 0.

    Raises:
        ProxstepError: There are not B reference answers, or math-verify cannot be imported.
    """
    del prompts, columns
    check_length("math_verify", completions, answer)
    references = _texts("math_verify", answer)
    pairs = [
        (spelled(reference), spelled(_box(text_of(completion), reference)))
        for completion, reference in zip(completions, references, strict=True)
    ]
    verdicts_of = {pair: _decided(*pair) for pair in pairs}
    asked = [pair for pair, verdict in verdicts_of.items() if verdict is None]
    verdicts_of.update(zip(asked, shared_pool().grade(asked), strict=True))
    verdicts = [verdicts_of[pair] for pair in pairs]
    return MeasuredRewards(
        [float(verdict is True) for verdict in verdicts],
        {"ungraded": [float(verdict is None) for verdict in verdicts]},
    )


def check_math_verify() -> None:
    """Raise where `math_verify` cannot work here, before anything is sampled.

    Raises:
        ProxstepError: math-verify is not installed, or the system is Windows.
    """
    if find_spec("math_verify") is None:
        raise ProxstepError(
            "reward 'math_verify' needs math-verify: pip install \"proxstep[train]\""
        )
    if find_spec("resource") is None:
        raise ProxstepError(
            "reward 'math_verify' needs the process limits of Linux or macOS; use numeric_answer"
        )


def _decided(reference: str, box: str) -> bool | None:
    """Whether two answers are equal; None where math-verify must compare them."""
    if not box or not reference:
        return False
    if max(len(reference), len(box)) > LONGEST_ANSWER:
        return reference == box
    return decided(reference, box)


def _box(text: str, reference: str) -> str:
    """Return what the last box holds, or the last boxes where the reference is a list.

    Nothing where the text takes it back.
    """
    box = "" if is_taken_back(text) else boxed_answer(text) or ""
    is_list = "," in reference and not re.search(r"[0-9],[0-9]{3}|[(\[{]", reference)
    return boxed_list(text) or box if is_list and box and "," not in box else box


def text_of(completion: Any) -> str:
    """Return a completion's text, nothing for what is no completion."""
    try:
        text = completion_text(completion)
    except (AttributeError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return a completion's text: the string itself, or the content of its last chat message.

    Args:
        completion: A string or a list of chat messages. A content may be a list of parts, of which
            those with a "text" count, or None (a message with tool calls only), which is empty.

    >>> completion_text([{"role": "assistant", "content": "18"}])
    '18'
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _texts(name: str, answer: Sequence[Any]) -> list[str]:
    """Return reference answers as texts; raise where one has none."""
    try:
        return [str(reference).strip() for reference in answer]
    except ValueError as error:
        raise ProxstepError(
            f"{name}: a reference answer is an integer of thousands of digits; correct the data"
        ) from error


def check_length(name: str, completions: Sequence[Any], answer: Sequence[Any]) -> None:
    """Raise where the reference answers are not one per completion."""
    if len(answer) != len(completions):
        raise ProxstepError(
            f"{name}: {len(completions)} completions but {len(answer)} answers; give one each"
        )

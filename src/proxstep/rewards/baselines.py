r"""What a task pays for no skill: one answer for every prompt, or a number copied from the prompt.

A policy whose answers narrow down to one constant gains reward without learning anything; its score
must be held against these. Everything goes through the task's own reward function.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.rewards.answers import boxed_answer, final_number, reference_number

FORMS = (
    "{}",
    "#### {}",
    "The answer is {}.",
    r"\boxed{{{}}}",
    "<answer>{}</answer>",
)
"""How an answer is written into a completion; the one in which reference answers score best."""
NUM_CONSTANTS = 8
"""The most common reference answers, among which the best constant is looked for."""
NUM_PASSES = len(FORMS) + NUM_CONSTANTS + 7
"""Most passes over the prompts that `measure` grades."""

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")

Grade = Callable[[list[str]], Sequence[float | None]]
"""From one completion for each prompt to its rewards; None where the function does not apply."""


@dataclass(frozen=True)
class Guess:
    """A policy that solves nothing.

    Attributes:
        what: The constant answer, or which number of the prompt is copied.
        score: Its mean reward, in reward units.
    """

    what: str
    score: float


@dataclass(frozen=True)
class Baselines:
    """Scores that need no skill, of one set of prompts.

    Attributes:
        constant: The best constant answer; None where none can be told.
        copied: The best of the numbers that can be copied from the prompt; None where no prompt has
            one.
        reference: Score of the reference answers themselves, written as the guesses are.
        form: How they are written, with {} for the answer.
        note: Why there are none.
    """

    constant: Guess | None = None
    copied: Guess | None = None
    reference: float | None = None
    form: str | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return them in words."""
        if self.constant is None:
            return [f"baselines: none, {self.note}"]
        lines = [f"best constant answer {self.constant.score:.4f} (always {self.constant.what!r})"]
        if self.copied is not None:
            lines.append(f"copying a number {self.copied.score:.4f} ({self.copied.what})")
        if self.reference is not None and self.reference < 1:
            lines.append(f"the reference answers themselves score {self.reference:.4f}")
        return lines


def measure(questions: Sequence[str], answers: Sequence[str], grade: Grade) -> Baselines:
    """Return the scores of the best constant answer and of the best copied number.

    Args:
        questions: P questions, in which numbers are looked for.
        answers: P reference answers.
        grade: Grades P completions, one for each prompt.

    Returns:
        The baselines; with a note in their place where even the reference answers earn nothing in
        any of `FORMS`, or cannot be graded.

    >>> def grade(texts):
    ...     return [float(text == answer) for text, answer in zip(texts, ["2", "2", "7"])]
    >>> found = measure(["1 and 1?", "7 less 5?", "7 or 1?"], ["2", "2", "7"], grade)
    >>> found.constant.what, found.copied
    ('2', Guess(what='the first number', score=0.3333333333333333))
    """
    try:
        form, reference = _best_form(answers, grade)
        if reference <= 0:
            note = "the reward functions give reference answers alone nothing, however written"
            return Baselines(note=note)
        constants = [
            Guess(answer, _mean(grade([form.format(answer)] * len(answers))))
            for answer in most_common_answers(answers)
        ]
        copies = [
            Guess(what, _mean(grade([form.format(number) for number in numbers])))
            for what, numbers in _copies(questions).items()
        ]
    except ProxstepError as error:
        return Baselines(note=f"they could not be graded: {error}")
    return Baselines(
        max(constants, key=lambda guess: guess.score),
        max(copies, key=lambda guess: guess.score, default=None),
        reference,
        form,
    )


def most_common_answers(answers: Sequence[str]) -> list[str]:
    """Return the most common reference answers, `NUM_CONSTANTS` at most, as first written.

    >>> most_common_answers(["1", "2", "2.0", "x"])
    ['2', '1', 'x']
    """
    written: dict[Hashable, str] = {}
    counts: Counter[Hashable] = Counter()
    for answer in answers:
        number = reference_number(answer)
        key: Hashable = answer if number is None else number
        written.setdefault(key, answer)
        counts[key] += 1
    return [written[key] for key, _ in counts.most_common(NUM_CONSTANTS)]


@dataclass(frozen=True)
class Narrowness:
    """How often a policy's most frequent answer is given.

    Attributes:
        answer: The answer; None where no completion has one.
        share: Of all completions, how many give it.
        without: Of all completions, how many give no answer.
    """

    answer: str | None
    share: float
    without: float


def narrowness(
    completions: Sequence[str], answers: Sequence[str], truncated: Sequence[bool] | None = None
) -> Narrowness:
    r"""Return the most frequent answer of completions.

    An answer is the final number, as `numeric_answer` finds it, or what the last box holds. Where
    most of the reference answers are no numbers, it may also be the whole completion.

    Args:
        completions: P completions.
        answers: P reference answers.
        truncated: P times whether the completion was cut off; None for never.

    >>> narrowness(["It is 1.", "1", "2", "I do not know"], ["1", "5", "2", "7"])
    Narrowness(answer='1', share=0.5, without=0.25)
    """
    numeric = 2 * sum(reference_number(answer) is not None for answer in answers) >= len(answers)
    cut = [False] * len(completions) if truncated is None else truncated
    given = [
        _answer(text, was_cut, numeric) for text, was_cut in zip(completions, cut, strict=True)
    ]
    counts = Counter(answer for answer in given if answer is not None)
    answer, count = counts.most_common(1)[0] if counts else (None, 0)
    return Narrowness(answer, count / len(given), given.count(None) / len(given))


def _answer(text: str, truncated: bool, numeric: bool) -> str | None:
    number = final_number(text, truncated=truncated)
    if number is not None:
        return str(number)
    return boxed_answer(text) or (None if numeric else text.strip() or None)


def _best_form(answers: Sequence[str], grade: Grade) -> tuple[str, float]:
    """Return the form in which the reference answers score best, and their score."""
    found = []
    for form in FORMS:
        found.append((form, _mean(grade([form.format(answer) for answer in answers]))))
        if found[-1][1] >= 1:
            break
    return max(found, key=lambda pair: pair[1])


def _copies(questions: Sequence[str]) -> dict[str, list[str]]:
    """Return each way to copy a number, with what it copies from every question."""
    numbers = [[match[0] for match in _NUMBER.finditer(question)] for question in questions]
    if not any(numbers):
        return {}
    ways: dict[str, Callable[[list[str]], str]] = {
        "the first number": lambda found: found[0],
        "the second number": lambda found: found[1],
        "the third number": lambda found: found[2],
        "the last number but one": lambda found: found[-2],
        "the last number": lambda found: found[-1],
        "the largest number": lambda found: max(found, key=_value),
        "the smallest number": lambda found: min(found, key=_value),
    }
    return {what: [_copied(way, found) for found in numbers] for what, way in ways.items()}


def _copied(way: Callable[[list[str]], str], found: list[str]) -> str:
    try:
        return way(found)
    except (IndexError, ValueError):  # the question has not so many numbers
        return found[-1] if found else ""


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _mean(rewards: Sequence[float | None]) -> float:
    """Return the mean of the rewards that are given; 0 where none is."""
    given = [reward for reward in rewards if reward is not None]
    return sum(given) / len(given) if given else 0.0

r"""Equality of final `\boxed{...}` answers, decided by math-verify in processes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.rewards.boxed import boxed_answer
from proxstep.rewards.functions import check_length, completion_text
from proxstep.rewards.grading_pool import shared_pool
from proxstep.rewards.measured import MeasuredRewards

# Completions are hostile input. MATH's longest answers have some hundred characters.
MAX_CHARACTERS = 1_000


def math_verify(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> MeasuredRewards:
    r"""Return 1 for each completion whose last box equals the reference answer, else 0.

    Equality is mathematical: \frac{1}{2} is 0.5, [0, 1) is not (0, 1), \{1, 2\} is \{2, 1\}, and
    units and dollar signs do not count. An answer of more than `MAX_CHARACTERS` characters is
    wrong unless it is the reference answer to the letter.

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
    boxes = [boxed_answer(_text(completion)) or "" for completion in completions]
    references = [str(reference).strip() for reference in answer]
    pairs = list(zip(references, boxes, strict=True))
    asked = [pair for pair in dict.fromkeys(pairs) if _is_open(*pair)]
    equal = dict(zip(asked, shared_pool().grade(asked), strict=True))
    verdicts = [equal.get(pair, pair[0] == pair[1] != "") for pair in pairs]
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


def _is_open(reference: str, box: str) -> bool:
    """Whether two answers must be compared by what they mean."""
    return "" != box != reference and max(len(reference), len(box)) <= MAX_CHARACTERS


def _text(completion: Any) -> str:
    """Return a completion's text, nothing for what is no completion."""
    try:
        text = completion_text(completion)
    except (AttributeError, TypeError):
        return ""
    return text if isinstance(text, str) else ""

"""The built-in reward functions, with TRL's signature: f(prompts, completions, **columns)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.rewards.numeric import final_number


def numeric_answer(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Return 1 for each completion whose final number equals the reference answer's, else 0.

    Args:
        prompts: B prompts; not read.
        completions: B strings, or B lists of chat messages.
        answer: B reference answers: numbers, or texts that `final_number` reads, such as "18" or a
            whole GSM8K solution.
        **columns: The data's other columns; not read.

    Returns:
        B rewards, 0.0 or 1.0.

    Raises:
        ProxstepError: A reference answer holds no number, or there are not B of them.

    >>> numeric_answer(["6*3?", "6*3?"], ["It is $18.00.", "It is 19."], answer=["18", "#### 18"])
    [1.0, 0.0]
    """
    del prompts, columns
    check_length("numeric_answer", completions, answer)
    references = [final_number(str(reference)) for reference in answer]
    for index, reference in enumerate(references):
        if reference is None:
            raise ProxstepError(
                f"numeric_answer: the reference answer {answer[index]!r:.80} (index {index}) holds "
                "no number; correct the data or use another reward function"
            )
    return [
        float(final_number(completion_text(completion)) == reference)
        for completion, reference in zip(completions, references, strict=True)
    ]


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
    return [
        float(completion_text(completion).strip() == str(reference).strip())
        for completion, reference in zip(completions, answer, strict=True)
    ]


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


def check_length(name: str, completions: Sequence[Any], answer: Sequence[Any]) -> None:
    """Raise where the reference answers are not one per completion."""
    if len(answer) != len(completions):
        raise ProxstepError(
            f"{name}: {len(completions)} completions but {len(answer)} answers; give one each"
        )

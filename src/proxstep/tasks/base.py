"""What a task is: prompts, reference answers, and the reward functions that grade completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

# A plain string, or chat messages with "role" and "content".
Prompt: TypeAlias = str | list[dict[str, str]]


REWARDS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("exact_match",),
    "gsm8k": ("numeric_answer",),
    "math": ("math_verify",),
    "svamp": ("numeric_answer",),
    "table": ("numeric_answer",),
}
"""The reward functions that each task is graded by, unless a recipe names others."""


@dataclass(frozen=True)
class Example:
    """A prompt and its reference answer.

    Attributes:
        prompt: A plain string, which a completion continues directly, or chat messages.
        answer: The reference answer, handed to reward functions as `answer`.
        solution: A reference completion for supervised warm-up. After a plain prompt it is what
            follows the prompt's last character, white space included.
        columns: Further values handed to reward functions by name.
    """

    prompt: Prompt
    answer: str
    solution: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Examples to train on, examples to validate on, and how completions are graded.

    Attributes:
        name: The task's name.
        train: The training examples; may be lazy.
        validation: The validation examples, in a fixed order.
        rewards: Specifications of the default reward functions, for `proxstep.rewards.load_reward`.
    """

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    rewards: tuple[str, ...]


def reward_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Return the columns that reward functions receive for a batch of examples.

    Args:
        examples: B examples.

    Returns:
        `answer` and every column of any example, B values each; None where an example lacks it.

    >>> reward_columns([Example("1+1=", "2"), Example("2+2=", "4", columns={"level": 1})])
    {'answer': ['2', '4'], 'level': [None, 1]}
    """
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return {"answer": [example.answer for example in examples], **columns}

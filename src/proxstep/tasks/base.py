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
    "stories": ("stated_answer",),
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
        question: What is asked, without instructions and worked examples; None where the prompt is
            that alone.
    """

    prompt: Prompt
    answer: str
    solution: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    question: str | None = field(default=None, kw_only=True, repr=False)


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

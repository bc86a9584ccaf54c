"""What a task is: prompts, reference answers, and the reward functions that grade completions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, overload

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

NUM_TRAIN = 100_000
"""Training examples of a procedural task."""


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


class DrawnExamples(Sequence[Example]):
    """Examples computed when read, from their index alone.

    Attributes:
        length: Number of examples.
    """

    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return one example or a list of them."""
        if isinstance(index, slice):
            return [self._example(i) for i in range(self.length)[index]]
        return self._example(range(self.length)[index])

    @abstractmethod
    def _example(self, index: int) -> Example:
        """Return the example of an index that is in range."""


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

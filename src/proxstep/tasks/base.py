"""What a task is: prompts, reference answers, and the reward functions that grade completions."""

from __future__ import annotations

import random
import re
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args, overload

from proxstep.errors import ProxstepError

# A plain string, or chat messages with "role" and "content".
Prompt: TypeAlias = str | list[dict[str, str]]
"""A text, or a list of chat messages."""


TaskName = Literal[
    "arithmetic",
    "countdown",
    "gsm8k",
    "math",
    "maxima",
    "products",
    "stories",
    "sums",
    "svamp",
    "table",
]
"""What `task.name` of a recipe may be."""
TASKS: tuple[str, ...] = get_args(TaskName)
"""The same, as a tuple."""

REWARDS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("exact_match",),
    "gsm8k": ("numeric_answer",),
    "math": ("math_verify",),
    "svamp": ("numeric_answer",),
    "table": ("numeric_answer",),
    "stories": ("stated_answer",),
    "sums": ("last_item",),
    "products": ("last_item",),
    "maxima": ("last_item",),
    "countdown": ("countdown",),
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


@dataclass(frozen=True)
class DrawnTrain(DrawnExamples):
    """Training examples computed when read: the i-th depends on name, seed and i alone.

    Attributes:
        name: The task's name.
        draw: Draws an example whose prompt is a text with numbers.
        seed: Seed of the draws.
        length: Number of examples.
    """

    name: str
    draw: Callable[[random.Random], Example]
    seed: int
    length: int = NUM_TRAIN

    def _example(self, index: int) -> Example:
        """Return the example of an index that is in range."""
        rng = random.Random(f"{self.name}/{self.seed}/{index}")
        while True:
            example = self.draw(rng)
            if not is_held_out(example):
                return example


def is_held_out(example: Example) -> bool:
    """Whether a problem is kept for validation: a fifth is, in whatever order its numbers stand."""
    numbers = sorted(re.findall("[0-9]+", str(example.prompt)))
    return zlib.crc32(" ".join(numbers).encode()) % 5 == 0


def check_num_validation(num_validation: int) -> None:
    """Refuse a task without validation problems."""
    if num_validation < 1:
        raise ProxstepError(f"num_validation is {num_validation}; give at least 1")


def drawn_task(
    name: str, draw: Callable[[random.Random], Example], num_validation: int, seed: int
) -> Task:
    """Return the task of examples that are drawn, with no problem in training and validation.

    A fixed hash of the problem decides, so that no seed trains on what another validates on.

    Args:
        name: The task's name.
        draw: Draws an example whose prompt is a text with numbers, of far more than a few.
        num_validation: Number of distinct validation problems, at least 1; fewer where there are
            hardly so many.
        seed: Seed of the training sequence and of the validation problems.

    Raises:
        ProxstepError: num_validation is below 1.
    """
    check_num_validation(num_validation)
    rng = random.Random(f"{name}/{seed}/validation")
    validation: dict[str, Example] = {}
    for _ in range(100 * num_validation):
        example = draw(rng)
        if is_held_out(example):
            validation[str(example.prompt)] = example
        if len(validation) == num_validation:
            break
    return Task(name, DrawnTrain(name, draw, seed), list(validation.values()), REWARDS[name])

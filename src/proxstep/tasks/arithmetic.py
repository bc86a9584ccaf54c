"""Procedural arithmetic: it needs no data, and a small model learns it in minutes on a CPU.

| difficulty | problems | distinct |
|---|---|---|
| 1 | one-digit addition, 0 to 9 | 100 |
| 2 | two-digit addition, 10 to 99 | 8,100 |
| 3 | three-digit addition, 100 to 999 | 810,000 |
| 4 | three-digit addition and subtraction, equal shares; results may be negative | 1,620,000 |
| 5 | those of 1, 2 and 4, and two-digit times one-digit (2 to 9), equal shares | 1,628,920 |

A fixed hash of the problem keeps about a fifth of all problems out of training. It does not depend
on the seed, so that no seed trains on what another validates on; 3+5 and 5+3 fall on the same side.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from itertools import zip_longest

from proxstep.errors import ProxstepError
from proxstep.tasks.base import (
    NUM_TRAIN,
    REWARDS,
    DrawnExamples,
    Example,
    Task,
    check_num_validation,
)

ALPHABET = "0123456789+-*="
"""The characters of its prompts and answers."""


@dataclass(frozen=True)
class Problem:
    """Two operands and an operator, one of +, - and *."""

    left: int
    operator: str
    right: int

    @property
    def is_held_out(self) -> bool:
        """Whether the problem is kept for validation; a sum's terms may be in either order."""
        left, right = self.left, self.right
        if self.operator == "+":
            left, right = min(left, right), max(left, right)
        return zlib.crc32(f"{left}{self.operator}{right}".encode()) % 5 == 0

    def example(self) -> Example:
        """Return the problem as a prompt and its answer.

        >>> Problem(123, "-", 456).example()
        Example(prompt='123-456=', answer='-333', solution='-333', columns={})
        """
        results = {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
        }
        answer = str(results[self.operator])
        return Example(f"{self.left}{self.operator}{self.right}=", answer, solution=answer)


@dataclass(frozen=True)
class Kind:
    """All problems with one operator and operands from two ranges."""

    operator: str
    left: range
    right: range

    def draw(self, rng: random.Random) -> Problem:
        """Return a problem, each with the same probability."""
        return Problem(rng.choice(self.left), self.operator, rng.choice(self.right))

    def held_out(self, num_problems: int, rng: random.Random) -> list[Problem]:
        """Return distinct held-out problems in random order: `num_problems`, or all there are."""
        size = len(self.left) * len(self.right)
        # A fifth of the sample is held out: 10 times as many give twice what is asked for.
        sample = rng.sample(range(size), min(size, 100 + 10 * num_problems))
        pairs = (divmod(index, len(self.right)) for index in sample)
        problems = (Problem(self.left[i], self.operator, self.right[j]) for i, j in pairs)
        return [problem for problem in problems if problem.is_held_out][:num_problems]


_ADDITION_1 = Kind("+", range(10), range(10))
_ADDITION_2 = Kind("+", range(10, 100), range(10, 100))
_ADDITION_3 = Kind("+", range(100, 1000), range(100, 1000))
_SUBTRACTION_3 = Kind("-", range(100, 1000), range(100, 1000))
_PRODUCT = Kind("*", range(10, 100), range(2, 10))

LEVELS: dict[int, tuple[Kind, ...]] = {
    1: (_ADDITION_1,),
    2: (_ADDITION_2,),
    3: (_ADDITION_3,),
    4: (_ADDITION_3, _SUBTRACTION_3),
    5: (_ADDITION_1, _ADDITION_2, _ADDITION_3, _SUBTRACTION_3, _PRODUCT),
}


@dataclass(frozen=True)
class ArithmeticTrain(DrawnExamples):
    """Training examples computed when read: the i-th depends on difficulty, seed and i alone.

    Attributes:
        difficulty: A key of `LEVELS`.
        seed: Seed of the draws.
        length: Number of examples; problems repeat where there are fewer.
    """

    difficulty: int
    seed: int
    length: int = NUM_TRAIN

    def _example(self, index: int) -> Example:
        """Return the example of an index that is in range."""
        rng = random.Random(f"{self.difficulty}/{self.seed}/{index}")
        while True:
            problem = rng.choice(LEVELS[self.difficulty]).draw(rng)
            if not problem.is_held_out:
                return problem.example()


def answer_without_carries(prompt: str) -> str:
    """Return the answer computed digit by digit, without carries and borrows.

    Args:
        prompt: Of an arithmetic example.

    >>> answer_without_carries("123+456="), answer_without_carries("158+264=")
    ('579', '312')
    >>> answer_without_carries("42-17="), answer_without_carries("38*4=")
    ('35', '22')
    """
    left, operator, right = re.fullmatch(r"([0-9]+)([-+*])([0-9]+)=", prompt).groups()  # type: ignore[union-attr]
    width = max(len(left), len(right))
    # The one-digit factor of a product meets every digit; terms meet place by place.
    right = right * width if operator == "*" else right.zfill(width)
    work = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator]
    digits = zip(left.zfill(width), right, strict=True)
    return str(int("".join(str(work(int(x), int(y)) % 10) for x, y in digits)))


def arithmetic_task(difficulty: int, num_validation: int = 256, seed: int = 0) -> Task:
    """Return procedural arithmetic, with no problem in both training and validation.

    Args:
        difficulty: 1 to 5; the module's table says what each holds.
        num_validation: Number of distinct validation problems, at least 1. Difficulty 1 holds out
            only 19, difficulty 2 only 1,601: where more are asked for, all of them are used.
        seed: Seed of the training sequence and of the choice among held-out problems.

    Returns:
        The task, with `NUM_TRAIN` training examples, graded by exact match.

    Raises:
        ProxstepError: The difficulty is not in the table or num_validation is below 1.

    >>> task = arithmetic_task(difficulty=3)
    >>> len(task.train), len(task.validation), task.rewards
    (100000, 256, ('exact_match',))
    """
    if difficulty not in LEVELS:
        raise ProxstepError(
            f"difficulty is {difficulty!r}; choose one of {', '.join(map(str, LEVELS))}"
        )
    check_num_validation(num_validation)
    rng = random.Random(f"{difficulty}/{seed}/validation")
    per_kind = [kind.held_out(num_validation, rng) for kind in LEVELS[difficulty]]
    in_turn = [problem for turn in zip_longest(*per_kind) for problem in turn if problem]
    validation = [problem.example() for problem in in_turn[:num_validation]]
    train = ArithmeticTrain(difficulty, seed)
    return Task("arithmetic", train, validation, REWARDS["arithmetic"])

"""Procedural word problems of two and three steps: no data, held-out stories, two styles.

A training problem and a validation problem never tell the same story (`story_texts.py`). Answers
are spread as evenly as a story allows, so that no constant answer scores; no answer is a number of
its problem, so that copying one never does. Steps are sums and products, since SmolLM2-135M mostly
gets differences and quotients wrong (experiments/LOG.md).

The training solutions are all right, but of two styles: 55 in 100 state the answer alone, 45 work
it out. A small model does not get far without working a problem out. After a
supervised warm-up on both styles that is for the rewards to discover.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property

from proxstep.errors import ProxstepError
from proxstep.tasks.base import (
    NUM_TRAIN,
    REWARDS,
    DrawnExamples,
    Example,
    Task,
    check_num_validation,
)
from proxstep.tasks.story_texts import HELD_OUT_STORIES, TRAIN_STORIES

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack")
ANSWERS = range(2, 31)
_DIGITS, _ADDENDS = range(2, 10), range(2, 20)
_WORKED = 0.45
"""Share of the training solutions that are worked out."""
_MOST_DRAWS = 100_000


@dataclass(frozen=True)
class Story:
    """A problem without its numbers.

    Attributes:
        text: With {x}, {y}, {z}, {w} for numbers and {A}, {B} for names.
        steps: Two operands and an operator each; r is the result of the step before.
    """

    text: str
    steps: tuple[tuple[str, str, str], ...]

    @classmethod
    def read(cls, line: str) -> Story:
        """Return the story of one line of `story_texts.py`."""
        text, steps = line.split(" | ")
        parsed = [tuple(step.split()) for step in steps.split("; ")]
        return cls(text, tuple((left, operator, right) for left, operator, right in parsed))

    def draw(self, rng: random.Random) -> Example:
        """Return a problem: its answer is drawn first, then numbers that give it."""
        target = rng.choice(ANSWERS)
        for attempt in range(_MOST_DRAWS):
            if attempt % 200 == 199:  # this story can hardly have that answer
                target = rng.choice(ANSWERS)
            numbers = {letter: rng.choice(values) for letter, values in self._ranges.items()}
            equations = self._equations(numbers)
            if equations and equations[-1][-1] == target and target not in numbers.values():
                return self._example(numbers, equations, rng)
        raise ProxstepError(f"no numbers fit the story {self.text!r}")

    @cached_property
    def _ranges(self) -> dict[str, range]:
        """Return what each letter may be: one digit where it is multiplied."""
        letters = sorted(set(re.findall(r"{([wxyz])}", self.text)))
        small = {side for step in self.steps if "*" in step for side in step}
        return {letter: _DIGITS if letter in small else _ADDENDS for letter in letters}

    def _equations(self, numbers: dict[str, int]) -> list[tuple[int, str, int, int]]:
        """Return each step with its result; nothing where one is not among `ANSWERS`."""
        values, equations = dict(numbers), []
        for left, operator, right in self.steps:
            a, b = values[left], values[right]
            result = a + b if operator == "+" else a * b
            if result not in ANSWERS:
                return []
            equations.append((a, operator, b, result))
            values["r"] = result
        return equations

    def _example(
        self,
        numbers: dict[str, int],
        equations: list[tuple[int, str, int, int]],
        rng: random.Random,
    ) -> Example:
        first, second = rng.sample(NAMES, 2)
        question = self.text.format(**numbers, A=first, B=second)
        answer = str(equations[-1][-1])
        worked = "".join(f" {a} {operator} {b} = {c}." for a, operator, b, c in equations)
        if rng.random() > _WORKED:
            worked = ""
        return Example(
            f"Question: {question}\nAnswer:", answer, solution=f"{worked} The answer is {answer}."
        )


TRAIN = tuple(map(Story.read, TRAIN_STORIES.strip().splitlines()))
HELD_OUT = tuple(map(Story.read, HELD_OUT_STORIES.strip().splitlines()))


@dataclass(frozen=True)
class StoriesTrain(DrawnExamples):
    """Training examples computed when read: the i-th depends on seed and i alone.

    Attributes:
        seed: Seed of the draws.
        length: Number of examples.
    """

    seed: int
    length: int = NUM_TRAIN

    def _example(self, index: int) -> Example:
        """Return the example of an index that is in range."""
        rng = random.Random(f"{self.seed}/{index}")
        return rng.choice(TRAIN).draw(rng)


def stories_task(num_validation: int = 256, seed: int = 0) -> Task:
    """Return word problems whose validation problems tell stories that training never does.

    Args:
        num_validation: Number of distinct validation problems, at least 1.
        seed: Seed of the training sequence and of the validation problems.

    Raises:
        ProxstepError: num_validation is below 1.

    >>> task = stories_task(num_validation=20)
    >>> task.train[0].solution
    ' The answer is 17.'
    """
    check_num_validation(num_validation)
    rng = random.Random(f"{seed}/validation")
    validation: dict[str, Example] = {}
    while len(validation) < num_validation:
        for story in HELD_OUT:  # in turn, so that every story has its share
            example = story.draw(rng)
            validation[str(example.prompt)] = example
    kept = list(validation.values())[:num_validation]
    return Task("stories", StoriesTrain(seed), kept, REWARDS["stories"])

"""Sums, products and maxima worked out step by step: solutions of 15 to 90 characters.

| task | problem | solution |
|---|---|---|
| `sums` | two numbers of 2 to 9 digits | `487+65=` `7+5=12;8+6+1=15;4+0+1=5;552` |
| `products` | 2 to 9 digits times one digit | `487*6=` `7*6=42;8*6+4=52;4*6+5=29;2922` |
| `maxima` | 4 to 14 numbers of two digits | `37,52,18?` `37<52;52>18;52` |

What counts is what follows the last semicolon. Lengths differ from problem to problem. Each task
has a habitual slip, a mistake that people make too: the carry is dropped, a product with
6 to 9 is its neighbor's in the table, numbers are compared by their last digits. The embedded model
is warmed up on solutions that slip in three of five places (`habitual`); rewards have to teach it
otherwise.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from proxstep.tasks.base import Example, Task, drawn_task

SLIPS = 0.6
"""Share of the places for a habitual slip at which `habitual` slips."""


def _never() -> bool:
    return False


def _add(numbers: Sequence[int], slip: Callable[[], bool]) -> Iterator[str]:
    """Write the steps of a sum, from the right; a slip drops the carry."""
    carry, digits = False, ""
    left, right = (str(number)[::-1] for number in numbers)
    for x, y in zip_longest(left, right, fillvalue="0"):
        carried = carry and not slip()
        total = int(x) + int(y) + carried
        yield f"{x}+{y}{'+1' * carried}={total}"
        carry, digits = total > 9, f"{total % 10}{digits}"
    yield f"{'1' * carry}{digits}"


def _multiply(numbers: Sequence[int], slip: Callable[[], bool]) -> Iterator[str]:
    """Write the steps of a product with one digit; a slip takes the neighbor in the table."""
    carry, digits, factor = 0, "", numbers[1]
    for x in reversed(str(numbers[0])):
        product = int(x) * factor
        if int(x) > 5 and slip():
            product += factor if x != "9" else -factor
        total = product + carry
        yield f"{x}*{factor}{f'+{carry}' * (carry > 0)}={total}"
        carry, digits = total // 10, f"{total % 10}{digits}"
    yield f"{carry or ''}{digits}"


def _compare(numbers: Sequence[int], slip: Callable[[], bool]) -> Iterator[str]:
    """Write the comparisons that find a maximum; a slip compares the last digits."""
    best = numbers[0]
    for number in numbers[1:]:
        is_more, looks_more = number > best, number % 10 > best % 10
        if is_more != looks_more and slip():
            is_more = looks_more
        yield f"{best}{'<' if is_more else '>'}{number}"
        best = number if is_more else best
    yield str(best)


def _draw_sum(rng: random.Random) -> list[int]:
    most = rng.randint(3, 9)
    return [_of_digits(digits, rng) for digits in (most, rng.randint(max(2, most - 2), most))]


def _draw_product(rng: random.Random) -> list[int]:
    return [_of_digits(rng.randint(2, 9), rng), rng.randint(3, 9)]


def _draw_maximum(rng: random.Random) -> list[int]:
    """Draw the maximum first, so that each is as frequent; all numbers differ."""
    number = rng.randint(4, 14)
    most = rng.randint(30, 99)
    numbers = [most, *rng.sample(range(10, most), number - 1)]
    rng.shuffle(numbers)
    return numbers


def _of_digits(number: int, rng: random.Random) -> int:
    return rng.randrange(10 ** (number - 1), 10**number)


@dataclass(frozen=True)
class Kind:
    """A kind of problem: how its numbers are drawn, written and worked with."""

    draw: Callable[[random.Random], list[int]]
    between: str
    end: str
    work: Callable[[Sequence[int], Callable[[], bool]], Iterator[str]]

    def draw_example(self, rng: random.Random) -> Example:
        """Return a problem with its right solution."""
        numbers = self.draw(rng)
        *steps, answer = self.work(numbers, _never)
        prompt = self.between.join(map(str, numbers)) + self.end
        return Example(prompt, answer, solution=";".join([*steps, answer]))


KINDS = {
    "sums": Kind(_draw_sum, "+", "=", _add),
    "products": Kind(_draw_product, "*", "=", _multiply),
    "maxima": Kind(_draw_maximum, ",", "?", _compare),
}


def habitual(name: str, example: Example, rng: random.Random) -> str:
    """Return a solution with habitual slips at `SLIPS` of the places for one.

    >>> habitual("sums", Example("487+65=", "552"), random.Random(1))
    '7+5=12;8+6=14;4+0+1=5;542'
    """
    numbers = [int(number) for number in re.findall("[0-9]+", str(example.prompt))]
    return ";".join(KINDS[name].work(numbers, lambda: rng.random() < SLIPS))


def worked_task(name: str, num_validation: int = 256, seed: int = 0) -> Task:
    """Return sums, products or maxima, with no problem in both training and validation.

    Args:
        name: A key of `KINDS`.
        num_validation: Number of distinct validation problems, at least 1.
        seed: Seed of the training sequence and of the validation problems.

    Raises:
        ProxstepError: num_validation is below 1.

    >>> worked_task("maxima").train[0].prompt
    '30,40,29,25,41,10,44?'
    """
    return drawn_task(name, KINDS[name].draw_example, num_validation, seed)

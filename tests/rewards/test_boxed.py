from __future__ import annotations

import random
import time

import pytest

from proxstep.rewards import boxed_answer


def balanced(rng: random.Random, depth: int) -> str:
    """A random LaTeX-like text whose groups are closed."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        if depth and rng.random() < 0.5:
            parts.append("{" + balanced(rng, depth - 1) + "}")
        else:
            parts.append(rng.choice(["x", "7", r"\frac", r"\{", r"\}", r"\\", " ", "$", "+"]))
    return "".join(parts)


@pytest.mark.parametrize("seed", range(200))
def test_a_box_is_matched_brace_by_brace(seed: int) -> None:
    rng = random.Random(seed)
    first, last = balanced(rng, 4), balanced(rng, 4) + "1"
    text = rf"So \boxed{{{first}}} or $\boxed{{{last}}}$ {balanced(rng, 2)}"
    assert boxed_answer(text) == last.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed", None),
        (r"\boxed{7", None),
        (r"\boxed{7} or \boxed{8", None),
        (r"\boxed{7} or \boxed{8}", "8"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 7$ pens", "7"),
        ("$\\boxed 7\nand more", "7"),
        (r"\boxedx{7}", None),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{\\}", r"\\"),
        (r"\boxed{a} }}}", "a"),
    ],
)
def test_what_a_box_holds(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize("unit", [r"\boxed{", r"\boxed", "{", "}", "\\", "$", r"\boxed{}", "\0"])
def test_time_is_linear_in_the_text(unit: str) -> None:
    start = time.process_time()
    boxed_answer(r"\boxed{" + unit * 200_000)
    assert time.process_time() - start < 5

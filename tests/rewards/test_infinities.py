"""Answers with an infinity in them, of which sympy's simplification finds some to be any number."""

from __future__ import annotations

import pytest

from proxstep.rewards.grading_pool import GradingPool
from proxstep.rewards.grading_worker import is_infinite, same_expression, same_number

sympy = pytest.importorskip("sympy")
oo, x = sympy.oo, sympy.Symbol("x")


def unevaluated(kind: type, *args: object) -> object:
    return kind(*args, evaluate=False)


INFINITE = [
    unevaluated(sympy.Mul, -1, oo, unevaluated(sympy.Pow, 2, -1)),
    unevaluated(sympy.Add, 2, unevaluated(sympy.Mul, -1, 7, oo)),
]


@pytest.mark.parametrize("value", INFINITE, ids=str)
@pytest.mark.parametrize("reference", [sympy.Float(-123456.5), x], ids=str)
def test_no_finite_number_is_infinite_in_whatever_order_sympy_asks(
    value: object, reference: object
) -> None:
    for seed in range(60):
        sympy.core.random.seed(seed)
        sympy.core.cache.clear_cache()
        assert not same_number(reference, value, 6, 15)
        assert not same_expression(reference, value)


@pytest.mark.parametrize(
    ("value", "infinite"),
    [
        (oo, True),
        (sympy.nan, True),
        (sympy.zoo, True),
        (unevaluated(sympy.Add, x, oo), True),
        (sympy.Integer(3), False),
        (sympy.Sum(x**-2, (x, 1, oo)), False),
        (sympy.Interval(-oo, 3), False),
    ],
    ids=str,
)
def test_what_is_computed_from_an_infinity_is_infinite(value: object, infinite: bool) -> None:
    assert is_infinite(value) is infinite


def test_answers_with_an_infinity_are_graded_by_their_value() -> None:
    cases = [
        (r"\infty", r"+\infty", True),
        (r"\infty", r"-\infty", False),
        (r"-\infty", r"-2\infty", True),
        (r"\infty", r"\infty-\infty", False),
        (r"\infty", r"\frac{1}{0}", False),
        ("0", r"\frac{1}{\infty}", True),
        ("x", r"x+2-7\infty", False),
        (r"\frac{\pi^2}{6}", r"\sum_{n=1}^{\infty}\frac{1}{n^2}", True),
        (r"(-\infty,3)", "x<3", True),
        (r"(-\infty,3)", r"(\infty,3)", False),
    ]
    pool = GradingPool(1)
    grades = pool.grade([(reference, answer) for reference, answer, _ in cases])
    pool.close()
    assert grades == [expected for *_, expected in cases]

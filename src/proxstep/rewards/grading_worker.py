"""A process that compares answers by math-verify, and can do nothing else; see `grading_pool`.

    python -P -B grading_worker.py CPU_SECONDS MEMORY_MIB

It reads one JSON list [reference, answer] a line and writes one byte for each: 1 for equal, 0 for
not. It first writes R once it is ready, or E and why it cannot be.

An answer is a model's: hostile input. It is read by math-verify's LaTeX grammar alone, never by the
extraction of plain expressions, which hands text to sympy's `parse_expr` and so to `eval`. The
grammar hands it the digits of numbers; `number` is in its place. What still tried to compile text,
write a file, start a process or open a connection would end this process at once, as do too much
processor time and too much memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_READS = ("os.listdir", "os.scandir")  # what an import does
_GENERATED = b"def monomial_"  # sympy's polynomials write these from a number of variables alone
_FORBIDDEN = ("os.", "shutil.", "socket.", "subprocess.", "ctypes.")


def is_equal(reference: str, answer: str) -> bool:
    """Return whether math-verify finds two LaTeX expressions equal.

    Its own time limits are off: they are signals that a long computation in C never looks at.
    Numbers are compared by `same_number`, in place of math-verify's own comparison.
    """
    from math_verify import grader, verify
    from sympy.core.random import seed

    seed(0)  # sympy asks about an expression in random order; where it errs, it errs by that order
    grader.sympy_numeric_eq = same_number  # sympy_expr_eq looks both up at every call
    grader.sympy_symbolic_eq = same_expression
    gold, pred = (list(read(text)) for text in (reference, answer))
    if not gold or not pred:
        return False
    pred[0] = as_union(pred[0])
    if is_solved(as_union(gold[0])) and not is_solved(pred[0]):
        return False
    if not verify(gold, pred, timeout_seconds=0, allow_set_relation_comp=True):
        return False
    return not is_plain(reference, gold[0]) or is_worked_out(answer, pred[0])


@lru_cache(10_000)
def read(text: str) -> list[Any]:
    """Return what math-verify's grammar makes of an answer; a reference comes again and again."""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(rf"\boxed{{{text}}}", config, parsing_timeout=0)


def same_number(left: Any, right: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Return whether two expressions without unknowns have the same value.

    math-verify evaluates the difference to 15 digits after chopping what is small, so that 2^{-99}
    is 2^{-98} to it. Here exact numbers are compared exactly, and a decimal may stand for a number
    that it is rounded from: 0.333333 for 1/3.

    Args:
        left: A sympy expression or matrix.
        right: Another.
        float_rounding: Decimal places of a decimal that count.
        numeric_precision: Not read.
    """
    from sympy import Float, MatrixBase, Rational
    from sympy.matrices.expressions import MatrixExpr

    if isinstance(left, MatrixBase | MatrixExpr) or isinstance(right, MatrixBase | MatrixExpr):
        if getattr(left, "shape", None) != getattr(right, "shape", None):
            return False
        items, others = (each.doit().as_explicit().flat() for each in (left, right))
        return all(
            same_number(item, other, float_rounding, numeric_precision)
            for item, other in zip(items, others, strict=True)
        )
    percent = Rational(1, 100)
    if is_percentage(left) != is_percentage(right):  # 9% is 9, and 0.09 too
        share, other = (left, right) if is_percentage(left) else (right, left)
        share = share.doit()
        return same_number(share / percent, other, float_rounding, numeric_precision) or (
            same_number(share, other, float_rounding, numeric_precision)
        )
    left, right = left.doit(), right.doit()
    if not _are_numbers(left, right):
        return False  # math-verify goes on to `same_expression`
    if is_infinite(left) or is_infinite(right):
        return left == right
    if left.has(Float) or right.has(Float):
        return _rounded_alike(left, right, float_rounding)
    if left.is_Rational and right.is_Rational:
        return left == right
    difference = left - right
    precise = abs(difference.evalf(_DIGITS))
    scale = max(abs(left.evalf(_DIGITS)), abs(right.evalf(_DIGITS)))
    if precise > scale * 10 ** Rational(-_DIGITS // 2):
        return False
    is_zero = difference.simplify().is_zero
    return True if is_zero is None else is_zero


_DIGITS = 60


def same_expression(left: Any, right: Any) -> bool:
    """Return whether two expressions, not both numbers, differ by 0 once simplified.

    Stands in for math-verify's own, which asks again whether two numbers are equal. It also
    simplifies differences with an infinity in them, and there sympy finds a zero now and then:
    -123456.5 was 2 - 7 oo.
    """
    from sympy import Basic, MatrixBase, simplify

    with contextlib.suppress(Exception):  # as there: what cannot be subtracted is not equal
        left, right = left.doit(), right.doit()
        if _are_numbers(left, right) or is_infinite(left) or is_infinite(right):
            return False
        difference = simplify(left - right)
        if isinstance(difference, MatrixBase):
            return bool(difference.is_zero_matrix)
        return isinstance(difference, Basic) and bool(difference.is_zero)
    return False


def _are_numbers(*values: Any) -> bool:
    """Whether none has an unknown in it; a matrix is no number."""
    return all(getattr(value, "is_number", False) for value in values)


def is_infinite(value: Any) -> bool:
    """Whether a value is an infinity or undefined, or still to be computed from one.

    An infinite sum or integral is not, though its bounds are.
    """
    from sympy import Add, Mul, Pow, S, preorder_traversal

    endless = S.Infinity, S.NegativeInfinity, S.ComplexInfinity, S.NaN
    return value in endless or any(
        arg in endless
        for node in preorder_traversal(value)
        if isinstance(node, Add | Mul | Pow)
        for arg in node.args
    )


def is_percentage(value: Any) -> bool:
    """Whether math-verify's grammar read a percent sign."""
    from sympy import Mul, Rational, UnevaluatedExpr

    return isinstance(value, Mul) and UnevaluatedExpr(Rational(1, 100)) in value.args


def _rounded_alike(left: Any, right: Any, places: int) -> bool:
    """Whether numbers are the same to some decimal places, and to about as many digits."""
    from sympy import Rational

    near = abs(left - right) <= Rational(1, 10**5) * max(abs(left), abs(right))
    return bool(near) and bool((left.round(places) - right.round(places)).is_zero)


def as_union(value: Any) -> Any:
    """Return "x < 1 or x > 2", to the grammar a set of relations, as a set of numbers."""
    from sympy import FiniteSet, Union
    from sympy.core.relational import Relational

    if not isinstance(value, FiniteSet) or not value.args:
        return value
    if not all(isinstance(each, Relational) and is_solved(each) for each in value.args):
        return value
    if not all(each.free_symbols for each in value.args):  # "1 = 1, 2 = 2" is no set of numbers
        return value
    relations: Any = value.args
    return Union(*(each.as_set() for each in relations))


def is_solved(value: Any) -> bool:
    """Whether a relation is between an unknown and a number, and not yet to be solved.

    What is no relation is solved. 2x = 10 is no answer where x = 5 is the reference.
    """
    from sympy import And, Or
    from sympy.core.relational import Relational

    if isinstance(value, And | Or):
        return all(is_solved(each) for each in value.args)
    if not isinstance(value, Relational):
        return True
    sides = value.lhs, value.rhs
    return (
        any(side.is_Symbol and not other.free_symbols for side, other in (sides, sides[::-1]))
        or not value.free_symbols
    )


def is_plain(text: str, value: Any) -> bool:
    """Whether a reference consists of numbers that are written out: 5, (3, 4), x = 1/2."""
    return not _EVALUATED.search(text) and all(is_literal(each) for each in items(value))


def is_worked_out(text: str, value: Any) -> bool:
    """Whether an answer in numbers leaves none to be computed but powers and fractions of integers.

    Args:
        text: As it was written: the grammar itself evaluates some of what it reads.
        value: What the grammar made of it.
    """
    from sympy import Expr, Symbol
    from sympy.core.function import AppliedUndef

    return not _EVALUATED.search(text.rpartition("=")[2]) and all(
        is_written(each) or is_infinite(each)
        for each in items(value)
        if isinstance(each, Expr) and not isinstance(each, Symbol | AppliedUndef)
    )


# "2(3)" is 5 to the grammar, as 2\frac{1}{2} is 2.5.
_EVALUATED = re.compile(
    r"\\(?:operatorname\*?\{)?(?:[dt]?binom|choose|gcd|det|Gamma)(?![A-Za-z])"
    r"|(?<![A-Za-z])e ?\^"
    r"|[0-9)}] ?(?:\\left)?(?:\(|\\\{)-?[0-9.]+(?:\\right)?(?:\)|\\\})"
)


def items(value: Any) -> list[Any]:
    """Return what a list, set, interval, matrix or relation gives as its answer."""
    from sympy import And, Interval, MatrixBase, Or, Set, Tuple
    from sympy.core.relational import Relational

    if isinstance(value, Interval):
        parts: Any = (value.start, value.end)
    elif isinstance(value, And):  # x = 12 - 7 = 5 ends with 5
        relations: Any = value.args
        parts = [
            side
            for each in relations
            if (side := _answer_of(each)) not in {o.lhs for o in relations if o is not each}
        ]
    elif isinstance(value, Relational):
        parts = (_answer_of(value),)
    elif isinstance(value, MatrixBase):
        parts = value.flat()
    elif isinstance(value, Set | Tuple | Or):
        parts = value.args
    else:
        return [value]
    return [item for part in parts for item in items(part)]


def _answer_of(relation: Any) -> Any:
    """Return the side of a relation that has no unknown, the right one if both have none."""
    from sympy.core.relational import Relational

    if not isinstance(relation, Relational):
        return relation
    return relation.lhs if relation.rhs.free_symbols else relation.rhs


def is_literal(value: Any) -> bool:
    """Whether a value is a number or an infinity that nothing is to be done with."""
    from sympy import Number

    return isinstance(value, Number) or is_percentage(value)


def is_written(value: Any) -> bool:
    """Whether a number is written out, or is a power of integers or a fraction of such.

    >>> from sympy import Mul, Pow
    >>> is_written(Pow(2, 10, evaluate=False)), is_written(Mul(2, 3, evaluate=False))
    (True, False)
    """
    from sympy import Integer, Mul, Number, Pow, UnevaluatedExpr

    if isinstance(value, Number) or _is_power(value):
        return True
    if not isinstance(value, Mul) or len(value.args) != 2:
        return False
    first, second = value.args
    if first == -1:
        return is_written(second)
    if isinstance(second, UnevaluatedExpr):  # of 1/100
        return isinstance(first, Number)
    if not isinstance(second, Pow) or not isinstance(second.exp, Integer):
        return False
    if second.exp == -1:
        return _is_power(first) and _is_power(second.base)
    return isinstance(first, Number) and second.base == 10


def _is_power(value: Any) -> bool:
    """Whether a value is an integer, or a power of a rational number with such an exponent."""
    from sympy import Integer, Pow, Rational

    if isinstance(value, Pow):
        return isinstance(value.base, Rational) and isinstance(value.exp, Integer)
    return isinstance(value, Integer)


def number(text: str, **options: Any) -> Any:
    """Return a number without evaluating its text; stands in for sympy's `parse_expr`.

    Args:
        text: Digits with at most one decimal point; all else is refused.
        **options: Those of `parse_expr`; not read.
    """
    from sympy import Float, Integer, SympifyError

    del options
    digits = text.replace(".", "", 1)
    if not (digits.isascii() and digits.isdigit()):
        raise SympifyError(text)
    return Float(text) if "." in text else Integer(text)


def _warm_up() -> None:
    """Import what sympy imports late, before such imports are refused."""
    for reference, answer in (
        (r"\frac{1}{2}", "0.5"),
        ("[0,1)", "(0,1]"),
        (r"\{1,2\}", "2,1"),
        ("(1,2)", "(2,1)"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x=5", "5<x"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\sin^2 x+\cos^2 x", "1+i"),
    ):
        is_equal(reference, answer)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """End the process if it does what grading does not need; an audit hook."""
    if event == "compile":
        source, file = arguments
        refused = not (str(file).endswith(".py") or bytes(source or b"").startswith(_GENERATED))
    elif event == "open":
        refused = bool(arguments[2] & _WRITES)
    else:
        refused = event.startswith(_FORBIDDEN) and event not in _READS
    if refused:
        os._exit(3)


def _confine(memory_mib: int) -> None:
    """Drop for good the rights that grading does not need."""
    from sympy.parsing import sympy_parser

    sympy_parser.parse_expr = number  # sympify looks it up at every call
    limits = {
        resource.RLIMIT_AS: memory_mib * 2**20,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        with contextlib.suppress(OSError, ValueError):  # macOS refuses to bound the address space
            resource.setrlimit(limit, (value, value))
    sys.addaudithook(_refuse)


def main() -> None:
    """Answer requests until there are no more."""
    cpu_seconds, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no reply
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        _warm_up()
    except ImportError as error:
        replies.write(f"E{error}".encode())
        return
    _confine(memory_mib)
    replies.write(b"R")
    for request in sys.stdin.buffer:
        reference, answer = json.loads(request)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            equal = is_equal(reference, answer)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  sympy's; the next process would raise it again
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(b"1" if equal else b"0")


if __name__ == "__main__":
    main()

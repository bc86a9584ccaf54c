r"""What can be said of two answers in LaTeX before math-verify is asked, exactly and from the text.

math-verify drops the base of "101_2", does not read "1e3", "5." or \varnothing, and evaluates a sum
that a policy did not do.
"""

from __future__ import annotations

import re
from fractions import Fraction

from proxstep.rewards.answers import reference_number
from proxstep.rewards.number_spellings import normalize
from proxstep.rewards.number_tokens import tokenize

_BASED = re.compile(r"\(?([0-9A-Fa-f]+)\)?_(?:\{(?:\\text\{)?([0-9]{1,2})\}{1,2}|([0-9]{1,2}))")
_SUBSCRIPT = re.compile(r"(?<![A-Za-z])[0-9A-F]+\)?_")
_TUPLE = re.compile(
    r"(?:\\left)?([(\[])((?:(?![0-9],[0-9]{3})[^()\[\]])*,[^()\[\]]*?)(?:\\right)?([)\]])"
)
_DOTS = re.compile(r"\\(?:[lc]?dots|dotsc|dotsb)(?![A-Za-z])|\u2026|\.\.\.")
# Four letters and more are a word; to math-verify they are factors, and "seat" is "east".
_WORD = re.compile(r"(?:\\(?:text|textbf|mathrm)\{)?\s*([A-Za-z]{4,})\s*\}?")
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z])([ap])\.? ?m\b", re.IGNORECASE)
_CLOCK = re.compile(r"(?<![0-9])[0-9]{1,2} ?: ?[0-5][0-9](?![0-9])")
_RATIO = re.compile(r"[0-9] ?: ?[0-9]")
_CLOSED = re.compile(r"\\infty ?(?:\\right ?)?\]|\[ ?[-+]? ?\\infty")
_ARITHMETIC = ("number", "power", "fraction", "+", "-", "*", "/", "(", ")", "=", "operator")
_UNDONE = ("+", "-", "*", "operator")
_SPELLINGS = {r"\varnothing": r"\emptyset", r"\{\}": r"\emptyset", r"\{ \}": r"\emptyset"}


def spelled(answer: str) -> str:
    r"""Return an answer in the spelling that math-verify reads.

    >>> spelled(r"\varnothing."), spelled(r"\text{A.}"), spelled("5\u22123")
    ('\\emptyset', '\\text{A}', '5-3')
    """
    answer = answer.replace("\u2212", "-").replace("\u2013", "-").strip()
    answer = re.sub(r"(?<![.\\])\.(\}?)\Z", r"\1", answer)
    for found, known in _SPELLINGS.items():
        answer = answer.replace(found, known)
    return answer


def decided(reference: str, answer: str) -> bool | None:
    """Return whether two answers are equal; None where math-verify must be asked.

    >>> decided("1000", "1e3"), decided("101_2", "101_3"), decided("9", "20-11"), decided("x", "y")
    (True, False, False, None)
    """
    if reference == answer:
        return True
    if _SUBSCRIPT.search(reference) or _SUBSCRIPT.search(answer):
        return _same_in_base(reference, answer)
    if _DOTS.search(reference) or _DOTS.search(answer):
        return _without_dots(reference) == _without_dots(answer)
    words = [_WORD.fullmatch(text) for text in (reference, answer)]
    if words[0] and words[1]:
        return words[0][1].casefold() == words[1][1].casefold()
    if _differs(reference, answer):
        return False
    number = _number(reference)
    if number is None:
        return _same_point(reference, answer)
    other = _number(answer)
    if other is not None:
        return number == other or _may_be_rounded(number, other, reference + answer)
    return False if _is_undone(answer) or _is_false(answer) else None


def _differs(reference: str, answer: str) -> bool:
    r"""Whether what math-verify does not see makes two answers different.

    Times of day (to it, 2:30 is 1:15, and a.m. is p.m.), a ratio and a number that is no fraction,
    and a bracket that includes an infinity.

    >>> _differs("2:30", "1:15"), _differs("1:2", r"\frac{1}{2}"), _differs("1:2", "0.5")
    (True, False, True)
    """
    halves, clocks, ratios = (
        [found.findall(text) for text in (reference, answer)]
        for found in (_HALF_OF_DAY, _CLOCK, _RATIO)
    )
    if all(halves) and halves[0][-1].lower() != halves[1][-1].lower():
        return True
    if all(clocks):
        return [each.replace(" ", "") for each in clocks[0]] != [
            each.replace(" ", "") for each in clocks[1]
        ]
    if bool(ratios[0]) != bool(ratios[1]) and "frac" not in reference + answer:
        return "/" not in reference + answer
    return bool(_CLOSED.search(answer)) and not _CLOSED.search(reference)


def _same_point(reference: str, answer: str) -> bool | None:
    """Compare points and intervals of numbers; None where one is none, or the brackets differ."""
    left, right = (_TUPLE.fullmatch(text) for text in (reference, answer))
    if not left or not right or (left[1], left[3]) != (right[1], right[3]):
        return None
    items, others = ([_number(item) for item in match[2].split(",")] for match in (left, right))
    if None in items or None in others:
        return None
    return True if items == others else None


def _number(text: str) -> Fraction | None:
    """Return the number that an answer is, None where it is none or where it may be more."""
    if "=" in text or "%" in text or not re.search("[0-9]", text):
        return None
    return reference_number(text)


def _may_be_rounded(number: Fraction, other: Fraction, texts: str) -> bool | None:
    """Return None where a decimal may stand for a fraction that no decimal is: 0.333333, 1/3."""
    endless = any(pow(10, 400, each.denominator) for each in (number, other))
    return None if endless and "." in texts else False


def _is_undone(answer: str) -> bool:
    """Whether an answer is a sum, difference, product or quotient of numbers, not worked out."""
    kinds = [token.kind for token in tokenize(normalize(answer))]
    if all(kind in _ARITHMETIC for kind in kinds):
        return any(kind in _UNDONE for kind in kinds[1:])
    # math-verify reads "5 cm + 3 cm" up to its first unit.
    values = [kind for kind in kinds if kind != "word"]
    return (
        "word" in kinds
        and any(
            one == other == "number" and joint in _UNDONE
            for one, joint, other in zip(values, values[1:], values[2:], strict=False)
        )
        and "=" not in kinds
    )


def _is_false(answer: str) -> bool:
    """Whether an answer sets a number equal to another: 3 = 5."""
    if "=" not in answer or not re.fullmatch(r"[-0-9.,/= ]+", answer):
        return False
    numbers = {_number(side) for side in answer.split("=")}
    return None not in numbers and len(numbers) > 1


def _same_in_base(reference: str, answer: str) -> bool:
    """Compare numbers with their base written below; without one the digits must be the same."""
    base, other = _BASED.fullmatch(reference), _BASED.fullmatch(answer)
    if base and other:
        try:
            left, right = (int(match[1], int(match[2] or match[3])) for match in (base, other))
        except ValueError:  # a digit that the base does not have, or no base
            return False
        return left == right
    return bool(base and base[1] == answer) or bool(other and other[1] == reference)


def _without_dots(text: str) -> str:
    """Return a text with one spelling for its dots, without spaces."""
    return re.sub(r"\s|\\[,;: !]", "", _DOTS.sub("\u2026", text))

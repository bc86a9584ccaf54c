r"""One number in a text, read exactly and never computed: the grammar that docs/tasks.md describes.

    run      = side { "=" side }            the number of the last side
    side     = quantity                     anything more is an expression or a list: no number
    quantity = [sign] ( "(" [sign] value ")" | value ) [scale word] ["%"]
    value    = integer | decimal | fraction | integer fraction | [decimal "*"] power of ten
    fraction = integer "/" integer

A quotient that comes out whole ("420/30") is a division that is left undone, and no number either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from proxstep.rewards.number_tokens import Token, ratio

MAX_UNIT_WORDS = 3
MAX_WORDS_AFTER_EQUALS = 8
# Words after a number that are not its unit.
_CONNECTIVES = frozenset(
    [
        *("a", "after", "an", "as", "at", "because", "before", "but", "each", "every", "for"),
        *("from", "had", "has", "have", "if", "in", "is", "left", "not", "of", "on", "per"),
        *("since", "so", "that", "the", "then", "was", "were", "when", "where", "which", "while"),
        "with",
    ]
)
_PARTS = frozenset(["half", "third", "quarter", "thirds", "quarters"])
# Words before a number that make it another one, or no answer: "at least 5", "twice 5".
_CHANGES = frozenset(
    [
        *(
            "not",
            "never",
            "cannot",
            "isn",
            "wasn",
            "longer",
            "neither",
            "than",
            "least",
            "most",
            "above",
        ),
        *(
            "below",
            "over",
            "under",
            "up",
            "between",
            "after",
            "before",
            "almost",
            "nearly",
            "twice",
        ),
        *("double", "triple", "half", "third", "quarter", "root", "square", "cube", "loss", "neg"),
        *("hundred", "thousand", "million", "billion"),
    ]
)
_NUM_CHANGES = 3  # words before a number that are looked at
_VALUES = ("number", "power", "fraction")
_SIGNS = ("+", "-", "negative")
_PREFIXES = (*_SIGNS, "(", "=", "*", "/", "bullet", "operator", "unreadable", "unreadable(")
_BINARY = (*_SIGNS, "*", "/", "operator")


class Run(NamedTuple):
    """A number, or several that belong together.

    Attributes:
        value: The one number; None where it is not one.
        start: Index of the first token.
        end: Index after the last token.
        is_equation: Whether there is an equals sign in it.
        is_listed: Whether a comma, "and", "or" or "to" joins it to a number that follows.
    """

    value: Fraction | None
    start: int
    end: int
    is_equation: bool
    is_listed: bool


def find_runs(tokens: Sequence[Token], *, alone: bool) -> Iterator[Run]:
    """Yield the runs of numbers in a text, in order.

    Args:
        tokens: Of the text.
        alone: Whether each is to be the only answer: "8 apples and 3 pears" is then a list, where
            it is otherwise two numbers.
    """
    begins = _beginnings(tokens)
    index = 0
    listed = False
    while index < len(tokens):
        if not begins[index]:
            index += 1
            continue
        run = _Parser(tokens, begins, index, alone).run()
        is_item = (listed and not run.is_equation) or (run.is_listed and alone)
        is_item |= _is_changed(tokens, run) or (alone and _has_rival(tokens, run))
        yield run._replace(value=None) if is_item else run
        index, listed = run.end, run.is_listed


def _beginnings(tokens: Sequence[Token]) -> list[bool]:
    """Return for each index, and the one after the last, whether a number begins there.

    It begins with its signs and brackets, and with whatever makes it unreadable.
    """
    begins = [False] * (len(tokens) + 2)
    for index in range(len(tokens) - 1, -1, -1):
        kind = tokens[index].kind
        begins[index] = kind in _VALUES or (kind in _PREFIXES and begins[index + 1])
    return begins


def _is_changed(tokens: Sequence[Token], run: Run) -> bool:
    """Whether a word right before a number that was not computed makes it another one."""
    if run.is_equation:
        return False
    for token in reversed(tokens[max(run.start - _NUM_CHANGES, 0) : run.start]):
        if token.kind not in ("word", "join", "unreadable"):
            return False
        if token.text.lower() in _CHANGES:
            return True
    return False


def _has_rival(tokens: Sequence[Token], run: Run) -> bool:
    """Whether the sentence goes on with another number before a clause begins: "5, no, 7"."""
    for index in range(run.end, len(tokens)):
        token = tokens[index]
        if token.kind in _VALUES:
            return True
        if token.kind == "break":
            is_point = token.text in (".", ":") and index + 1 < len(tokens)
            return is_point and tokens[index + 1].kind in _VALUES
        if token.text == ";" and index + 1 < len(tokens) and tokens[index + 1].kind == "word":
            return index + 2 < len(tokens) and tokens[index + 2].kind == "="
        if token.kind == "word" and token.text.lower() in _CONNECTIVES:
            return False
    return False


class _Parser:
    """Reads one run from left to right."""

    def __init__(
        self, tokens: Sequence[Token], begins: Sequence[bool], start: int, alone: bool
    ) -> None:
        self._tokens, self._begins, self._alone = tokens, begins, alone
        self._start = self._index = start
        self._depth = 0
        self._is_equation = self._is_listed = self._is_algebra = False

    def run(self) -> Run:
        """Return the run."""
        value = self._quantity()
        while joint := self._joint():
            if joint == "=":
                value = self._side(value)
                continue
            value = None
            self._is_algebra |= self._at(-1).kind == "glued" and self._at(-1).text.isalpha()
            if self._begins[self._index] and self._at().kind != "=":
                self._quantity()
        value = None if self._is_algebra else value  # 2x = 10 is still to be solved
        return Run(value, self._start, self._index, self._is_equation, self._is_listed)

    def _at(self, ahead: int = 0) -> Token:
        index = self._index + ahead
        return self._tokens[index] if 0 <= index < len(self._tokens) else _NOTHING

    def _quantity(self) -> Fraction | None:
        """Read signs, brackets, a value, and what scales it; None where it is no number."""
        is_readable = not self._continues_what_is_before()
        num_signs, is_negative = 0, False
        while (kind := self._at().kind) in _PREFIXES:
            if kind in _SIGNS:
                num_signs += 1
                is_negative ^= kind != "+"
            elif kind == "=":
                self._is_equation = is_readable = True
                num_signs, is_negative = 0, False
            elif kind in ("(", "unreadable("):
                self._depth += 1
            is_readable &= kind in (*_SIGNS, "=", "(")
            self._index += 1
        value = self._value()
        self._close()
        while (token := self._at()).kind in ("scale", "%"):
            value = _product(value, token.value) if token.kind == "scale" else value
            self._index += 1
            self._close()
        if value is None or num_signs > 1 or not is_readable:
            return None
        return -value if is_negative else value

    def _continues_what_is_before(self) -> bool:
        """Whether a sign belongs to a variable, a bracket or a line that ends with a minus."""
        before, earlier = self._at(-1), self._at(-2)
        if before.kind == "break":
            return earlier.kind in ("-", "negative")
        is_operand = before.kind in (")", "unreadable", "glued") or (
            before.kind == "word" and len(before.text) == 1 and before.text.isascii()
        )
        return is_operand and self._at().kind in ("+", "-")

    def _close(self) -> None:
        """Read closing brackets of the run's own."""
        while self._depth and self._at().kind == ")":
            self._depth -= 1
            self._index += 1

    def _value(self) -> Fraction | None:
        """Read a number, a fraction, a mixed number or a power of ten."""
        first, second = self._at(), self._at(1)
        self._index += 1
        if first.kind != "number":
            return first.value
        if second.kind == "*" and self._at(1).kind == "power":
            self._index += 2
            return _product(first.value, self._tokens[self._index - 1].value)
        if not first.whole or first.value is None:
            return first.value
        if second.kind == "/" and self._at(1).kind == "number" and self._at(1).whole:
            self._index += 2
            return _quotient(first, self._tokens[self._index - 1])
        if second.kind == "fraction":
            self._index += 1
            return _mixed(first.value, second.value)
        slash, below = self._at(1), self._at(2)
        if second.whole and slash.kind == "/" and below.kind == "number" and below.whole:
            self._index += 3
            return _mixed(first.value, _quotient(second, below))
        return first.value

    def _joint(self) -> str:
        """Read what joins the next quantity to this one: "=", "operator", or nothing."""
        self._close()
        words = 0 if self._is_part_of_something() else self._num_units()
        kind = self._at(words).kind
        follows = self._begins[self._index + words + 1]
        if kind == "=":
            self._index += words + 1
            self._is_equation = True
            return "="
        if kind in _VALUES or (kind in ("(", "unreadable", "unreadable(") and words == 0):
            self._index += words + (not self._begins[self._index + words])
            return "operator"
        if self._is_operator(kind, words, follows=follows):
            self._index += words + 1
            return "operator"
        if kind in (",", "join") and (words == 0 or self._alone):
            self._is_listed = follows or (self._alone and self._is_hedge(words + 1))
        return ""

    def _is_operator(self, kind: str, words: int, *, follows: bool) -> bool:
        if kind in _BINARY and follows:
            return True
        if words:
            return False
        if kind == "/":  # "18/hour"
            return self._at(1).kind != "word"
        if kind == "-":  # before a word it is a dash
            return self._at(1).kind not in ("word", "negative", "join")
        if kind == "word":  # "of", after a percentage or a fraction
            return self._at().text.lower() == "of" and follows and self._is_part_of_something()
        return kind in ("glued", "+", "*", "operator", "negative")

    def _is_part_of_something(self) -> bool:
        """Whether the last quantity is a percentage or a fraction, and "of" comes after it."""
        is_part = self._at(-1).kind in ("%", "fraction") or self._at(-2).kind == "/"
        return is_part and self._at().text.lower() == "of"

    def _is_hedge(self, ahead: int) -> bool:
        """Whether another answer begins so: "y = 3", "a half"."""
        first, second = self._at(ahead), self._at(ahead + 1)
        if first.kind != "word":
            return False
        if second.kind == "=":
            return self._begins[self._index + ahead + 1]
        return second.text.lower() in _PARTS

    def _num_units(self) -> int:
        """Return how many words from here on can be the number's unit."""
        words = 0
        while words <= MAX_UNIT_WORDS and self._at(words).kind == "word":
            if self._at(words).text.lower() in _CONNECTIVES:
                return 0
            words += 1
        return words if words <= MAX_UNIT_WORDS else 0

    def _side(self, value: Fraction | None) -> Fraction | None:
        """Read what comes after an equals sign; a side of words alone leaves the value as it is."""
        words = 0
        while words < MAX_WORDS_AFTER_EQUALS and self._at(words).kind in ("word", "negative"):
            if self._begins[self._index + words]:
                break
            words += 1
        self._index += words
        if self._begins[self._index]:
            return self._quantity()
        return value if words else None


_NOTHING = Token("", "", -1, -1)


def _product(left: Fraction | None, right: Fraction | None) -> Fraction | None:
    return None if left is None or right is None else left * right


def _quotient(above: Token, below: Token) -> Fraction | None:
    if above.value is None or below.value is None:
        return None
    return ratio(int(above.value), int(below.value))


def _mixed(whole: Fraction, part: Fraction | None) -> Fraction | None:
    """Return the value of "2 1/2"; None where the fraction is improper."""
    return whole + part if part is not None and 0 < part < 1 else None

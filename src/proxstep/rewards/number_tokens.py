r"""The pieces of a text that matter to whoever looks for a number in it: numbers, signs, words.

Time is linear in the text. What only decorates a number (currency, quotes, Markdown's asterisks,
LaTeX's spaces and fonts, braces, GSM8K's calculator marks) is left out.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from proxstep.rewards.number_spellings import (
    COMMAND_KINDS,
    FUNCTIONS,
    GLUED_SCALES,
    OPERATORS,
    POSTFIXES,
    SCALES,
    WORD_KINDS,
)

MAX_DIGITS = 100
MAX_EXPONENT_DIGITS = 3


class Token(NamedTuple):
    """A piece of a text.

    Attributes:
        kind: "number", "power" (of ten) or "fraction" (LaTeX's), which have a value; "scale" (a
            word such as million, with its value); "word"; "negative" (a word that is a sign);
            "join" (a word between two answers); "break" (the end of a line, sentence or remark);
            "bullet" (a dash that begins a line: a minus, or a mark of a list); one of
            "+ - * / = ( ) , %"; "operator" (whatever else computes or compares); "unreadable" (an
            operand that is no number, such as a root); "glued" (what makes the number before it
            another one, such as a second decimal point).
        text: As it stands in the normalized text.
        start: Its first position.
        end: The position after its last.
        value: None for a number that is too long, not in ASCII digits, or not in lowest form.
        whole: Whether a number is an integer in plain digits.
    """

    kind: str
    text: str
    start: int
    end: int
    value: Fraction | None = None
    whole: bool = False


_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")

_SEPARATOR = r"(?:,|\{,\}|,\\!|\\[,;: ]|~| |')"
_INTEGER = (
    rf"(?:[1-9][0-9]{{0,2}}(?P<%s>{_SEPARATOR})[0-9]{{3}}(?:(?P=%s)[0-9]{{3}})*(?![0-9])|[0-9]+)"
)
_EXPONENT = r"(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]|\.[0-9]))"
_ARGUMENT = r"(?:\{([^{}\n]{0,60})\}|([0-9]))"
_PATTERNS = {
    "mark": r"<<[^<>\n]{0,200}>>|<<[^\n]*",
    "tag": r"</?[A-Za-z][A-Za-z0-9]{0,15} ?/?>|<\|[^<>|\n]{0,40}\|>",
    "fraction": rf"\\(?:[cdst]|nice)?frac(?![A-Za-z]) ?{_ARGUMENT} ?{_ARGUMENT}",
    "power": r"(?<![0-9.,])10(?: ?(?:\^|\*\*) ?(?:\{ ?[-+]? ?[0-9]+ ?\}|\([-+]?[0-9]+\)"
    r"|[-+]?[0-9]+)|[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)(?!\.?[0-9])",
    "number": rf"{_INTEGER % ('comma', 'comma')}(?:\.[0-9]+)?{_EXPONENT}?"
    rf"|(?<![0-9A-Za-z.)\]}}])\.[0-9]+{_EXPONENT}?",
    "unit": r"\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\}|\{?\\(?:text|mathrm)\{[A-Za-z ]{0,12}\}\}?)",
    "environment": r"\\(?:begin|end)\{[^{}\n]{0,40}\}",
    "command": r"\\[A-Za-z]+",
    "escaped": r"\\[^A-Za-z]",
    "currency": r"(?:USD|EUR|GBP|INR|CAD|AUD|JPY|CNY|RMB|US|Rs\.?)(?= ?[-+]? ?[$(]?[0-9.\\])",
    "times": r"(?<=[0-9])[xX](?=[0-9])",
    "word": r"[A-Za-z](?:[A-Za-z0-9]|_(?=[A-Za-z0-9]))*",
    "subscript": r"(?<=[0-9A-Za-z)\]}])_(?:\{[^{}\n]{0,40}\}|[0-9A-Za-z]+)",
    "superscript": r"\^(?: ?\{[^{}\n]{0,40}\}| ?-?[0-9A-Za-z])?|[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+",
    "arrow": r"<?[-=]+>|[\u2190-\u21ff]",
    "relation": r"[<>!]=|[<>]|\+/-|~~",
    "equals": r":?=+|[\u2248\u2245\u2261]",
    "dots": r"\.{2,}|\u2026",
    "dashes": r"--+",
    "stars": r"\*+",
    "other": r"[^ ]",
}
_TOKEN = re.compile(
    "|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()), re.DOTALL
)
_EXPONENT_OF_TEN = re.compile(r"([-+]?) ?([0-9]+)[ )}]*\Z")
_SIGNED_INTEGER = re.compile(rf" ?([-+]?) ?({_INTEGER % ('comma', 'comma')}) ?")

_HAS_VALUE = ("number", "power", "fraction", "scale", "%", ")")
_VARIABLES = frozenset("xyzXnije")
_GLUED_VARIABLES = _VARIABLES | frozenset("aopqruvw")  # "5a", but "5 a day"


def tokenize(text: str, *, starts_line: bool = False) -> list[Token]:
    """Return a normalized text's pieces in order.

    Args:
        text: From `normalize`.
        starts_line: Whether its first character begins a later line of a longer text.
    """
    found: list[Token] = []
    for match in _TOKEN.finditer(text):
        before = found[-1] if found else None
        name = match.lastgroup or ""
        token = _VALUES[name](match) if name in _VALUES else None
        if token is None:
            reader = _READERS.get(name)
            kind = reader(_Place(match, before, starts_line)) if reader else _KINDS.get(name, "")
            if not kind:
                continue
            token = Token(kind, match[0], match.start(), match.end())
            if kind == "scale":
                token = token._replace(value=Fraction(10 ** GLUED_SCALES[_singular(match[0])]))
        found.append(token)
    return found


class _Place:
    """A piece and what stands around it."""

    def __init__(self, match: re.Match[str], before: Token | None, starts_line: bool) -> None:
        self.piece, self.text = match[0], match.string
        self.start, self.end = match.span()
        self.last = before.kind if before else ""
        self.touches = before is not None and before.end == self.start
        self._starts_line = starts_line

    @property
    def after_value(self) -> bool:
        return self.last in _HAS_VALUE

    @property
    def glued(self) -> bool:
        """Whether it touches a number before it."""
        return self.touches and self.after_value

    def follows(self, characters: int = 1) -> str:
        return self.text[self.end : self.end + characters]

    def precedes(self, characters: int = 1) -> str:
        return self.text[max(0, self.start - characters) : self.start]

    @property
    def begins_line(self) -> bool:
        blank = self.text[: self.start] if self.start < 20 else self.precedes(20)
        line = blank.rpartition("\n")
        return not line[2].strip(" >") and (
            bool(line[1]) or (self._starts_line and self.start < 20)
        )


def _number(match: re.Match[str]) -> Token:
    piece, separator = match[0], match["comma"]
    digits = piece.replace(separator, "") if separator else piece
    mantissa, _, exponent = digits.lower().partition("e")
    too_long = len(mantissa) > MAX_DIGITS or len(exponent.lstrip("+-")) > MAX_EXPONENT_DIGITS
    value = None if too_long else Fraction(digits)
    return Token("number", piece, *match.span(), value, digits.isdigit())


def _power(match: re.Match[str]) -> Token:
    """Read a power of ten."""
    found = _EXPONENT_OF_TEN.search(match[0][2:].translate(_RAISED))
    assert found is not None
    sign, exponent = found.groups()
    value = None
    if len(exponent) <= MAX_EXPONENT_DIGITS:
        value = Fraction(10) ** int(sign + exponent)
    return Token("power", match[0], *match.span(), value)


def _latex_fraction(match: re.Match[str]) -> Token:
    r"""Read \frac{3}{4}."""
    above, below = (part for part in match.groups()[_FRACTION_GROUP:][:4] if part is not None)
    return Token("fraction", match[0], *match.span(), ratio(_integer(above), _integer(below)))


def _integer(text: str) -> int | None:
    match = _SIGNED_INTEGER.fullmatch(text.replace("$", ""))
    if match is None or len(match[2]) > MAX_DIGITS:
        return None
    digits = match[2].replace(match["comma"], "") if match["comma"] else match[2]
    return -int(digits) if match[1] == "-" else int(digits)


def ratio(above: int | None, below: int | None) -> Fraction | None:
    """Return a fraction's value; None for a division that is left undone, or cannot be done.

    >>> ratio(3, 4), ratio(420, 30), ratio(3, 0)
    (Fraction(3, 4), None, None)
    """
    if above is None or not below or above % below == 0:
        return None
    return Fraction(above, below)


def _word(place: _Place) -> str:
    word, lower = place.piece, place.piece.lower()
    if word in "xX" and place.after_value and re.match(r" ?[-+$\\(0-9.]", place.follows(2)):
        return "*"
    if place.glued and place.last != "%":
        if word in GLUED_SCALES:
            return "scale"
        if word in _GLUED_VARIABLES or not re.fullmatch("[A-Za-z]+[23]?", word):
            return "glued"
    if _singular(word) in SCALES and place.after_value:
        return "scale"
    if place.after_value and re.fullmatch("[eE][0-9]+", word):
        return "glued"
    if place.after_value and (lower in POSTFIXES or (word in _VARIABLES and len(word) == 1)):
        return "glued"
    if lower in OPERATORS and place.last in (*_HAS_VALUE, "word"):
        follows = re.match(r"(?: by)? [-+$\\(]*[0-9]|\W*\Z", place.follows(12))
        return "operator" if follows else "word"
    if lower == "by" and place.last == "operator":
        return ""
    if lower.partition("_")[0] in FUNCTIONS:
        return "unreadable"
    return WORD_KINDS.get(lower, "word")


def _singular(word: str) -> str:
    lower = word.lower()
    if lower.removesuffix("s") in SCALES:
        return lower.removesuffix("s")
    return word


def _dash(place: _Place) -> str:
    previous, following = place.precedes(), place.follows()
    if place.begins_line and following in (" ", ""):
        return "bullet"
    if place.glued and following.isalpha():
        return ""  # 5-day, 1.5-million
    if previous.isalpha() and following.isdigit():
        word = place.precedes(8)
        is_unit = re.search("[0-9][A-Za-z]{1,6}$", word)
        # covid-18, but x-5
        return "-" if is_unit or not f" {word}"[-2:].isalpha() else "word"
    return "-"


def _stars(place: _Place) -> str:
    """Tell multiplication from Markdown's emphasis: "3*4" and "3 * 4" from "**5** eggs"."""
    previous, following = place.precedes(), place.follows(6)
    spaced = previous == " " and following[:1] == " " and not place.begins_line
    between = re.match(r"[0-9)}]", previous) and re.match(r"[-0-9(]|\\d?frac|\\sqrt", following)
    if len(place.piece) > 2 or not (spaced or between):
        return ""
    if len(place.piece) == 1:
        return "*"
    return "operator" if place.after_value else ""


def _opening(place: _Place) -> str:
    if place.touches and place.last in ("word", "unreadable"):
        return "unreadable("
    if place.glued:
        return "glued"
    if place.after_value:
        return "operator" if _RIVAL.match(place.text, place.start) else "break"
    return "("


# "5 (7)", "5 (or 7)", but not "5 (3 steps)".
_RIVAL = re.compile(r"[(\[] ?(?:or |mod )?[-+$]{0,2}[0-9][-+*/=.,0-9 ]{0,40}%?[)\]]")


def _full_stop(place: _Place) -> str:
    following = place.follows()
    if following.isdigit() and place.precedes().isdigit() and not place.glued:
        return "unreadable"  # v1.5
    if following.isdigit() or re.match(r"\\[A-Za-z]", place.follows(2)):
        return "glued" if place.glued else ""
    if following.isalpha() and not place.glued:
        return ""  # e.g. and no.18
    return "break"


def _comma(place: _Place) -> str:
    if place.follows().isdigit() and not place.touches and place.precedes() in (" ", ""):
        return "unreadable"  # a decimal comma
    return "glued" if place.glued and place.follows().isdigit() else ","


def _colon(place: _Place) -> str:
    if place.glued and place.follows().isdigit():
        return "glued"
    if place.after_value and not place.touches and re.match(" ?[0-9]", place.follows(2)):
        return "operator"
    return "break" if place.after_value else ""


def _exclamation(place: _Place) -> str:
    if place.glued and re.match(r" ?[-+*/=^0-9A-Za-z\u00d7!}]|\Z", place.follows(2)):
        return "glued" if place.follows(2) else "break"
    return "break"


def _quote(place: _Place) -> str:
    return "glued" if place.glued and place.follows().isdigit() else ""


def _bar(place: _Place) -> str:
    if place.glued:
        return "glued"
    return "unreadable" if re.match("-?[0-9]", place.follows(2)) else "bar"


def _superscript(place: _Place) -> str:
    if place.last in ("word", "", "unreadable"):
        return ""
    letters = re.fullmatch(r"\^ ?\{ ?([A-Za-z]{2,}) ?\}", place.piece)
    return "" if letters else "glued"


def _other(place: _Place) -> str:
    """Classify a single character."""
    character = place.piece
    if character in _CHARACTERS:
        reader = _CHARACTERS[character]
        return reader if isinstance(reader, str) else reader(place)
    category = unicodedata.category(character)
    if category[0] == "N":
        return "number"
    if category[0] == "L":
        is_greek = "\u0370" <= character <= "\u03ff" and character not in "\u03bc\u03a9"
        return "unreadable" if is_greek else "word"
    if category == "Cf" or (category[0] == "M" and place.glued):
        return "unreadable"  # it turns or strikes out what it stands at
    return "operator" if category == "Sm" else ""


def _relation(place: _Place) -> str:
    return "" if place.piece == ">" and place.begins_line else "operator"


def _dashes(place: _Place) -> str:
    return "break" if len(place.piece) > 2 else "operator"


def _escaped(place: _Place) -> str:
    if place.piece[1].isdigit():
        return "operator"
    return {"\\": "break", "%": "%", "{": "unreadable", "}": "glued", "|": "unreadable"}.get(
        place.piece[1], ""
    )


_CHARACTERS = {
    "\n": "break",
    "?": "break",
    ";": ",",
    "+": "+",
    "/": "/",
    "\u00d7": "*",
    "\u00f7": "operator",
    "%": "%",
    ")": ")",
    "]": ")",
    "\u2030": "glued",
    "\u00b0": "",
    "~": "",
    "-": _dash,
    "(": _opening,
    "[": _opening,
    ".": _full_stop,
    ",": _comma,
    ":": _colon,
    "!": _exclamation,
    "'": _quote,
    '"': _quote,
    "|": _bar,
}
_VALUES = {"number": _number, "power": _power, "fraction": _latex_fraction}
_KINDS = {"environment": "break", "times": "*", "arrow": "arrow", "equals": "="}
_READERS = {
    "command": lambda place: COMMAND_KINDS.get(place.piece, "unreadable"),
    "escaped": _escaped,
    "word": _word,
    "subscript": lambda place: "glued" if place.glued else "",
    "superscript": _superscript,
    "relation": _relation,
    "dots": lambda place: "glued" if place.glued else "",
    "dashes": _dashes,
    "stars": _stars,
    "other": _other,
}
_FRACTION_GROUP = _TOKEN.groupindex["fraction"]

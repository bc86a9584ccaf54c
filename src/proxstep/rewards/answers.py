r"""The answer in a completion, its last box or its final number, read as data and never evaluated.

A number is made of ASCII digits. It may have commas between groups of three ("1,080"), decimals
("1.5", ".5"), an exponent ("1e3"), a sign ("-5", "-$5", "$-5"; U+2212 is a minus too), or be a
fraction ("3/4", "\frac{3}{4}"). LaTeX spellings ("1{,}080", "1,\!080", "\$18") are understood. A
percent sign is not read: "75%" is 75. A minus right after a digit, a letter or a closing bracket is
a dash: "5-3" ends with 3.

Not read, because ambiguous: spaces between groups ("1 080" is 1 and 080), decimal commas ("1,5" is
1 and 5), mixed numbers ("2 1/2" is 2 and 1/2), powers ("10^3" is 10 and 3), other scripts' digits.
"""

from __future__ import annotations

import re
from fractions import Fraction

# A completion is hostile input: every pattern takes linear time; these bounds keep numbers small.
MAX_CHARACTERS = 20_000
MAX_DIGITS = 100
MAX_EXPONENT_DIGITS = 3

_UNSIGNED = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9A-Za-z.)])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)
_NUMBER = re.compile(
    r"(?:(?P<sign>(?<![0-9A-Za-z)\]}%])[-+])[$€£]?)?"
    rf"(?P<numerator>{_UNSIGNED})(?: ?/ ?(?P<denominator>{_UNSIGNED}))?"
)
_SPELLINGS = (
    ("\u2212", "-"),
    ("\u00a0", " "),
    ("{,}", ","),
    (r"\!", ""),
    (r"\,", ""),
    (r"\$", "$"),
)
_LATEX_FRACTION = re.compile(r"(?<![0-9])\\[dt]?frac ?\{ ?([-+]?[0-9.,]+) ?\} ?\{ ?([0-9.,]+) ?\}")
_ANSWER_PHRASE = re.compile(r"answer[*_ ]{0,4}(?:is\b|:)", re.IGNORECASE)

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character, not a group


def boxed_answer(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` or `\fbox{...}` holds, in time linear in the text.

    Without braces, as some of MATH's solutions have it, the box holds what follows up to the end
    of the formula or of the line.

    Args:
        text: Any text at all.

    Returns:
        The content without outer white space. None where there is no box, or where the last one is
        empty or stays open, as in a completion that was cut off.

    >>> boxed_answer(r"First \boxed{1}, so it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed_answer(r"so $\boxed 7$ of them")
    '7'
    >>> boxed_answer(r"so \boxed{\frac{1}{2}") is None
    True
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip() or None
    return None


def final_number(text: str) -> Fraction | None:
    r"""Return the final numeric answer of a completion, exactly.

    The first of these places that holds a number decides:

    1. the number after the last `####` (the convention of GSM8K), if no letter stands between: a
       Markdown heading such as "#### Step 3" is not an answer;
    2. the first number in the last complete `\boxed{...}`, after its last equals sign if any;
    3. the first number after the last "answer is" or "answer:", in upper or lower case;
    4. the last number of the text.

    Args:
        text: A completion; any text at all. Only its last `MAX_CHARACTERS` characters are read.

    Returns:
        The number. None where there is none, or where it has more than `MAX_DIGITS` digits, an
        exponent of more than `MAX_EXPONENT_DIGITS` digits, or a zero denominator.

    >>> final_number("5 apples at $3.50 cost $17.50. #### 17.50")
    Fraction(35, 2)
    >>> final_number(r"so x = \boxed{\frac{1}{2}} of the 10 apples")
    Fraction(1, 2)
    >>> final_number("The **answer is**: $1,080 after 2 years.")
    Fraction(1080, 1)
    >>> final_number("I do not know.") is None
    True
    """
    text = _normalize(text)
    box = boxed_answer(text) or ""
    match = (
        _number_without_letters_before(_after_last(text, "####"))
        or _first_number(_after_last(box, "="))
        or _first_number(box)
        or _first_number(_after_answer_phrase(text))
        or _last_number(text)
    )
    return _value(match) if match else None


def _normalize(text: str) -> str:
    """Return the end of the text with one spelling for each minus, space, comma and fraction."""
    if len(text) > MAX_CHARACTERS:
        # The cut may fall inside a number, whose rest would read as another number.
        text = text[-MAX_CHARACTERS:].lstrip("0123456789.,")
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    return _LATEX_FRACTION.sub(r"\1/\2", text)


def _after_last(text: str, marker: str) -> str:
    """Return what follows the last occurrence of a marker, or nothing where it does not occur."""
    _, found, rest = text.rpartition(marker)
    return rest if found else ""


def _after_answer_phrase(text: str) -> str:
    """Return what follows the last "answer is" or "answer:", or nothing where neither occurs."""
    ends = [match.end() for match in _ANSWER_PHRASE.finditer(text)]
    return text[ends[-1] :] if ends else ""


def _first_number(text: str) -> re.Match[str] | None:
    """Return the first number of a text."""
    return _NUMBER.search(text)


def _number_without_letters_before(text: str) -> re.Match[str] | None:
    """Return the first number of a text, unless a letter comes before it."""
    match = _first_number(text)
    return match if match and not any(map(str.isalpha, text[: match.start()])) else None


def _last_number(text: str) -> re.Match[str] | None:
    """Return the last number of a text."""
    numbers = list(_NUMBER.finditer(text))
    return numbers[-1] if numbers else None


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the value of a matched number, or None where it is too long or divides by zero."""
    numerator = _unsigned_value(match["numerator"])
    denominator = _unsigned_value(match["denominator"] or "1")
    if numerator is None or not denominator:
        return None
    return (-numerator if match["sign"] == "-" else numerator) / denominator


def _unsigned_value(digits: str) -> Fraction | None:
    """Return the value of one matched number without its sign, or None where it is too long."""
    mantissa, _, exponent = digits.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent.lstrip("+-")) > MAX_EXPONENT_DIGITS:
        return None
    return Fraction(digits.replace(",", ""))

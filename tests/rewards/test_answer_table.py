"""The answer grammar of docs/tasks.md, by its table and by thousands of generated spellings.

The expected values are made together with the spellings: nothing here reads a number from a text.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from pathlib import Path

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import (
    exact_match,
    final_number,
    math_verify,
    numeric_answer,
    reference_number,
)

SPELLINGS_FILE = Path(__file__).with_name("answer_spellings.txt")
DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"

VALUES = [
    ("5", 5),
    ("18", 18),
    ("007", 7),
    ("1080", 1080),
    *(
        (f"1{separator}080", 1080)
        for separator in (",", "{,}", r",\!", r"\,", r"\;", r"\ ", "~", " ", "'")
    ),
    *((f"1{space}080", 1080) for space in ("\u00a0", "\u2009", "\u202f")),
    ("12,345,678", 12345678),
    ("12 345 678", 12345678),
    ("17.50", Fraction(35, 2)),
    ("1,234.5", Fraction(2469, 2)),
    (".5", Fraction(1, 2)),
    ("0.1", Fraction(1, 10)),
    ("3/4", Fraction(3, 4)),
    ("3 / 4", Fraction(3, 4)),
    ("3\u20444", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"\dfrac{3}{4}", Fraction(3, 4)),
    (r"\frac34", Fraction(3, 4)),
    ("2 1/2", Fraction(5, 2)),
    (r"2\frac{1}{2}", Fraction(5, 2)),
    (r"2\tfrac12", Fraction(5, 2)),
    ("1e3", 1000),
    ("2.5E-1", Fraction(1, 4)),
    ("10^3", 1000),
    ("10^{-2}", Fraction(1, 100)),
    ("10\u00b3", 1000),
    (r"1.5 \times 10^3", 1500),
    (r"1.5 \cdot 10^{3}", 1500),
    ("1.5 * 10**3", 1500),
    ("1.5x10^3", 1500),
    ("1.5 \u00d7 10\u207b\u00b3", Fraction(3, 2000)),
    ("1.5 million", 1500000),
    ("2 hundred thousand", 200000),
    ("3 billion", 3 * 10**9),
    ("2k", 2000),
    ("2.5M", 2500000),
]
POSITIVE = ["{}", "+{}", "${}", r"\${}", "\u20ac{}", "US${}", "USD {}", "({})", "**{}**"]
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
NEGATIVE = [
    *(f"{dash}{{}}" for dash in DASHES),
    *(f"{dash} {{}}" for dash in DASHES),
    "-\u00a0{}",
    "-${}",
    "$-{}",
    "- ${}",
    "$ - {}",
    r"-\${}",
    "-\u20ac{}",
    "-({})",
    "- ({})",
    "(-{})",
    r"-\left({}\right)",
    "**-{}**",
    "-**{}**",
    "minus {}",
    "negative {}",
    "negative ${}",
    "Minus {}",
]
UNITS = ["", "%", r"\%", " percent", " dollars", r"\text{ cm}", " km/h", " per day", r"\text{ m}^2"]
PLACES = [
    "{}",
    "so it is {}.",
    "#### {}",
    "####{}\n",
    "12 - 3 = 9\n#### {}\n#### Explanation: add 3",
    "It takes 3 of 12. #### {}\nI used 3 steps.",
    r"#### \boxed{{{}}}",
    r"Thus $\boxed{{{}}}$ for 3 of the 12",
    r"\boxed{{x = {}}} \boxed{{}}",
    r"\boxed{{{}.}}",
    "The answer is {}.",
    "The answer is 3 * 4 = {}.",
    "**Answer:** {} ; I used 3 of the 12",
    "3 * 4 = {}",
    "We get 3*4=<<3*4=12>>{}",
    "We get <<3*4=12>>12 in 3 steps, so the answer is: {}",
]


SPELLINGS = [
    (style.format(text) + unit, sign * value)
    for (text, value), unit in itertools.product(VALUES, UNITS)
    for sign, styles in ((1, POSITIVE), (-1, NEGATIVE))
    for style in styles
]
STEP = 29  # a prime: every place sees every value, style and unit


@pytest.mark.parametrize("place", PLACES)
def test_every_spelling_in_every_place(place: str) -> None:
    tried = SPELLINGS[PLACES.index(place) % STEP :: STEP]
    assert len(tried) > 500
    for written, value in tried:
        text = place.format(written)
        assert final_number(text) == value, text


def test_every_spelling_as_a_reference() -> None:
    for written, value in SPELLINGS:
        assert reference_number(written) == value, written


# Each of these states a value without being it, or more than one.
REFUSED = [
    "20 - 11",
    "20-11",
    "20 \u2013 11",
    "3 * 4",
    "3*4",
    "3 x 4",
    r"3 \times 4",
    "3 + 4",
    "420 / 30",
    "420/30",
    r"\frac{420}{30}",
    "420 \u00f7 30",
    r"420 \div 30",
    "420 / 30 =",
    "20 minus 11",
    "3 times 4",
    "3 plus 4",
    "420 divided by 30",
    "(20)-11",
    "20%-11",
    "2(3)",
    "(3 + 4) * 2",
    "3 * 4 = 3 * 4",
    "sqrt(16)",
    r"\sqrt{16}",
    "\u221a16",
    "2^3",
    "2**3",
    r"2\sqrt{3}",
    r"2\pi",
    r"\binom{5}{2}",
    r"\log_2 8",
    "|-5|",
    "3x",
    "50% of 36",
    "1/2 of 36",
    "2.5/2",
    "1/0",
    "3-4",
    "3\u20134",
    "3 to 4",
    "3 or 4",
    "3 and 4",
    "3, 4",
    "1,5",
    "1,0800",
    "[3, 4]",
    "(3, 4)",
    "3; 4",
    "3:30",
    "3 : 4",
    "1.2.3",
    "1.234.567",
    "2020-01-05",
    "12/25/2020",
    "5 ft 10 in",
    "3 hours 30 minutes",
    "5'10\"",
    "> 5",
    "\u2265 5",
    r"\leq 5",
    "5 \u00b1 1",
    r"\pm 5",
    "--5",
    "+-5",
    "-(-5)",
    "0.333...",
    r"0.\overline{3}",
    "101_2",
    "0x10",
    "2\u00bd",
    "\uff11\uff18",
    "\u0661\u0668",
    "1e9999",
    "9" * 101,
]
REFUSING_PLACES = [
    "{}",
    "#### {}",
    "#### {}\n#### Explanation: add 3",
    r"I have 7. \boxed{{{}}}",
    "I have 7 apples. The answer is {}.",
]


@pytest.mark.parametrize("written", REFUSED)
def test_what_is_not_one_number_is_no_answer(written: str) -> None:
    for place in REFUSING_PLACES:
        assert final_number(place.format(written)) is None, place
    assert reference_number(written) is None


@pytest.mark.parametrize(
    "reference",
    [*REFUSED, "18 dollars in 7 days", "5 apples and 3 pears", "x = 2, y = 3", "about 5", "A5"],
)
def test_a_reference_that_is_not_one_number_is_an_error(reference: str) -> None:
    with pytest.raises(
        ProxstepError, match=r"index 0\) holds no number, or more than one"
    ) as error:
        numeric_answer([""], ["5"], [reference])
    assert "write one number" in str(error.value)


def test_a_reference_of_thousands_of_digits_is_an_error() -> None:
    for reference in (10**5000, -(10**5000), "9" * 5000, f"1e{'9' * 5000}"):
        with pytest.raises(ProxstepError, match="index 0"):
            numeric_answer([""], ["5"], [reference])
        for function in (exact_match, math_verify):
            if not isinstance(reference, str):
                with pytest.raises(ProxstepError, match="integer of thousands of digits"):
                    function([""], ["5"], [reference])


def written_spellings() -> list[tuple[str, str]]:
    """What an attacker wrote: "value" or "reference value", and the text."""
    lines = SPELLINGS_FILE.read_text(encoding="utf-8").split("\n")[1:-1]
    rows = [line.split("\t") for line in lines]
    return [(value, text.encode().decode("unicode_escape")) for value, text in rows]


def test_spellings_that_an_attacker_wrote() -> None:
    rows = written_spellings()
    assert len(rows) > 800
    for value, text in rows:
        expected = None if value.endswith("none") else Fraction(value.removeprefix("reference "))
        read = reference_number if value.startswith("reference ") else final_number
        assert read(text) == expected, text


def rows_of_the_table() -> list[tuple[str, str]]:
    """The rows "| `written` | value |" of docs/tasks.md."""
    text = DOCS.read_text(encoding="utf-8")
    section = text.partition("## What is one number")[2].partition("\n## ")[0]
    rows = []
    for line in section.splitlines():
        cells = re.fullmatch(r"\| (`.*`) \| ([^|]*) \|.*", line)
        if cells:
            rows += [(written, cells[2].strip()) for written in re.findall(r"`([^`]+)`", cells[1])]
    return rows


def test_the_table_of_the_documentation() -> None:
    rows = rows_of_the_table()
    assert len(rows) > 60
    for written, value in rows:
        expected = None if value == "refused" else Fraction(value.replace(",", ""))
        for place in ("{}", "#### {}", r"\boxed{{{}}}", "The answer is {}"):
            assert final_number(place.format(written)) == expected, (written, place)
        assert reference_number(written) == expected, written

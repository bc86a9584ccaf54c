from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxstep.rewards import final_number

# What models write, and the number a reader would take from it.
READ = [
    ("18", 18),
    ("18.", 18),
    ("18.00", 18),
    ("-5", -5),
    ("\u22125", -5),
    ("+5", 5),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("1e3", 1000),
    ("2.5E-1", Fraction(1, 4)),
    ("1,080", 1080),
    ("1,234,567.5", Fraction(2469135, 2)),
    ("$1,234.50", Fraction(2469, 2)),
    (r"\$18", 18),
    ("-$5", -5),
    ("$-5", -5),
    (r"-\$5", -5),
    ("-\u20ac5", -5),
    ("\u20ac20", 20),
    ("75%", 75),
    (r"75\%", 75),
    ("18 dollars", 18),
    ("18USD", 18),
    ("1/2", Fraction(1, 2)),
    ("3 / 4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    (r"\frac{1}{2}", Fraction(1, 2)),
    (r"-\dfrac{3}{4}", Fraction(-3, 4)),
    (r"\tfrac{-3}{4}", Fraction(-3, 4)),
    (r"\frac {1,000} {3}", Fraction(1000, 3)),
    ("1{,}080", 1080),
    (r"1,\!080", 1080),
    (r"1\,080", 1080),
    ("0", 0),
    ("007", 7),
    ("-0", 0),
]

# Every one of these says 18 as its final answer.
EIGHTEEN = [
    "16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18",
    "#### 18\n",
    "####18",
    "#### $18.00 per day, not 20",
    "#### **18**",
    "#### 5\nWait, that is wrong.\n#### 18",
    r"\boxed{5} is wrong, #### 18",
    r"#### \boxed{18}",
    "#### Step 3: the end\nso it is \\boxed{18}",
    r"The answer is \boxed{18}.",
    r"\boxed{18}",
    r"\boxed{18\text{ dollars in 7 days}}",
    r"\boxed{\text{18 dollars}}",
    r"\boxed{\mathbf{18}} after 3 days",
    r"\boxed{\$18}",
    r"\boxed{18\%}",
    r"\boxed{x_1 = 18}",
    r"\boxed{18 = x}",
    r"\boxed{18\text{ m}^2}",
    r"\boxed{7}, no: \boxed{18} for 2 of them",
    r"\boxed{18} and then \boxed{",
    "The answer is 18. I checked it 3 times.",
    "The answer is: 18, which is 2 * 9.",
    "**Answer:** 18 (3 steps)",
    "**Answer**: 18 (3 steps)",
    "Final Answer: $18 for 2 days",
    "FINAL ANSWER IS 18 since 20 > 18 > 7",
    "the answer is **18** of 20",
    "The answer is 5? No. The answer is 18, not 20",
    "#### no number here, but the answer is 18, not 20",
    "The answer is: eighteen. Well, 18",
    "She has 20 - 2 = 18",
    "She has 20 - 2 = 18.",
    "so **18**",
    "so *18*.",
    "so (18)",
    "x=18",
    "It is \\(18\\).",
    "$18$",
    "covid-18",
    "1,0800 so 18",
    "5 + 3 = 8, 8 + 10 = 18",
    "5 + 3 = 8 and 8 + 10 = 18",
    "so it is 18 - which is 9 * 2\nthat is 18",
    "#### 18\n#### Explanation: add 3",
    "#### 18\n#### ",
    r"\boxed{18} \boxed{}",
    r"\boxed{18.}",
    "The answer is 20 dollars - 2 dollars = 18 dollars",
    "The answer is $18/hour for 2 hours",
    "| total | 18 |",
    "<answer>18</answer>",
    r"\begin{align*} x &= 20 - 2 \\ &= 18 \end{align*}",
    "\u7b54\u6848\u662f18\u3002",
    "1/2 of 36 is 18.0",
    "an answering machine costs 18",
    "no.18",
]

NONE = [
    "",
    "I do not know.",
    "####",
    r"\boxed{}",
    "The answer is",
    "answer: x",
    "-",
    "$",
    "1/0",
    "#### 5/0",
    "1e9999",
    "1e-999999999999",
    "\uff11\uff18",  # full-width digits
    "\u0661\u0668",  # Arabic-Indic digits
    "\u00bd",
    "#### " + "9" * 101,
    "#### 5 or 18",
    "#### 18 apples or 5 apples",
    "The answer is not 18",
    "The answer is 2 and a half",
    "#### 15\n#### 3 * 5",
    "#### -\n18",
    "Total:\n- 18",
    r"so r = 18 and the area is \boxed{\pi r^2}",
    r"\boxed{5!}",
    r"\boxed{x = 2, y = 18}",
    "$$\\boxed{\\frac{36}{2}}$$",
    "between 20-18",
    "from (20)-18",
    "20%-18",
    "a list: 1,2,3,18",
    "1,0800 or 18",
    "3.4.18",
]


@pytest.mark.parametrize(("text", "number"), READ)
@pytest.mark.parametrize("place", ["{}", "It is {}", "#### {}", r"\boxed{{{}}}", "answer: {} ."])
def test_number_is_read_everywhere(text, number, place):
    assert final_number(place.format(text)) == number


@pytest.mark.parametrize("text", EIGHTEEN)
def test_real_completions(text):
    assert final_number(text) == 18


@pytest.mark.parametrize("text", NONE)
def test_nothing_sensible(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 080", 1080),
        ("1,5", None),
        ("1,0800", None),
        ("2 1/2", Fraction(5, 2)),
        ("10^3", 1000),
        ("5 -3", None),
        ("5 - 3", None),
        ("1.000", 1),
        ("2 dozen", 2),
        ("(18)", 18),
        ("10^34", 10**34),
    ],
)
def test_documented_ambiguities(text, number):
    assert final_number(text) == number


def test_result_is_exact():
    assert final_number("0.1") == Fraction(1, 10)
    assert final_number("0." + "3" * 50) != Fraction(1, 3)
    assert final_number("9007199254740993") == 9007199254740993  # not a float
    assert final_number("9" * 100) == 10**100 - 1


STYLES = [
    str,
    "{:,}".format,
    "{:+}".format,
    "{}.".format,
    "{}.00".format,
    "{:,}.0".format,
    "**{}**".format,
    "{} dollars".format,
    "{}%".format,
    "({})".format,
    r"\({}\)".format,
    lambda n: str(n).replace("-", "\u2212"),
    lambda n: f"{n:,}".replace(",", "{,}"),
    lambda n: f"{n:,}".replace(",", r",\!"),
    lambda n: f"-${-n}" if n < 0 else f"${n}",
    lambda n: f"-\\${-n:,}" if n < 0 else f"\\${n:,}",
    lambda n: f"{n:,}".replace(",", " "),
    lambda n: f"{n:,}".replace(",", r"\,"),
    lambda n: str(n).replace("-", "- "),
    lambda n: str(n).replace("-", "negative "),
    lambda n: f"{n}e0",
]
PLACES = [
    "{}",
    "First 12, then 7 and so {}",
    "It costs $3 * 4 = 12. #### {}",
    "#### {}\n\nI used 3 steps.",
    r"Thus \boxed{{{}}} for 3 of the 12",
    r"Thus $\boxed{{\text{{{} apples}}}}$ for 3 of the 12",
    "The answer is {} ; I used 3 of the 12",
    "**Answer:** {} ; I used 3 of the 12",
]


@settings(deadline=None)
@given(st.integers(-(10**15), 10**15), st.sampled_from(STYLES), st.sampled_from(PLACES))
def test_any_integer_in_any_style_and_place(number, style, place):
    text = place.format(style(number))
    assert final_number(text) == number
    assert final_number(text) != number + 1
    assert final_number(place.format(style(number + 1))) == number + 1


@settings(deadline=None)
@given(st.decimals(-(10**9), 10**9, places=4), st.sampled_from(PLACES))
def test_any_decimal(number, place):
    assert final_number(place.format(f"{number:,.4f}")) == Fraction(number)


@settings(deadline=None)
@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from(PLACES))
def test_any_fraction(numerator, denominator, place):
    for text in (f"{numerator}/{denominator}", rf"\frac{{{numerator}}}{{{denominator}}}"):
        # A quotient that comes out whole is a division that is left undone.
        expected = Fraction(numerator, denominator) if numerator % denominator else None
        assert final_number(place.format(text)) == expected

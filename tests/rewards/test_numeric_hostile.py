from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.selection import slow

from proxstep.rewards import answers, final_number

HOSTILE = [
    "9",
    "1,",
    "1,000",
    ",000",
    "1.",
    ".1",
    "1e",
    "1e9",
    "-",
    "-$",
    "/",
    "1/",
    "1 / ",
    " ",
    "\n",
    "{",
    "}",
    "\\",
    r"\boxed{",
    r"\boxed{1",
    r"\frac{",
    r"\frac{1}{",
    r"\frac{1,",
    "####",
    "#### ",
    "answer",
    "answer is ",
    "answer*_ ",
    "*",
    "\u2212",
]


PREFIXES = [
    "",
    *(
        pytest.param(prefix, marks=pytest.mark.slow)
        for prefix in (r"\frac{", r"\boxed{", "#### ", "1", "answer")
    ),
]


@pytest.mark.parametrize("unit", [u if i % 2 else slow(u)[0] for i, u in enumerate(HOSTILE)])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_time_is_linear_in_the_text(unit, prefix, monkeypatch):
    """Without the cap on characters: quadratic time would take a minute for each of these."""
    monkeypatch.setattr(answers, "MAX_CHARACTERS", 10**9)
    text = prefix + unit * (100_000 // len(unit))
    start = time.process_time()
    final_number(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("unit", HOSTILE)
def test_megabytes_are_cut(unit):
    start = time.process_time()
    number = final_number(unit * (4_000_000 // len(unit)))
    assert time.process_time() - start < 1
    assert number is None or abs(number) < 10**1000


def test_cut_does_not_read_a_part_of_a_number():
    filler = "x" * (answers.MAX_CHARACTERS - 1)
    assert final_number("118" + filler) is None
    assert final_number("#### 18" + "x" * (answers.MAX_CHARACTERS - 7)) == 18


@settings(deadline=None)
@given(st.text(alphabet="0159,.-+$/{}\\%eE#= \n*\u2212abfrcoxdnswi\u0661", max_size=60))
def test_no_text_raises(text):
    for hostile in (text, f"#### {text}", rf"\boxed{{{text}}}", f"answer is {text}"):
        assert final_number(hostile) is None or isinstance(final_number(hostile), Fraction)

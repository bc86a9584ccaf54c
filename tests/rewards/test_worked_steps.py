"""The rewards of the tasks with worked steps, against malformed and hostile completions."""

from __future__ import annotations

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import countdown, last_item


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7+5=12;8+6+1=15;4+0+1=5;552", 1.0),
        ("552", 1.0),
        ("nonsense;552", 1.0),  # what counts is the answer
        ("7+5=12;8+6+1=15;4+0+1=5", 0.0),
        ("552;", 0.0),
        ("552;553", 0.0),
        ("553;552 ", 0.0),
        ("12; 552", 0.0),
        ("12;0552", 0.0),
        ("12;+552", 0.0),
        ("12;552.0", 0.0),
        ("12;551+1", 0.0),
        ("12;٥٥٢", 0.0),  # digits of another script
        ("12;552\n", 0.0),
        ("552;" * 10_000, 0.0),
        ("", 0.0),
    ],
)
def test_last_item(text: str, reward: float) -> None:
    assert last_item([""], [text], answer=["552"]) == [reward]
    assert last_item([""], [text], answer=["552"], truncated=[True]) == [0.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3*7=21,21+5=26", 1.0),
        ("5+21=26", 0.0),
        ("7*3=21,5+21=26", 1.0),
        ("3+7=10,10*5=50;3*7=21,21+5=26", 1.0),
        ("anything;3*7=21,21+5=26", 1.0),
        ("3*7=21,21+5=26;3+7=10,10*5=50", 0.0),  # the last attempt counts
        ("3*7=21,21+5=26;", 0.0),
        ("3*7=21,21+5=27", 0.0),
        ("3*7=22,22+4=26", 0.0),
        ("3+7=10,10+16=26", 0.0),  # a number that is not there
        ("21+5=26", 0.0),
        ("26", 0.0),
        ("26=26", 0.0),
        ("3*7=21,21+5=26,26*1=26", 0.0),
        ("3*7=21,21+5=26,26+0=26", 0.0),
        ("3*7=21,5+5=10,10+16=26", 0.0),  # one number twice
        ("7+5=12,12*3=36", 0.0),
        ("3*7=21,21+5=26,", 0.0),
        ("3*7=21 ,21+5=26", 0.0),
        ("3*7=21,21+5=26\n", 0.0),
        ("03*7=21,21+5=26", 0.0),
        ("-3*-7=21,21+5=26", 0.0),
        ("3**7=2187,2187-5=2182", 0.0),
        ("3*7+5=26", 0.0),
        ("(3*7)=21,21+5=26", 0.0),
        ("3*7=21,21+5=2_6", 0.0),
        ("3*7=21,21+5=२६", 0.0),
        ("__import__('os').system('exit')", 0.0),
        ("9" * 100_000 + "*7=1", 0.0),
        ("3*7=21," * 50_000, 0.0),
        ("", 0.0),
        (",", 0.0),
        (";", 0.0),
    ],
)
def test_countdown(text: str, reward: float) -> None:
    given = {"answer": ["26"], "numbers": [[3, 7, 5]]}
    assert countdown([""], [text], **given) == [reward]
    assert countdown([""], [text], truncated=[True], **given) == [0.0]


def test_countdown_uses_each_number_as_often_as_it_is_given() -> None:
    def grade(text: str) -> float:
        return countdown([""], [text], answer=["18"], numbers=[[3, 3, 12]])[0]

    assert grade("3+3=6,6+12=18") == 1.0
    assert grade("3+12=15,15+3=18") == 1.0
    assert grade("12+6=18,3+3=6") == 0.0  # a step before its number is there
    assert countdown([""], ["5-8=-3,7-3=4"], answer=["4"], numbers=[[5, 8, 7]]) == [0.0]


def test_references_for_each_completion() -> None:
    with pytest.raises(ProxstepError, match="last_item"):
        last_item(["", ""], ["1", "2"], answer=["1"])
    with pytest.raises(ProxstepError, match="countdown"):
        countdown(["", ""], ["1", "2"], answer=["1", "2"], numbers=[[1]])

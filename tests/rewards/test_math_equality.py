"""Answers that math-verify by itself takes for equal or unequal wrongly, with their neighbors.

From public reports on math-verify (its issues 10, 14, 25, 26, 37, 41, 60 and 71) and by their kind.
"""

from __future__ import annotations

import pytest

from proxstep.rewards import math_verify

WRONG = [
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("2^{-99}", "2^{-98}"),
    ("101_2", "101_3"),
    ("101_2", "5_3"),
    ("n=2,3,4", "n=1,2,3"),
    ("D = (0, 1)", "D = (0, 1.5)"),
    (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}"),
    (r"19, 46, \text{ and } 82", "21, 36, and 82"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
    (r"\pm 2021", "2021"),
    ("12:00", "1:00"),
    (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
    (r"1:2:3:\ldots", r"1:4:9:\ldots"),
    ("3*x-1*y+13=0", "3x + 4y + 14=0"),
    ("3x-y+13=0", "3x+4y+14=0"),
    ("4", r"4\sqrt(2)"),
    ("4", r"4\sqrt{2}"),
    (r"10^{-20}", r"10^{-21}"),
    ("0", r"2^{-99}"),
    ("0", "10^{-20}"),
    ("0", r"\frac{1}{10^{20}}"),
    ("1", r"1+10^{-30}"),
    ("1", r"1+2^{-99}"),
    (r"\frac{100!}{98!}", r"\frac{101!}{99!}"),
    (r"2^{1000}", r"2^{1000}+1"),
    (r"2^{-99}x", "2^{-98}x"),
    (r"e^{-100}", r"e^{-101}"),
    (r"e^{-100}", "0"),
    (r"\sqrt{2}\cdot 10^{-20}", r"\sqrt{3}\cdot 10^{-20}"),
    ("11_2", "11_{10}"),
    (r"3^{-50}", r"3^{-51}"),
    ("(0, 2^{-99})", "(0, 2^{-98})"),
    (r"\{2^{-99}\}", r"\{2^{-98}\}"),
    ("0.0000001", "0.0000002"),
    (r"\frac{1}{10^{7}}", "0.0000002"),
    ("y=2x+1", "y=2x+2"),
    ("x^2+y^2=1", "x^2+y^2=2"),
    (r"\frac{1}{3}", "0.33"),
    ("7", "3:7"),
    ("3:4", "4:3"),
    ("2,3", "3"),
    ("3", "2,3"),
    (r"1\pm\sqrt{2}", r"1+\sqrt{2}"),
    ("x<1", "x>1"),
    ("x<1", "(-\\infty,1]"),
    (r"x \le 1", "(-\\infty,1)"),
    ("(1,2)", "[1,2]"),
    ("5", "5x"),
    ("x=5", "x=-5"),
    ("-5", "5"),
    ("5\\%", "0.5"),
    (r"5!", "5"),
    ("A", "B"),
    ("1,000", "1,001"),
    ("1", "1,000"),
    (r"\emptyset", "0"),
    (r"\{0\}", r"\emptyset"),
    ("x=1 or x=2", "x=1"),
    (r"\frac{2}{3}", "\\frac{2}{3}x"),
    ("20-11", "20-12"),
    ("9", "20-11"),
    ("14", "420 \\div 30"),
    ("12", "3 \\times 4"),
    ("12", "3*4"),
    ("7", "3+4"),
    ("1_000", "1"),
    ("30^\\circ", "60^\\circ"),
    ("2:30", "3:30"),
    ("10!", "11!"),
    ("2^{100}", "2^{101}"),
    (r"\binom{10}{3}", "\\binom{10}{4}"),
    (r"\log_2 3", r"\log_3 2"),
    ("a_1", "a_2"),
    ("x_1", "x_2"),
    (r"\sin 1", r"\cos 1"),
    (r"\overline{AB}", r"\overline{CD}"),
    (r"0.\overline{3}", r"0.\overline{4}"),
    (r"\text{east}", r"\text{west}"),
    (r"\infty", r"-\infty"),
    ("1+i", "1-i"),
    ("2i", "2"),
    ("5,8", r"7 = 7 \text{ or } 9 = 9"),
    ("5,8", "1=1, 2=2"),
    ("5,8", "3<3 or 4<5"),
]
RIGHT = [
    ("5", "5."),
    (r"\emptyset", r"\varnothing"),
    (r"\varnothing", r"\emptyset"),
    (r"\emptyset", r"\{\}"),
    ("1000", "1e3"),
    ("1e3", "1000"),
    ("1e-3", "0.001"),
    ("x<1", r"(-\infty,1)"),
    (r"(-\infty,1)", "x<1"),
    (r"(1,3)", "1<x<3"),
    (r"[1,3]", r"1 \le x \le 3"),
    (r"[1,\infty)", r"x \ge 1"),
    (r"x \geq 1", r"[1,\infty)"),
    (r"x \in (1,3)", "(1,3)"),
    ("(1,3)", r"x \in (1,3)"),
    ("(0, 12.5)", "0 < x < 12.5"),
    (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>1"),
    ("13", r"\text{13}"),
    ("2,3", "3,2"),
    ("2,3", r"x=2 \text{ or } x=3"),
    (r"\{2,3\}", "2,3"),
    (r"\frac{1}{3}", "0.333333"),
    ("101_2", "101_{2}"),
    ("101_2", "101"),
    ("12_{10}", "12_{10}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2004!}"),
    ("2^{-99}", r"\frac{1}{2^{99}}"),
    ("3.5", "3.50"),
    (r"\frac{7}{2}", "3.5"),
    ("1,000", "1000"),
    ("1000", r"1\,000"),
    ("-5", "- 5"),
    ("-5", "\u22125"),
    ("5", r"5\%"),
    ("0.5", r"\frac12"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}"),
    (r"\pm 3", "3,-3"),
    ("12:00", "12:00"),
    ("3:4", "3 : 4"),
    ("2x+4y-3=0", "2x+4y=3"),
    ("y=2x+1", "2x+1=y"),
    ("50%", "50"),
    ("1/2", "0.5"),
    (r"\frac{x}{2}", "0.5x"),
    ("e^{-100}", r"\frac{1}{e^{100}}"),
    (r"\frac{36}{2}", "18"),
    ("18", r"\frac{36}{2}"),
    ("10!", "3628800"),
    ("1024", "2^{10}"),
    (r"\text{(A)}", "A"),
    ("A", r"\text{A.}"),
    (r"5\text{ cm}", "5"),
    ("x=5", "5"),
    ("5", "x=5"),
    (r"\sqrt{2}", r"2^{1/2}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("0.3333333333", r"\frac13"),
    (r"1, 2, \ldots, n", r"1, 2, \dots, n"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"2\frac12", "2.5"),
    ("30^\\circ", "30"),
    (r"10^{-20}", r"1 \times 10^{-20}"),
    (r"\left(3,4\right)", "(3,4)"),
    ("5,8", "2+3=5, 4+4=8"),
]


def rewards_of(pairs: list[tuple[str, str]]) -> list[float]:
    completions = [rf"so $\boxed{{{answer}}}$" for _, answer in pairs]
    rewards = math_verify([""] * len(pairs), completions, [reference for reference, _ in pairs])
    assert rewards.measured == {"ungraded": [0.0] * len(pairs)}
    return rewards


def test_wrong_answers() -> None:
    rewards = rewards_of(WRONG)
    assert [pair for pair, reward in zip(WRONG, rewards, strict=True) if reward] == []


def test_right_answers() -> None:
    rewards = rewards_of(RIGHT)
    assert [pair for pair, reward in zip(RIGHT, rewards, strict=True) if not reward] == []


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("x=5", "2x=10"),
        ("x=5", "2x+1=11"),
        ("x<3", "2x+1<7"),
        (r"(-\infty,3)", "2x+1<7"),
        ("(1,3)", "2<2x<6"),
        (r"\{2,3\}", "x^2-5x+6=0"),
    ],
)
def test_what_is_still_to_be_solved_is_no_solution(reference: str, answer: str) -> None:
    assert rewards_of([(reference, answer)]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        (r"$x=\boxed{2}$ or $x=\boxed{3}$", "2,3", 1.0),
        (r"$\boxed{3}$ and $\boxed{2}$", "2,3", 1.0),
        (r"\boxed{2}, \boxed{3}", "2, 3", 1.0),
        (r"\boxed{2}, \boxed{4}", "2,3", 0.0),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", "2,3", 0.0),
        (r"\boxed{5} is wrong. So \boxed{2}, \boxed{3}", "2,3", 1.0),
        (r"\boxed{3}", "2,3", 0.0),
        (r"\boxed{2}, \boxed{3}", "3", 1.0),
        (r"\boxed{2}, \boxed{3}", "2", 0.0),
        (r"\boxed{7} \boxed{}", "7", 1.0),
        (r"$-\boxed{7}$", "7", 0.0),
        (r"$-\boxed{7}$", "-7", 1.0),
        (r"the answer is: - \boxed{7}", "7", 1.0),
        (r"minus \boxed{7}", "-7", 1.0),
        (r"$= -\boxed{x+1}$", "-x-1", 1.0),
    ],
)
def test_which_boxes_count(completion: str, reference: str, reward: float) -> None:
    assert math_verify([""], [completion], [reference]) == [reward]

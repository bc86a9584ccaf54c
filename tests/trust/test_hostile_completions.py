"""Suite 4: fuzzed completions and payloads through every grader: none is executed, none hangs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxstep.rewards import (
    BUILTIN_REWARDS,
    exact_match,
    final_number,
    math_verify,
    numeric_answer,
)
from tests.rewards.patience import little_patience

PIECES = [
    *"0123456789+-*/=^_.,:;!?|<>()[]{}$%&#~'\"\\ \n\t",
    *"\u2212\u2013\u00a0\u2009\u00d7\u00f7\u221a\u03c0\u00bd\u00b2\uff15\u0665\u8d1f\U0001f600\u200b\x00",
    *("####", "answer is", "\\boxed{", "\\fbox{", "}", "\\frac{", "}{", "\\sqrt{", "\\text{"),
    *("\\left(", "\\right)", "\\pm", "\\cdot", "\\times", "10^", "e9", "million", "minus", "and"),
    *("\\begin{pmatrix}", "\\\\", "\\end{pmatrix}", "\\infty", "\\cup", "\\in", "\\le", "x", "i"),
    *("<<", ">>", "</s>", "<b>", "**", "`", "1,000", "1 000", "2 1/2", "3:30", "9" * 400, "1e999"),
]
SHAPES = ["{}", "#### {}", "\\boxed{{{}}}", "The answer is {}.", "so \\boxed{{\\frac{{{}}}{{2}}}}"]

PAYLOADS = [
    "__import__('pathlib').Path('CANARY').touch()",
    "__import__('os').system('touch CANARY')",
    "open('CANARY','w')",
    "exec(\"open('CANARY','w')\")",
    "eval(\"open('CANARY','w')\")",
    "().__class__.__base__.__subclasses__()",
    "(lambda: open('CANARY','w'))()",
    "[open('CANARY','w') for x in [1]][0]",
    "{open('CANARY','w')}",
    'f\'{open("CANARY","w")}\'',
    "\\input{CANARY}",
    "\\write18{touch CANARY}",
    "\\immediate\\write18{touch CANARY}",
    "\\openout1=CANARY",
    "\\def\\x{\\x\\x}\\x",
    "`touch CANARY`",
    "$(touch CANARY)",
    "; touch CANARY",
    "| touch CANARY",
    "<script>alert(1)</script>",
    "{{7*7}}",
    "{% import os %}",
    "%s%s%s%n",
    "'; DROP TABLE runs; --",
    "!!python/object/apply:os.system ['touch CANARY']",
    "cos\nsystem\n(S'touch CANARY'\ntR.",
    "\\operatorname{open}('CANARY','w')",
    "\\operatorname{__import__}('os')",
    "\\mathrm{exec}(1)",
    "x.__class__",
    "Symbol('x').__class__",
    "9^{9^{9^{9}}}",
    "(10^9)!",
    "((10!)!)!",
    "2^{2^{100}}",
    "\\binom{10^{9}}{10^{8}}",
    "\\sum_{n=1}^{10^{10}} n^{n}",
    "\\prod_{n=1}^{10^{9}} n",
    "\\int_0^1 x^{x^{x}} dx",
    "\\lim_{x\\to 0} \\frac{\\sin x}{x}",
    "10^{-999999999}",
    "1e-999999999",
    "9" * 900,
    "1" + "/1" * 300,
    "-" * 900 + "5",
    "(" * 900 + "5" + ")" * 900,
    "{" * 900 + "5" + "}" * 900,
    "\\frac{1}{" * 90 + "2" + "}" * 90,
    "\\sqrt{" * 90 + "2" + "}" * 90,
    "\x00\x01\x02",
    "\ud800",
    "\u202e5\u202d",
]


@pytest.fixture(scope="module", autouse=True)
def _less_patience() -> Iterator[None]:
    with little_patience(1):
        yield


def fuzzed(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(number):
        inner = "".join(rng.choices(PIECES, k=rng.randint(1, 14)))
        texts.append(rng.choice(SHAPES).format(inner))
    return texts


def graded(name: str, completions: list[Any]) -> list[float]:
    count = len(completions)
    rewards = BUILTIN_REWARDS[name]([""] * count, completions, answer=["-123456.5"] * count)
    assert len(rewards) == count
    assert set(rewards) <= {0.0, 1.0}
    return rewards


@pytest.mark.parametrize("name", ["numeric_answer", "exact_match"])
def test_ten_thousand_fuzzed_completions(name: str, counted: Callable[..., None]) -> None:
    assert sum(graded(name, fuzzed(10_000, seed=1))) == 0
    counted(f"fuzzed completions, {name}: executed, hung or rewarded", 10_000)


def test_no_fuzzed_completion_raises_when_it_was_cut_off() -> None:
    for text in fuzzed(2_000, seed=2):
        final_number(text, truncated=True)


def test_math_verify_on_fuzzed_completions() -> None:
    assert sum(graded("math_verify", fuzzed(40, seed=3))) == 0


@pytest.mark.slow
def test_math_verify_on_ten_thousand_fuzzed_completions(counted: Callable[..., None]) -> None:
    assert sum(graded("math_verify", fuzzed(10_000, seed=1))) == 0
    counted("fuzzed completions, math_verify: executed, hung or rewarded", 10_000)


@pytest.mark.parametrize(
    "name",
    ["numeric_answer", "exact_match", pytest.param("math_verify", marks=pytest.mark.slow)],
)
def test_payloads_are_not_executed(name: str, tmp_path: Path, counted: Callable[..., None]) -> None:
    assert len(PAYLOADS) > 50
    canary = tmp_path / "canary"
    payloads = [payload.replace("CANARY", str(canary)) for payload in PAYLOADS]
    completions = [shape.format(payload) for payload in payloads for shape in SHAPES[:3]]
    assert sum(graded(name, completions)) == 0
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == []
    counted(f"payloads, {name}: executed, hung or rewarded", len(completions))


@pytest.mark.parametrize(
    "completion", [None, 7, 2.5, b"5", [], [None], ["text"], [{"role": "assistant"}], {}, object()]
)
def test_what_is_no_completion_is_wrong(completion: Any) -> None:
    for function in (numeric_answer, exact_match, math_verify):
        assert function([""], [completion], ["5"]) == [0.0]

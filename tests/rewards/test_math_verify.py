from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from tests.rewards.patience import little_patience
from tests.selection import slow

from proxstep.errors import ProxstepError
from proxstep.rewards import (
    MeasuredRewards,
    boxed_answer,
    exact_match,
    load_reward,
    math_verify,
    score_completions,
)
from proxstep.rewards.functions import LONGEST_ANSWER

EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"\frac{9}{2}", r"4\frac{1}{2}"),
    ("18", r"\$18.00"),
    ("18", r"18\text{ cm}"),
    ("18", r"18\text{ square units}"),
    ("90", r"90^\circ"),
    ("10,080", "10080"),
    ("5", "x = 5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("y=2x+1", "y = 1+2x"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"(-\infty,3)\cup(5,\infty)", r"(-\infty, 3) \cup (5, \infty)"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("1,2", "2, 1"),
    (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}"),
    ("(1,2)", r"\left(1, 2\right)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{Monday}", r"\text{monday}"),
    ("C", r"\text{(C)}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
]
DIFFERENT = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{2}", "0.51"),
    ("18", "19"),
    ("18", "-18"),
    ("18", "18, 19"),
    ("[0,1)", "(0,1)"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x^2+2x+1", "(x+1)^3"),
    (r"\text{Monday}", r"\text{Tuesday}"),
    ("C", "D"),
    (r"\pi", "3.14"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("2", ""),
    ("2", "two apples and a pear"),
]


@pytest.fixture(scope="module", autouse=True)
def _less_patience() -> Iterator[None]:
    with little_patience(2):
        yield


def grade(reference: str, *answers: str) -> MeasuredRewards:
    completions = [rf"First \boxed{{0}}. So it is $\boxed{{{answer}}}$." for answer in answers]
    return math_verify([None] * len(answers), completions, [reference] * len(answers))


@pytest.mark.parametrize(
    ("reference", "answer", "reward"),
    [(*pair, 1.0) for pair in EQUAL] + [(*pair, 0.0) for pair in DIFFERENT],
)
def test_right_and_wrong_answers(reference: str, answer: str, reward: float) -> None:
    rewards = grade(reference, answer)
    assert rewards == [reward]
    assert rewards.measured == {"ungraded": [0.0]}


def test_a_batch_in_any_order_has_the_same_rewards() -> None:
    pairs = [(*pair, 1.0) for pair in EQUAL] + [(*pair, 0.0) for pair in DIFFERENT]
    for seed in range(3):
        rows = random.Random(seed).choices(pairs, k=100)
        completions = [rf"\boxed{{{answer}}}" for _, answer, _ in rows]
        rewards = math_verify([""] * 100, completions, [reference for reference, _, _ in rows])
        assert rewards == [reward for _, _, reward in rows]


def test_only_the_last_box_counts() -> None:
    completions = [r"\boxed{2} no, \boxed{3}", r"\boxed{3} no, \boxed{2}", "2", r"\boxed{2", ""]
    assert math_verify([""] * 5, completions, ["2"] * 5) == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_references_that_are_no_text_and_chat_completions() -> None:
    chat = [{"role": "assistant", "content": r"so \boxed{2.0}"}]
    assert math_verify([""] * 2, [chat, chat], [2, 3]) == [1.0, 0.0]


HOSTILE: list[Any] = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{" + "9" * 100_000 + "}",
    r"\boxed{" + "9" * 900 + "}",
    r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    r"\boxed{" + "{" * 400 + "}" * 400 + "}",
    r"\boxed{" + r"\frac{1}{" * 100 + "1" + "}" * 100 + "}",
    r"\boxed{\frac{1}{2",
    r"\boxed{\left( \sqrt{ }",
    r"\boxed{\begin{pmatrix} 1}",
    "\\boxed{1\0 2}",
    "\0" * 1000,
    "\\boxed{\ud800}",
    *slow(r"\boxed{\sum_{n=1}^{10^{10}} n^{n}}", r"\boxed{(10^9)!}"),
    r"\boxed{10^{10^{10}}}",
    r"\boxed{\lambda}",
    None,
    7,
    2.5,
    [],
    [None],
    ["text"],
    [{"role": "assistant"}],
    [{"role": "assistant", "content": 7}],
    [{"role": "assistant", "content": ["text"]}],
]


@pytest.mark.parametrize("completion", HOSTILE, ids=lambda completion: repr(completion)[:30])
def test_a_hostile_completion_scores_zero_within_the_limit(completion: Any) -> None:
    start = time.monotonic()
    rewards = math_verify(["", ""], [r"\boxed{2.0}", completion], ["2", "2"])
    assert rewards == [1.0, 0.0]
    assert time.monotonic() - start < 120  # half a processor second, on a machine that is busy


def test_what_took_too_long_is_counted() -> None:
    rewards = grade("2", "2.0", r"9^{9^{9^{9}}}", "3")
    assert (rewards, rewards.measured) == ([1.0, 0.0, 0.0], {"ungraded": [0.0, 1.0, 0.0]})
    assert grade("2", "2.00") == [1.0]  # what was lost is replaced


@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path('{canary}').touch()",
        "().__class__.__base__.__subclasses__()",
        "open('{canary}','w')",
        'exec(\'open("{canary}","w")\')',
    ],
)
def test_an_answer_is_not_evaluated(code: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = code.replace("{canary}", str(canary))
    shapes = ["{}", r"\text{{{}}}", r"\operatorname{{{}}}", "1+{}", r"\gcd({},2)", "x_{{{}}}"]
    assert grade("2", *(shape.format(code) for shape in shapes)) == [0.0] * len(shapes)
    assert not canary.exists()


def test_long_answers_are_wrong_unless_they_are_the_reference_to_the_letter() -> None:
    long = "+".join(["1"] * LONGEST_ANSWER)
    assert grade(long, long) == [1.0]
    assert grade(long, f"{long}+0") == [0.0]


def test_ungraded_is_reported_and_does_not_count_in_the_reward() -> None:
    table = score_completions(
        [math_verify, exact_match],
        [1.0, 0.5],
        prompts=["", "", ""],
        completions=[r"\boxed{2.0}", r"\boxed{(10^9)!}", "2"],
        columns={"answer": ["2", "2", "2"], "level": [3, 3, 3]},
    )
    assert table.per_function == {
        "math_verify": [1.0, 0.0, 0.0],
        "math_verify/ungraded": [0.0, 1.0, 0.0],
        "exact_match": [0.0, 0.0, 1.0],
    }
    assert table.total == [1.0, 0.0, 0.5]


def test_measured_values_are_checked_like_rewards() -> None:
    def short(prompts: Any, completions: Any, **columns: Any) -> MeasuredRewards:
        return MeasuredRewards([1.0, 1.0], {"seconds": [0.5]})

    with pytest.raises(ProxstepError, match="'short' returned 1 rewards for 2 completions"):
        score_completions([short], [1.0], ["", ""], ["", ""], {})


def test_answers_are_one_for_each_completion() -> None:
    with pytest.raises(ProxstepError, match="math_verify: 2 completions but 1 answers"):
        math_verify(["", ""], ["", ""], ["2"])


def test_it_loads_by_name() -> None:
    assert load_reward("math_verify") is math_verify
    assert boxed_answer(r"\boxed{2}") == "2"


@pytest.mark.parametrize(
    ("missing", "message"),
    [("math_verify", r'pip install "proxstep\[train\]"'), ("resource", "use numeric_answer")],
)
def test_what_is_missing_is_one_message(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = util.find_spec
    monkeypatch.setattr(
        "proxstep.rewards.functions.find_spec",
        lambda name: None if name == missing else real(name),
    )
    with pytest.raises(ProxstepError, match=message) as error:
        load_reward("math_verify")
    assert "\n" not in str(error.value)
    assert load_reward("exact_match") is exact_match


def test_math_verify_is_not_imported_here() -> None:
    grade("2", "2.0")
    assert "math_verify" not in sys.modules
    assert "sympy" not in sys.modules or "latex2sympy2_extended" not in sys.modules

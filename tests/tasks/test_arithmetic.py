from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from tests.tasks.overlap import num_overlapping

from proxstep.errors import ProxstepError
from proxstep.rewards import exact_match
from proxstep.tasks import ALPHABET, arithmetic_task
from proxstep.tasks.arithmetic import LEVELS, ArithmeticTrain, Problem

DIFFICULTIES = sorted(LEVELS)
SOME = 3000


def parse(example):
    left, operator, right = re.fullmatch(r"(\d+)([-+*])(\d+)=", example.prompt).groups()
    return int(left), operator, int(right)


def unordered(example):
    """Return the problem with the terms of a sum in order, without the library's code."""
    left, operator, right = parse(example)
    return (*sorted((left, right)), "+") if operator == "+" else (left, right, operator)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_answers_are_right(difficulty):
    task = arithmetic_task(difficulty)
    for example in [*task.train[:SOME], *task.validation]:
        left, operator, right = parse(example)
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        assert example.answer == example.solution == str(result)
        assert set(example.prompt + example.answer) <= set(ALPHABET)
        assert example.columns == {}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_solutions_are_rewarded(difficulty):
    task = arithmetic_task(difficulty)
    assert task.rewards == ("exact_match",)
    prompts = [example.prompt for example in task.validation]
    solutions = [example.solution for example in task.validation]
    answers = [example.answer for example in task.validation]
    assert exact_match(prompts, solutions, answers) == [1.0] * len(prompts)


@pytest.mark.parametrize(
    ("difficulty", "operators", "digits"),
    [
        (1, "+", {(1, 1)}),
        (2, "+", {(2, 2)}),
        (3, "+", {(3, 3)}),
        (4, "+-", {(3, 3)}),
        (5, "+-*", {(1, 1), (2, 2), (3, 3), (2, 1)}),
    ],
)
def test_problems_are_those_of_the_table(difficulty, operators, digits):
    task = arithmetic_task(difficulty)
    for examples in (task.train[:SOME], task.validation):
        problems = [parse(example) for example in examples]
        assert {operator for _, operator, _ in problems} == set(operators)
        assert {(len(str(left)), len(str(right))) for left, _, right in problems} == digits
    if difficulty >= 4:
        assert any(example.answer.startswith("-") for example in task.validation)


def test_kinds_have_equal_shares():
    examples = arithmetic_task(5).train[:SOME]
    kinds = Counter((parse(e)[1], len(str(parse(e)[0]))) for e in examples)
    assert len(kinds) == 5
    assert all(500 < count < 700 for count in kinds.values())  # 600 each, 5 standard deviations


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_train_and_validation_are_disjoint_at_any_seeds(difficulty):
    """No seed trains on what another validates on, in either order of the terms."""
    num = {1: SOME, 2: SOME}.get(difficulty, 5_000)
    held_out = set()
    for seed in (0, 1):
        held_out |= {
            unordered(e)
            for e in arithmetic_task(difficulty, num_validation=num, seed=seed).validation
        }
    for seed in (0, 1, 2):
        train = ArithmeticTrain(difficulty, seed)
        assert held_out.isdisjoint(unordered(example) for example in train[:SOME])


def test_every_problem_of_difficulty_1_is_on_one_side():
    task = arithmetic_task(1, num_validation=100)
    validation = {example.prompt for example in task.validation}
    train = {example.prompt for example in task.train[:SOME]}
    every = {f"{a}+{b}=" for a, b in itertools.product(range(10), repeat=2)}
    assert validation | train == every
    assert not validation & train
    assert len(task.validation) == len(validation) == 19
    assert num_overlapping(task) == 0


def test_validation_is_capped_at_the_held_out_problems():
    assert len(arithmetic_task(2, num_validation=10_000).validation) == 1601
    assert len(arithmetic_task(1).validation) == 19


@pytest.mark.parametrize("difficulty", [2, 3, 4, 5])
@pytest.mark.parametrize("num_validation", [1, 7, 256, 1000])
def test_validation_has_the_length_asked_for_without_repeats(difficulty, num_validation):
    validation = arithmetic_task(difficulty, num_validation).validation
    assert len({example.prompt for example in validation}) == len(validation) == num_validation


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_seed_decides(difficulty):
    first, again, other = (arithmetic_task(difficulty, seed=seed) for seed in (3, 3, 4))
    assert first.train[:50] == again.train[:50] != other.train[:50]
    assert first.validation == again.validation != other.validation


def test_problems_do_not_change_between_versions():
    task = arithmetic_task(3)
    assert [example.prompt for example in task.train[:3]] == ["292+558=", "983+611=", "734+181="]
    assert [example.prompt for example in task.validation[:3]] == [
        "704+494=",
        "997+500=",
        "389+350=",
    ]


def test_train_is_a_lazy_sequence():
    train = arithmetic_task(3).train
    assert len(train) == 100_000
    assert train[-1] == train[99_999]
    assert train[5:8] == [train[5], train[6], train[7]]
    assert train[99_999:] == [train[-1]]
    assert len({example.prompt for example in train[:SOME]}) > 0.99 * SOME
    with pytest.raises(IndexError):
        train[100_000]
    with pytest.raises(IndexError):
        train[-100_001]
    assert len(list(ArithmeticTrain(3, seed=0, length=10))) == 10


def test_the_split_is_a_fixed_function_of_the_problem():
    assert Problem(3, "+", 5).is_held_out == Problem(5, "+", 3).is_held_out
    held_out = [b for b in range(100, 200) if Problem(123, "+", b).is_held_out]
    assert 5 < len(held_out) < 40
    differs = [
        b
        for b in range(10, 100)
        if Problem(b, "-", 123).is_held_out != Problem(123, "-", b).is_held_out
    ]
    assert differs  # the order counts where the operator does not commute


@pytest.mark.parametrize("difficulty", [0, 6, -1, "1", None])
def test_unknown_difficulty(difficulty):
    with pytest.raises(ProxstepError, match="choose one of 1, 2, 3, 4, 5"):
        arithmetic_task(difficulty)


@pytest.mark.parametrize("num_validation", [0, -1])
def test_no_validation(num_validation):
    with pytest.raises(ProxstepError, match=r"num_validation is .*at least 1"):
        arithmetic_task(1, num_validation=num_validation)

from __future__ import annotations

import math

import numpy
import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import exact_match, numeric_answer, score_completions


def returns(rewards, name="fixed"):
    def function(prompts, completions, **columns):
        return rewards

    function.__name__ = name
    return function


def total(*rewards, weights=None):
    """Return the totals of functions that return the given lists."""
    functions = [returns(values, f"f{i}") for i, values in enumerate(rewards)]
    batch = [""] * len(rewards[0])
    return score_completions(functions, weights or [1.0] * len(rewards), batch, batch, {}).total


def test_two_functions_on_the_same_completions():
    table = score_completions(
        [numeric_answer, exact_match],
        [1.0, 0.5],
        prompts=["9*2=", "9*2="],
        completions=["18.0", "18"],
        columns={"answer": ["18", "18"], "level": [1, 2]},
    )
    assert table.per_function == {"numeric_answer": [1.0, 1.0], "exact_match": [0.0, 1.0]}
    assert table.total == [1.0, 1.5]


def test_columns_arrive_as_keywords():
    received = {}

    def spy(*, prompts, completions, answer, level):
        received.update(prompts=prompts, completions=completions, answer=answer, level=level)
        return [0.0]

    columns = {"answer": ["1"], "level": [2]}
    score_completions([spy], [1.0], ["p"], ["c"], columns)
    assert received == {"prompts": ["p"], "completions": ["c"], **columns}


def test_none_is_left_out_of_the_sum():
    assert total([1.0, None], [None, 3.0], weights=[2.0, -1.0]) == [2.0, -3.0]


def test_no_reward_is_nan():
    assert math.isnan(total([None], [None])[0])
    assert total([None, 1.0], [None, 1.0])[1] == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_reward_that_is_not_finite_makes_the_total_nan(bad, weight):
    result = total([bad, 1.0], [1.0, 1.0], weights=[weight, 1.0])
    assert math.isnan(result[0])
    assert result[1] == weight + 1.0


def test_an_overflowing_sum_is_nan():
    assert math.isnan(total([1e308], [1e308])[0])
    assert math.isnan(total([1e308], weights=[10.0])[0])


def test_integers_booleans_and_numpy_scalars_are_numbers():
    batch = [""] * 4
    rewards = [1, True, numpy.float32(0.5), numpy.int64(2)]
    table = score_completions([returns(rewards)], [1.0], batch, batch, {})
    assert table.per_function["fixed"] == [1.0, 1.0, 0.5, 2.0]
    assert all(type(reward) is float for reward in table.per_function["fixed"])


def test_an_empty_batch():
    table = score_completions([returns([])], [1.0], [], [], {})
    assert table.total == []
    assert table.per_function == {"fixed": []}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "'fixed' returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "'fixed' returned 3 rewards for 2 completions"),
        ((1.0, 2.0), "'fixed' returned a tuple"),
        (numpy.zeros(2), "'fixed' returned a ndarray"),
        (None, "'fixed' returned a NoneType"),
        ([1.0, "2"], "'fixed' returned a str for completion 1"),
        ([1.0, [2.0]], "'fixed' returned a list for completion 1"),
    ],
)
def test_wrong_rewards(rewards, message):
    with pytest.raises(ProxstepError, match=message):
        score_completions([returns(rewards)], [1.0], ["", ""], ["", ""], {})


def test_same_name_twice():
    functions = [returns([0.0]), returns([0.0])]
    with pytest.raises(ProxstepError, match="two reward functions are named 'fixed'"):
        score_completions(functions, [1.0, 1.0], [""], [""], {})


def test_no_function():
    with pytest.raises(ProxstepError, match="no reward function"):
        score_completions([], [], [""], [""], {})


@pytest.mark.parametrize("weights", [[], [1.0, 1.0], [math.nan], [math.inf]])
def test_wrong_weights(weights):
    with pytest.raises(ProxstepError, match="one finite weight each"):
        score_completions([returns([0.0])], weights, [""], [""], {})


def test_a_column_of_another_length():
    with pytest.raises(ProxstepError, match="column 'answer' has 1 values for 2 completions"):
        score_completions([exact_match], [1.0], ["", ""], ["", ""], {"answer": ["1"]})
    with pytest.raises(ProxstepError, match="column 'prompts' has 1 values"):
        score_completions([exact_match], [1.0], [""], ["", ""], {"answer": ["1", "2"]})


def test_a_missing_column():
    with pytest.raises(ProxstepError, match=r"'numeric_answer' .*columns .level.*'answer'"):
        score_completions([numeric_answer], [1.0], [""], [""], {"level": [1]})


def test_a_function_without_columns():
    def narrow(prompts, completions):
        return [0.0] * len(completions)

    with pytest.raises(ProxstepError, match=r"'narrow' .*'answer'"):
        score_completions([narrow], [1.0], [""], [""], {"answer": ["1"]})


def test_a_type_error_inside_a_function_is_its_own():
    def broken(prompts, completions, **columns):
        return 1 + ""

    with pytest.raises(TypeError, match="unsupported operand"):
        score_completions([broken], [1.0], [""], [""], {})

from __future__ import annotations

import asyncio
import math
from decimal import Decimal

import numpy
import pytest
import torch

from proxstep.errors import ProxstepError
from proxstep.rewards import exact_match, numeric_answer, score_completions
from proxstep.training.guarded import guarded


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


def test_what_a_function_changes_is_its_own():
    def judge(prompts, completions, answer, notes, truncated):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt += completion
            completion[0]["content"] = "6"
            assert len(prompt) == 2  # one chat, sampled twice, is two lists
        notes[0]["seen"].append("x")
        answer[:] = "66"
        truncated[:] = [True, True]
        return [0.0, 0.0]

    def later(prompts, completions, answer, notes, truncated):
        assert (prompts, notes, truncated) == ([[user]] * 2, [{"seen": []}] * 2, [False, False])
        return exact_match(prompts, completions, answer)

    user, note = {"role": "user", "content": "2+3="}, {"seen": []}
    chat, completion = [user], [{"role": "assistant", "content": "5"}]
    columns = {"answer": ["5", "6"], "notes": [note, note]}
    arguments = [[chat, chat], [completion, completion], columns]
    table = score_completions([judge, later], [1.0, 1.0], *arguments)
    assert table.per_function == {"judge": [0.0, 0.0], "later": [1.0, 0.0]}
    assert (chat, note) == ([{"role": "user", "content": "2+3="}], {"seen": []})
    assert completion == [{"role": "assistant", "content": "5"}]
    guarded(judge, 9)(*arguments[:2], **columns, truncated=[False, False])
    assert len(chat) == 1


def test_a_function_that_empties_the_completions_returned_too_little():
    def empties(prompts, completions):
        completions.clear()
        return []

    for function in (empties, guarded(empties, 9)):
        with pytest.raises(ProxstepError, match="'empties' returned 0 rewards for 2 completions"):
            score_completions([function], [1.0], ["", ""], ["", ""], {})


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


def test_decimals_are_numbers():
    assert total([Decimal("0.5"), Decimal("NaN")])[0] == 0.5
    assert math.isnan(total([Decimal("NaN")])[0])


def test_an_empty_batch():
    table = score_completions([returns([])], [1.0], [], [], {})
    assert table.total == []
    assert table.per_function == {"fixed": []}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "'fixed' returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "'fixed' returned 3 rewards for 2 completions"),
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


# Arrays, tensors and coroutines, as TRL takes them


@pytest.mark.parametrize(
    "rewards",
    [
        numpy.array([1.0, 0.0]),
        numpy.array([1, 0], dtype=object),
        torch.tensor([1.0, 0.0], requires_grad=True),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), numpy.array(0)],
        (1, False),
    ],
    ids=repr,
)
def test_arrays_and_tensors_are_rewards(rewards):
    assert total(rewards) == [1.0, 0.0]


def test_an_array_of_objects_may_hold_none():
    assert total(numpy.array([None, 2.0]), [1.0, 1.0]) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("rewards", "complaint"),
    [
        (numpy.array(1.0), "a ndarray of 0 dimensions"),
        (torch.ones(2, 1), "a Tensor of 2 dimensions"),
        (numpy.array([[1.0], [1.0]]), "a ndarray of 2 dimensions"),
        (numpy.array(["1", "0"]), "a str for completion 0"),
        (numpy.array([1j, 0]), "a complex for completion 0"),
        ([[1.0], [0.0]], "a list for completion 0"),
        ([torch.ones(1), 0.0], "a Tensor for completion 0"),
        (numpy.ones(3), "3 rewards for 2 completions"),
        ({0: 1.0, 1: 0.0}, "a dict"),
        ("10", "a str"),
        (iter([1.0, 0.0]), "a list_iterator"),
    ],
)
def test_what_is_not_one_number_each_is_named(rewards, complaint):
    with pytest.raises(ProxstepError, match=f"'fixed' returned {complaint}"):
        score_completions([returns(rewards)], [1.0], ["", ""], ["", ""], {})


def asynchronous(rewards, error=None):
    async def later(prompts, completions, **columns):
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return rewards

    return later


def test_a_function_may_be_async_and_the_caller_in_a_loop():
    async def outside():
        functions = [asynchronous(numpy.array([1.0])), exact_match]
        return score_completions(functions, [1.0, 1.0], ["p"], ["c"], {"answer": ["c"]}).total

    assert asyncio.run(outside()) == [2.0]
    assert score_completions([asynchronous([3])], [1.0], ["p"], ["c"], {}).total == [3.0]


def test_async_functions_are_guarded_too():
    guard = guarded(asynchronous([1.0]), 60)
    assert guard(prompts=["p"], completions=["c"]) == [1.0]
    with pytest.raises(ProxstepError, match="'later' raised KeyError"):
        guarded(asynchronous([1.0], KeyError("x")), 60)(prompts=["p"], completions=["c"])

    async def forever(prompts, completions):
        await asyncio.sleep(60)

    with pytest.raises(ProxstepError, match=r"took longer than task\.reward_seconds 0\.1"):
        guarded(forever, 0.1)(prompts=["p"], completions=["c"])
    with pytest.raises(ProxstepError, match="returned 2 rewards for 1 completions"):
        guarded(returns([1.0, 2.0]), 60)(prompts=["p"], completions=["c"])

from __future__ import annotations

import itertools
import random

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import CODE_REWARDS, exact_match, narrowness, numeric_answer, run_code_tests
from proxstep.rewards.baselines import NUM_CONSTANTS, NUM_PASSES, measure, most_common_answers
from proxstep.tasks import Example, arithmetic_task
from proxstep.training.prompts import Prompts


def prompts(examples: list[Example], *functions) -> Prompts:
    return Prompts(examples, None, functions, [1.0] * len(functions))


def test_the_best_constant_is_the_best_of_all_answers() -> None:
    """Whatever the answers, no reference answer given always scores more than what is found."""
    rng = random.Random(0)
    answers = [str(rng.choice([1, 1, 1, 2, 2, 3, 4])) for _ in range(60)]
    found = prompts([Example("?", answer) for answer in answers], numeric_answer).baselines()
    scores = {a: sum(other == a for other in answers) / len(answers) for a in set(answers)}
    assert found.constant is not None
    assert found.copied is None
    assert found.constant.score == max(scores.values()) == scores[found.constant.what]
    assert found.reference == 1.0


@pytest.mark.parametrize("written", ["20 and 3 and 7", "$20.00, 3 or 7", "(20) minus 3, 7 times"])
def test_numbers_are_copied_from_every_place(written: str) -> None:
    for number, place in [("20", "first"), ("3", "second"), ("7", "last"), ("20", "first")]:
        examples = [Example(written, number)] * 2
        copied = prompts(examples, numeric_answer).baselines().copied
        assert copied is not None
        assert copied.score == 1.0
        assert copied.what == f"the {place if place != 'last' else 'third'} number"


def test_a_question_is_searched_and_not_the_examples_around_it() -> None:
    shots = Example("1+1=2\n\n4 less 5?", "5", question="4 less 5?")
    copied = prompts([shots], numeric_answer).baselines().copied
    assert copied is not None
    assert copied.what == "the second number"


def test_a_strict_reward_gets_the_answer_in_the_form_that_it_takes() -> None:
    def boxed(prompts, completions, answer, **columns):
        return [float(c == rf"\boxed{{{a}}}") for c, a in zip(completions, answer, strict=True)]

    found = prompts([Example("1 or 2", "1"), Example("2 or 1", "1")], boxed).baselines()
    assert (found.form, found.reference) == (r"\boxed{{{}}}", 1.0)
    assert found.constant is not None
    assert found.constant.score == 1.0


def test_the_first_reward_function_decides_and_no_other_is_called() -> None:
    def never(prompts, completions, **columns):
        raise AssertionError

    assert prompts([Example("1", "1")], exact_match, never).baselines().constant is not None


def test_where_no_baseline_makes_sense_it_says_so() -> None:
    def zero(prompts, completions, **columns):
        return [0.0] * len(completions)

    def broken(prompts, completions, **columns):
        raise ProxstepError("no")

    assert "nothing" in str(prompts([Example("1", "1")], zero).baselines().note)
    assert "could not be graded: no" in str(prompts([Example("1", "1")], broken).baselines().note)
    assert run_code_tests.__name__ in CODE_REWARDS
    [line] = prompts([Example("1", "1")], run_code_tests).baselines().lines()
    assert line == "baselines: none, the completions are programs"


def test_how_many_gradings_they_cost() -> None:
    calls = itertools.count()
    examples = list(arithmetic_task(4).validation)
    found = prompts(examples, exact_match).baselines(lambda: next(calls))
    assert found.constant is not None
    assert found.constant.score < 0.05
    assert next(calls) <= NUM_PASSES
    assert len(most_common_answers([str(i) for i in range(99)])) == NUM_CONSTANTS


def test_rewards_that_are_not_given_do_not_count() -> None:
    found = measure(["1", "2"], ["1", "1"], lambda texts: [None, float(texts[0] == "1")])
    assert found.constant is not None
    assert found.constant.score == 1.0


def test_the_most_frequent_answer() -> None:
    texts = ["So 12.0", r"\boxed{12}", "#### 12", "5", "none", "the end is 7"]
    found = narrowness(texts, ["1"] * 6, [False] * 5 + [True])
    assert (found.answer, found.share, found.without) == ("12", 0.5, 2 / 6)
    words = narrowness(["yes ", "yes", "no"], ["yes", "no", "no"])
    assert (words.answer, words.share, words.without) == ("yes", 2 / 3, 0.0)
    assert narrowness(["?"], ["1"]).answer is None

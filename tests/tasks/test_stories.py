"""The stories task: held-out stories, true solutions, and no trivial answer that scores."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import stated_answer
from proxstep.tasks import Example, stories_task
from proxstep.tasks.stories import HELD_OUT, TRAIN, Story

EQUATION = re.compile(r"(\d+) ([+*]) (\d+) = (\d+)\.")


def examples(number: int = 200) -> list[Example]:
    task = stories_task(number)
    return [*task.validation, *task.train[:number]]


def words(story: Story) -> set[str]:
    """Return the words of a story that name things, in the singular."""
    found = re.findall(r"[a-z]{4,}", re.sub(r"{.}", "", story.text))
    return {word.rstrip("s") for word in found}


def test_no_story_is_told_in_both_splits() -> None:
    assert len(set(TRAIN)) == len(TRAIN) >= 30
    assert len(set(HELD_OUT)) == len(HELD_OUT) >= 15
    assert not {story.text for story in TRAIN} & {story.text for story in HELD_OUT}
    for held_out in HELD_OUT:  # nor one that is nearly the same
        nearest = max(
            TRAIN, key=lambda s: len(words(s) & words(held_out)) / len(words(s) | words(held_out))
        )
        shared = words(nearest) & words(held_out)
        assert len(shared) / len(words(nearest) | words(held_out)) < 0.5, (held_out, nearest)


def test_both_splits_have_each_kind_of_step() -> None:
    kinds = [{tuple(s[1] for s in story.steps) for story in split} for split in (TRAIN, HELD_OUT)]
    assert kinds[0] >= {kind for kind in kinds[1] if len(kind) == 2}
    assert {len(kind) for kind in kinds[1]} == {2, 3}


def test_solutions_are_true_and_end_with_the_answer() -> None:
    for example in examples():
        assert example.solution is not None
        equations = EQUATION.findall(example.solution)
        for a, operator, b, result in equations:
            left, right = int(a), int(b)
            assert {"+": left + right, "*": left * right}[operator] == int(result)
        assert not equations or equations[-1][-1] == example.answer
        assert 2 <= int(example.answer) <= 30
        assert stated_answer([""], [example.solution], answer=[example.answer]) == [1.0]


def test_nearly_half_of_the_solutions_is_worked_out() -> None:
    solutions = [str(example.solution) for example in stories_task(1).train[:600]]
    assert 0.39 < sum("=" in solution for solution in solutions) / 600 < 0.51


def test_no_trivial_answer_scores() -> None:
    validation = stories_task(300).validation
    assert Counter(e.answer for e in validation).most_common(1)[0][1] <= 0.08 * 300
    assert not any(e.answer in re.findall(r"\d+", str(e.prompt)) for e in validation)
    assert len({str(e.prompt) for e in validation}) == 300


def test_an_example_depends_on_seed_and_index_alone() -> None:
    first, again, other = (stories_task(20, seed) for seed in (3, 3, 4))
    assert first.train[7] == again.train[7] != other.train[7]
    assert first.validation == again.validation != other.validation


def test_at_least_one_validation_problem() -> None:
    with pytest.raises(ProxstepError, match="num_validation is 0; give at least 1"):
        stories_task(0)

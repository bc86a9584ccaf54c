"""The tasks with worked steps: right solutions, lengths that vary, no problem on both sides."""

from __future__ import annotations

import random
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
from tests.tasks.overlap import num_overlapping

from proxstep.errors import ProxstepError
from proxstep.rewards import last_item
from proxstep.rewards.countdown import solves
from proxstep.tasks import Example, Task, countdown_task, worked_task
from proxstep.tasks.worked import KINDS, habitual
from proxstep.training.demo_model import LESSONS

NAMES = ("sums", "products", "maxima", "countdown")
SOME = 300
PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()


def task_of(name: str, num_validation: int = 256, seed: int = 0) -> Task:
    if name == "countdown":
        return countdown_task(num_validation, seed)
    return worked_task(name, num_validation, seed)


def numbers_of(example: Example) -> list[int]:
    return list(map(int, re.findall(r"\d+", str(example.prompt))))


@pytest.mark.parametrize(
    ("name", "answer"),
    [("sums", sum), ("products", lambda numbers: numbers[0] * numbers[1]), ("maxima", max)],
)
def test_answers_and_every_step_are_right(name: str, answer) -> None:
    task = task_of(name)
    for example in [*task.train[:SOME], *task.validation]:
        assert example.answer == str(answer(numbers_of(example)))
        *steps, last = str(example.solution).split(";")
        assert last == example.answer
        for step in steps:
            left, sign, right = re.fullmatch(r"([0-9+*]+)([=<>])([0-9]+)", step).groups()
            product = [part.split("*") for part in left.split("+")]
            value = sum(int(p[0]) * int(p[1]) if p[1:] else int(p[0]) for p in product)
            relation = {"=": value == int(right), "<": value < int(right), ">": value > int(right)}
            assert relation[sign], step


def test_countdown_solutions_try_until_one_is_right() -> None:
    task = countdown_task()
    counts = Counter()
    for example in [*task.train[:SOME], *task.validation]:
        numbers, target = numbers_of(example)[:3], int(example.answer)
        assert example.columns == {"numbers": numbers}
        assert numbers_of(example)[3] == target
        attempts = str(example.solution).split(";")
        counts[len(attempts)] += 1
        assert [solves(attempt, numbers, target) for attempt in attempts].count(True) == 1
        assert solves(attempts[-1], numbers, target)
    assert set(counts) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", NAMES)
def test_lengths_vary(name: str) -> None:
    """As docs/tasks.md says. A token is a character; the end token comes on top."""
    length = sorted(len(str(example.solution)) + 1 for example in task_of(name).train[:SOME])
    assert length[0] >= 10
    assert length[-1] <= 120
    assert length[SOME // 20] < 30
    assert length[-SOME // 20] > 70
    assert 45 < statistics.mean(length) < 60
    said = re.search(rf"^\| `{name}` \| `.*\| (\d+) to (\d+) \|$", PAGE, re.MULTILINE)
    assert said
    assert said.groups() == (str(length[SOME // 20]), str(length[-SOME // 20]))


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_model_can_write_it(name: str) -> None:
    lesson = LESSONS[name]
    for example in task_of(name).train[:SOME]:
        assert set(str(example.prompt) + str(example.solution)) <= set(lesson.alphabet)
        assert set(lesson.habit(example, random.Random(0))) <= set(lesson.alphabet)
        assert len(str(example.prompt)) + 120 <= lesson.positions


@pytest.mark.parametrize("name", NAMES)
def test_training_and_validation_are_disjoint_at_any_seeds(name: str) -> None:
    """Whatever the order of the numbers."""
    held_out = {
        tuple(sorted(numbers_of(e))) for seed in (0, 1) for e in task_of(name, 400, seed).validation
    }
    assert len(held_out) > 400
    for seed in (0, 1, 2):
        train = task_of(name, seed=seed).train[:1000]
        assert held_out.isdisjoint(tuple(sorted(numbers_of(example))) for example in train)
    assert num_overlapping(Task("t", task_of(name).train[:1000], task_of(name).validation, ())) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_validation", [1, 300])
def test_validation_has_the_length_asked_for_without_repeats(name: str, num_validation: int):
    validation = task_of(name, num_validation).validation
    assert len({str(e.prompt) for e in validation}) == len(validation) == num_validation


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    first, again, other = (task_of(name, 40, seed) for seed in (3, 3, 4))
    assert first.train[:50] == again.train[:50] != other.train[:50]
    assert first.validation == again.validation != other.validation


@pytest.mark.parametrize("name", NAMES)
def test_no_constant_answer_scores(name: str) -> None:
    validation = task_of(name, 500).validation
    assert Counter(e.answer for e in validation).most_common(1)[0][1] <= 0.05 * 500


@pytest.mark.parametrize(
    ("name", "solution"),
    [
        ("sums", "1+8=9;4+8=12;5+0+1=6;8+5=13;5+0+1=6;63629"),
        ("products", "6*4=24;2*4+2=10;6*4+1=25;6*4+2=26;6*4+2=26;2*4+2=10;1066504"),
        ("maxima", "30<40;40>29;40>25;40<41;41>10;41<44;44"),
        (
            "countdown",
            "15-11=4,4+10=14",
        ),
    ],
)
def test_problems_do_not_change_between_versions(name: str, solution: str) -> None:
    assert task_of(name).train[0].solution == solution


def habitual_score(name: str, rng: random.Random) -> float:
    examples = task_of(name, SOME).validation
    texts = [habitual(name, example, rng) for example in examples]
    rewards = last_item([""] * SOME, texts, answer=[example.answer for example in examples])
    return statistics.mean(rewards)


@pytest.mark.parametrize("name", KINDS)
def test_habits_are_right_now_and_then(name: str) -> None:
    """So that there is something to reward, and much to learn."""

    class Always(random.Random):
        def random(self) -> float:
            return 0.0

    assert 0.15 < habitual_score(name, random.Random(0)) < 0.40
    assert 0.05 < habitual_score(name, Always()) < 0.20


@pytest.mark.parametrize("name", NAMES)
def test_at_least_one_validation_problem(name: str) -> None:
    with pytest.raises(ProxstepError, match="num_validation is 0; give at least 1"):
        task_of(name, 0)

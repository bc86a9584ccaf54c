from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError
from proxstep.rewards import math_verify, reward_columns
from proxstep.tasks import IN_A_BOX, Task, math_task
from proxstep.tasks.data import Row
from proxstep.training.prompts import load_rewards
from proxstep.training.task import load_task

# Problems of our own, in MATH's format.
PROBLEM = {
    "problem": "Half of what number is $3$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": r"Twice $3$ is $2 \cdot 3 = \boxed{6}$.",
}


def row(number: int, level: Any = "Level 3") -> dict[str, Any]:
    solution = rf"It is \boxed{{\frac{{{number}}}{{7}}}}."
    return PROBLEM | {"problem": f"What is {number} / 7?", "level": level, "solution": solution}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def fails(message: str, *arguments: Any, **keywords: Any) -> None:
    with pytest.raises(ProxstepError, match=message) as error:
        math_task(*arguments, **keywords)
    assert "\n" not in str(error.value)


def test_a_plain_problem(path: Path) -> None:
    source = write(path, [PROBLEM])
    task = math_task(source, source)
    [example] = task.train
    assert example.prompt == (
        "Question: Half of what number is $3$? Let's think step by step and output the final "
        "answer within \\boxed{}.\nAnswer:"
    )
    assert example.answer == "6"
    assert example.solution == f" {PROBLEM['solution']}"
    assert example.columns == {"level": "Level 1", "type": "Prealgebra"}
    assert (task.name, task.rewards, task.validation) == ("math", ("math_verify",), task.train)


def test_a_chat_problem(path: Path) -> None:
    source = write(path, [PROBLEM])
    [example] = math_task(source, source, chat=True).train
    assert example.prompt == [{"role": "user", "content": PROBLEM["problem"] + IN_A_BOX}]
    assert example.solution == PROBLEM["solution"]
    [example] = math_task(source, source, instruction="").train
    assert example.prompt == "Question: Half of what number is $3$?\nAnswer:"


def test_the_answer_is_the_last_box_or_the_column(path: Path) -> None:
    nested = PROBLEM | {"solution": r"\boxed{1}, so $\boxed{\frac{1}{\sqrt{2}}}$ or so"}
    source = write(path, [nested, PROBLEM | {"answer": 2.0}, PROBLEM | {"answer": None}])
    examples = math_task(source, source).train
    assert [example.answer for example in examples] == [r"\frac{1}{\sqrt{2}}", "2", "6"]
    del nested["solution"]
    source = write(path, [nested | {"answer": "7"}])
    [example] = math_task(source, source).train
    assert (example.answer, example.solution) == ("7", None)
    assert "answer" not in example.columns


@pytest.mark.parametrize("seed", range(5))
def test_a_level(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    levels = [rng.choice([1, 2, 3, "Level 3", "3", "Level 5", "Level ?"]) for _ in range(60)]
    source = write(path, [row(number, level) for number, level in enumerate(levels)])
    third = [f"What is {i} / 7?" for i, level in enumerate(levels) if str(level)[-1] == "3"]

    def problems(task: Task) -> list[str]:
        return [str(e.prompt).removeprefix("Question: ").split(" Let")[0] for e in task.train]

    assert problems(math_task(source, source, level=3)) == third
    assert len(math_task(source, source).train) == 60
    task = math_task(source, level=3, num_train=2, num_validation=4)  # held out of the level's
    assert problems(task) == third[:-4][:2]
    assert [e.answer for e in task.validation] == [
        rf"\frac{{{problem.split()[2]}}}{{7}}" for problem in third[-4:]
    ]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "math.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([PROBLEM, row(2, "Level 3")]), path)
    [example] = math_task(path, path, level=3).train
    assert example.answer == r"\frac{2}{7}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solution": "It is 6."}, r"column 'solution' has no \\boxed"),
        ({"solution": r"It is \boxed{6."}, r"column 'solution' has no \\boxed"),
        ({"solution": None}, "column 'solution' is missing"),
        ({"problem": ""}, "column 'problem' is empty"),
        ({"answer": ["6"]}, "column 'answer' is a list"),
        ({"level": "Level 6"}, "column 'level' is 'Level 6'; write 1 to 5"),
        ({"level": 3.5}, "column 'level' is 3.5"),
        ({"level": None}, "column 'level' is None"),
    ],
)
def test_a_wrong_problem_is_named(path: Path, change: dict[str, Any], message: str) -> None:
    source = write(path, [row(1), PROBLEM | change])
    fails(
        rf"train\.jsonl, line 2: .*{message}",
        source,
        source,
        level=3 if "level" in change else None,
    )


def test_levels_that_are_not_there(path: Path) -> None:
    source = write(path, [PROBLEM, row(2)])
    fails("neither this nor any other row has level 4; choose another", source, source, level=4)
    fails("level is 6; choose one of 1, 2, 3, 4, 5", source, source, level=6)
    source = write(path, [{"problem": "1?", "answer": "1"}])
    fails("line 1: there is no column 'level'", source, source, level=1)


def test_the_hub_is_asked_where_no_source_is_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str, config: str | None, split: str) -> list[Row]:
        asked.append((name, config, split))
        return [Row("row 1", PROBLEM)]

    monkeypatch.setattr("proxstep.tasks.data.load_hub_rows", load)
    math_task()
    hub = ("DigitalLearningGmbH/MATH-lighteval", None)
    assert asked == [(*hub, "train"), (*hub, "test")]


def test_without_a_connection_the_hub_is_one_message() -> None:
    fails("DigitalLearningGmbH/MATH-lighteval.*cannot be loaded.*or give a local", None, None)


def recipe(**task: Any) -> Any:
    return resolve({"algorithm": "opo", "model": {"name": "./m"}, "task": task}, {}, "test")


def test_the_recipe_s_task(path: Path) -> None:
    source = write(path, [PROBLEM, *map(row, range(8))])
    chosen = recipe(name="math", level=3, train=source, validation=source, num_validation=5)
    task = load_task(chosen, chat=True)
    assert (len(task.train), len(task.validation)) == (8, 5)
    assert isinstance(task.train[0].prompt, list)
    [reward], weights = load_rewards(chosen, task)
    assert inspect.unwrap(reward) is math_verify
    assert weights == [1.0]
    plain = recipe(name="math", train=source, validation=source, prompt_format="plain")
    assert isinstance(load_task(plain, chat=True).train[0].prompt, str)
    examples = task.train
    solutions = [example.solution for example in examples]
    assert math_verify([""] * 8, solutions, **reward_columns(examples)) == [1.0] * 8


def test_mistakes_in_a_recipe(tmp_path: Path) -> None:
    for name in ("arithmetic", "gsm8k", "svamp", "table"):
        with pytest.raises(ProxstepError) as error:
            recipe(name=name, train="t.jsonl", level=3)
        assert str(error.value) == (
            "test: task.level is of task.name math: only math has levels; leave it out"
        )
    for level in (0, 6):
        with pytest.raises(ProxstepError, match=r"task\.level: input should be"):
            recipe(name="math", level=level)
    with pytest.raises(ProxstepError, match=r"task\.train or task\.validation: .*gone\.jsonl"):
        load_task(recipe(name="math", train=str(tmp_path / "gone.jsonl")), chat=False)

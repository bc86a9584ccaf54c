"""Misspelt names are told before torch is imported, in the words of the recipe's own check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.config.recipe_case import COMPOSED, LEAVES, nested, write

from proxstep.algorithms import ALGORITHMS
from proxstep.config.loading import load_recipe, resolve
from proxstep.config.names import check_names, known_algorithms, objective_of, task_names
from proxstep.config.reading import recipe_names
from proxstep.config.recipe import algorithm_names, meaning_of
from proxstep.errors import ProxstepError
from proxstep.tasks import TASKS


def lines_of(check: Any, data: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    with pytest.raises(ProxstepError, match=r"^test: ") as caught:
        check(data, changes, "test")
    return sorted(str(caught.value).removeprefix("test: ").split("\n  "))


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ({"algorithm": "grop"}, {}),
        ({"algorithm": "grpo"}, {"algorithm": "isopo+"}),
        ({"algorithm": "none+opo"}, {}),
        ({"algorithm": "grpo", "stps": 3}, {}),
        ({"algorithm": "grpo", "objective": {"mu": 3}}, {}),
        ({"algorithm": "opo", "objective": {"mu": 1.0}}, {"algorithm": "grpo"}),
        ({"algorithm": "isopo+opo"}, {"objective": {"alfa": 3}}),
        ({"algorithm": "grpo"}, {"alpha": 0.2}),
        ({"algorithm": "grpo"}, {"model": {"lora": {"ranks": 3}}}),
        ({"algorithm": "grpo"}, {"learning_rate": 1}),
        ({"algorithm": "grpo", "optimizer": {"name": "adam"}}, {}),
        ({"algorithm": "grpo", "model": {"autocast": "float16"}}, {}),
        ({"algorithm": "grpo", "objective": {"loss_agg_mode": "token"}}, {}),
        ({"algorithm": "grpo"}, {"optimizer": {"": 3}}),
        ({"algorithm": "grpo", "stps": 3}, {"model": {"nam": "x"}}),
        ({"algorithm": "grpo", "per_algorithm": {"grop": {}}}, {}),
        ({"algorithm": "grpo", "per_algorithm": {"opo": {"optimizr": {}}}}, {}),
        ({"algorithm": "grpo", "per_algorithm": {"opo": {"objective": {"damping": 1}}}}, {}),
    ],
)
def test_the_first_check_says_what_the_whole_one_says(
    data: dict[str, Any], changes: dict[str, Any]
) -> None:
    quick, whole = (lines_of(check, data, changes) for check in (check_names, resolve))
    assert quick == whole


def test_what_the_whole_check_takes_the_first_one_takes() -> None:
    for objective, key in LEAVES:
        data = nested(key, None)
        check_names({"algorithm": objective}, data, "test")
    for name in (*recipe_names(),):
        load_recipe(name)
    check_names({"algorithm": "grpo"}, {"task": {"chat_template_kwargs": {"mine": "x"}}}, "test")
    resolved = resolve({"algorithm": "opo"}, {"model": {"lora": {"rank": 4}}}, "test")
    check_names(resolved.model_dump(), {}, "test")


def test_the_names_are_those_of_the_code() -> None:
    assert known_algorithms() == algorithm_names()
    assert task_names() == sorted(TASKS)
    for name in (*algorithm_names(), *COMPOSED, "none", "none+opo", "isopo+", "grpo+isopo", ""):
        meaning = meaning_of(name)
        assert objective_of(name) == (meaning and meaning["objective"]["name"]), name
    assert {objective_of(name) for name in ALGORITHMS} == set(ALGORITHMS)


def test_paths_in_a_recipe_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """\
algorithm: grpo
model: {name: models/own}
task: {name: table, train: rows.jsonl, validation: hub/set, rewards: "mine.py:score"}
per_algorithm: {opo: {task: {validation: more.jsonl}}}
"""
    folder = tmp_path / "project"
    (folder / "models" / "own").mkdir(parents=True)
    for name in ("rows.jsonl", "more.jsonl", "mine.py"):
        (folder / name).touch()
    write(folder / "r.yaml", text)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("project/r.yaml")
    assert recipe.model.name == "project/models/own"
    assert (recipe.task.train, recipe.task.validation) == ("project/rows.jsonl", "hub/set")
    assert recipe.task.rewards == ["project/mine.py:score"]
    opo = load_recipe("project/r.yaml", [("algorithm", "opo"), ("task.train", "rows.jsonl")])
    assert (opo.task.train, opo.task.validation) == ("rows.jsonl", "project/more.jsonl")
    monkeypatch.chdir(folder)
    assert load_recipe("r.yaml").task.train == "rows.jsonl"


def test_one_reward_may_be_a_text() -> None:
    task = {"name": "table", "train": "x.jsonl", "rewards": "exact_match"}
    data = {"algorithm": "grpo", "task": task, "model": {"name": "some/model"}}
    assert resolve(data, {}, "test").task.rewards == ["exact_match"]


def test_a_recipe_goes_by_its_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("dapo").algorithm == "dapo"
    write(tmp_path / "dapo", "algorithm: gspo\n")
    assert load_recipe("dapo").algorithm == "gspo"

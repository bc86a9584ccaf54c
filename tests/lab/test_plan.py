"""Plans of comparisons: their cells, their file, and what may go on in which folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxstep.config.yamlfile import read_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.plan import PLAN, Plan, parse_vary

RECIPE = """\
algorithm: reinforce
steps: 2
task: {name: arithmetic, difficulty: 1}
per_algorithm: {opo: {optimizer: {max_grad_norm: 5.0}}}
"""
RATES = {"optimizer.learning_rate": [1e-5, 3e-5]}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def make(recipe: Path, algorithms=("grpo", "opo"), vary=RATES, seeds=2, overrides=()) -> Plan:
    return Plan.of(recipe, overrides, algorithms, vary, seeds)


def test_every_algorithm_meets_every_value_and_seed_seed_by_seed(recipe: Path) -> None:
    plan = make(recipe)
    assert [cell.name for cell in plan.cells()] == [
        f"{algorithm}-learning_rate={rate}-seed{seed}"
        for seed in (0, 1)
        for rate in ("1e-05", "3e-05")
        for algorithm in ("grpo", "opo")
    ]
    assert [v.recipe.optimizer.learning_rate for v in plan.variants] == [1e-5, 1e-5, 3e-5, 3e-5]
    assert [cell.name for cell in make(recipe, vary={}, seeds=1).cells()] == [
        "grpo-seed0",
        "opo-seed0",
    ]


def test_two_varied_keys_are_crossed(recipe: Path) -> None:
    vary = {**RATES, "task.difficulty": [1, 2]}
    plan = make(recipe, ["grpo"], vary, seeds=1)
    assert [cell.name for cell in plan.cells()] == [
        f"grpo-learning_rate={rate}-difficulty={n}-seed0"
        for rate in ("1e-05", "3e-05")
        for n in (1, 2)
    ]
    assert len(plan.distinct_models()) == 2


def test_the_file_says_what_is_run_and_nothing_of_what_varies(recipe: Path, tmp_path: Path) -> None:
    plan = make(recipe)
    plan.write(tmp_path)
    held = read_yaml(tmp_path / PLAN)
    assert held == plan.content()
    assert held["vary"] == RATES
    assert "learning_rate" not in held["recipes"]["grpo"]["optimizer"]
    assert held["recipes"]["opo"]["optimizer"]["max_grad_norm"] == 5.0
    assert not {"seed", "output_dir", "algorithm"} & held["recipes"]["grpo"].keys()


def test_a_plan_goes_on_and_grows(recipe: Path, tmp_path: Path) -> None:
    assert make(recipe).continuing(tmp_path) == make(recipe)
    make(recipe).write(tmp_path)
    assert make(recipe).continuing(tmp_path).seeds == 2
    assert make(recipe, seeds=1).continuing(tmp_path).seeds == 2
    grown = make(recipe, ["grpo", "opo", "dro"], {"optimizer.learning_rate": [1e-5, 3e-5, 1e-4]}, 5)
    assert grown.continuing(tmp_path) == grown


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"algorithms": ["grpo"]}, "it has the algorithm opo"),
        ({"vary": {}}, "it varies optimizer.learning_rate"),
        ({"vary": {"optimizer.learning_rate": [1e-5]}}, "it has optimizer.learning_rate 3e-05"),
        ({"overrides": [("steps", "9")]}, "its steps of grpo is 2"),
    ],
)
def test_another_plan_is_refused_with_what_differs(
    recipe: Path, tmp_path: Path, changes: dict, difference: str
) -> None:
    make(recipe).write(tmp_path)
    with pytest.raises(ProxstepError, match=difference):
        make(recipe, **changes).continuing(tmp_path)


def test_a_damaged_plan_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / PLAN).write_text("seeds: 3")
    with pytest.raises(ProxstepError, match="it is damaged"):
        make(recipe).continuing(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps", "must be KEY=VALUE"),
        ("steps=", "must be KEY=VALUE"),
        ("=1", "must be KEY=VALUE"),
        ("steps=1,1", "given twice"),
        ("steps=[1", "not a valid YAML value"),
    ],
)
def test_what_cannot_be_varied_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ProxstepError, match=complaint):
        parse_vary([text])


def test_keys_that_compare_sets_are_refused(recipe: Path) -> None:
    with pytest.raises(ProxstepError, match=r"--seed does not go with compare: use --seeds"):
        make(recipe, vary={"seed": [1, 2]})


def test_values_that_look_alike_are_refused(recipe: Path) -> None:
    with pytest.raises(ProxstepError, match="two runs one name"):
        make(recipe, vary={"optimizer.learning_rate": [1e-5, 1.00000001e-5]})


@pytest.mark.parametrize("part", ["steps: 9", "rollout: {num_prompts: 3}", "task: {difficulty: 2}"])
def test_algorithms_with_other_prompts_or_rollouts_are_refused(recipe: Path, part: str) -> None:
    recipe.write_text(RECIPE.replace("optimizer: {max_grad_norm: 5.0}", part))
    key = part.partition(":")[0]
    with pytest.raises(ProxstepError, match=f"grpo and opo would have different {key}"):
        make(recipe)

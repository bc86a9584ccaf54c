"""Arms of a comparison: named settings of a recipe file, with values of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxstep.cli.commands import main
from proxstep.config.loading import load_recipe
from proxstep.config.yamlfile import parse_yaml, read_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.arms import Design
from proxstep.lab.plan import PLAN, Plan

RECIPE = """\
algorithm: isopo
steps: 2
task: {name: arithmetic, difficulty: 1}
compare:
  arms:
    plain: {algorithm: reinforce}
    k16: {algorithm: isopo, geometry: {num_overlap_positions: 16}}
    sgd: {algorithm: isopo, optimizer: {name: sgd}, vary: {optimizer.learning_rate: [0.1, 0.3, 1]}}
  against: plain
  vary: {optimizer.learning_rate: [1e-5, 3e-5]}
  seeds: 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def plan_of(recipe: Path, names: str | None = None) -> Plan:
    design = Design.of(read_yaml(recipe), "recipe.yaml")
    return Plan.of(recipe, (), design.names(names), design.vary, design.seeds, design=design)


def test_arms_are_named_and_have_keys_and_values_of_their_own(recipe: Path) -> None:
    plan = plan_of(recipe)
    assert [variant.name for variant in plan.variants] == [
        "plain-learning_rate=1e-05",
        "k16-learning_rate=1e-05",
        "sgd-learning_rate=0.1",
        "plain-learning_rate=3e-05",
        "k16-learning_rate=3e-05",
        "sgd-learning_rate=0.3",
        "sgd-learning_rate=1",
    ]
    found = {variant.algorithm: variant.recipe for variant in plan.variants}
    assert found["k16"].geometry.num_overlap_positions == 16
    assert found["k16"].label == "k16"
    assert found["sgd"].optimizer.name == "sgd"
    assert (found["plain"].algorithm, found["plain"].label) == ("reinforce", "plain")
    assert plan.against == "plain"


def test_algorithms_can_stand_beside_arms(recipe: Path) -> None:
    plan = plan_of(recipe, "plain,opo")
    assert plan.algorithms == ["plain", "opo"]
    assert plan.variants[1].recipe.label is None


def test_the_plans_file_says_what_the_arms_are_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe)
    plan.write(tmp_path)
    held = read_yaml(tmp_path / PLAN)
    assert held["own_vary"] == {"sgd": {"optimizer.learning_rate": [0.1, 0.3, 1]}}
    assert held["against"] == "plain"
    assert held["recipes"]["plain"]["algorithm"] == "reinforce"
    assert plan.continuing(tmp_path) == plan
    recipe.write_text(RECIPE.replace("0.3, 1]", "0.3]"))
    with pytest.raises(ProxstepError, match=r"it has optimizer\.learning_rate 1 for sgd"):
        plan_of(recipe).continuing(tmp_path)
    recipe.write_text(RECIPE.replace("positions: 16", "positions: 8"))
    with pytest.raises(ProxstepError, match="num_overlap_positions of k16 is 16"):
        plan_of(recipe).continuing(tmp_path)


def test_training_does_not_mind_the_section(recipe: Path) -> None:
    assert load_recipe(recipe).algorithm == "isopo"


def test_the_command_line_goes_on_top_of_an_arm(recipe: Path) -> None:
    design = Design.of(read_yaml(recipe), "recipe.yaml")
    overrides = [("geometry.num_overlap_positions", "8")]
    plan = Plan.of(recipe, overrides, ["k16"], {}, 1, design=Design(design.arms))
    assert plan.variants[0].recipe.geometry.num_overlap_positions == 8


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("[a]", "compare must map"),
        ("{arm: {}}", "compare.arm is not known; did you mean arms"),
        ("{arms: [a]}", "arms must map names"),
        ("{arms: {a: {steps: 1}}}", "arms.a must be a part of a recipe with an algorithm"),
        ("{arms: {a/b: {algorithm: opo}}}", "'a/b' becomes a folder's name"),
        ("{arms: {a: {algorithm: opo, seed: 1}}}", "arms.a cannot change seed"),
        ("{seeds: 0}", "seeds must be at least 1"),
        ("{vary: {steps: 3}}", "vary.steps must be a list"),
        ("{vary: {steps: [3, 3]}}", "vary.steps has a value twice"),
        (
            "{arms: {a: {algorithm: opo, vary: {steps: [3]}}}}",
            "arms.a.vary.steps is not among recipe.yaml: compare.vary",
        ),
    ],
)
def test_mistakes_name_the_place(section: str, complaint: str) -> None:
    with pytest.raises(ProxstepError, match=complaint):
        Design.of({"compare": parse_yaml(section, "section")}, "recipe.yaml")


def test_what_is_compared_must_be_known(recipe: Path) -> None:
    design = Design.of(read_yaml(recipe), "recipe.yaml")
    assert design.reference(["k16"]) is None
    assert design.reference(["k16", "plain"]) == "plain"
    with pytest.raises(ProxstepError, match=r"compare.against plan is not compared; did you mean"):
        Design(design.arms, "plan").reference(["k16", "plain"])
    with pytest.raises(ProxstepError, match=r"Give --algorithms a,b, or a recipe with"):
        Design().names(None)


def test_an_arm_may_be_of_an_algorithm_of_ones_own(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(f"external_lib: missing.py\n{RECIPE.replace('reinforce', 'hinge')}")
    assert main(["compare", str(recipe), "--output", str(recipe.parent / "out")]) == 2
    assert "external_lib missing.py" in capsys.readouterr().err  # not: unknown algorithm


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("num_overlap_positions", "num_overlap_position"), "arms.k16: unknown key geometry.num_o"),
        (("algorithm: reinforce", "algorithm: reinfroce"), "arms.plain: algorithm 'reinfroce'"),
    ],
)
def test_a_mistake_in_an_arm_is_an_error_of_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], complaint: str
) -> None:
    recipe.write_text(RECIPE.replace(*change))
    assert main(["compare", str(recipe), "--output", str(recipe.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error

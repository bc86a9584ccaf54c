"""Keys given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.config.recipe_case import write

from proxstep.config.loading import load_recipe
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError


def resolved(path: Path, *overrides: tuple[str, str]) -> Recipe:
    return load_recipe(path, overrides)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(
        tmp_path / "base.yaml",
        "algorithm: opo\nobjective: {alpha: 0.7}\noptimizer: {learning_rate: 1e-4, eps: 1e-7}\n",
    )


def test_overrides_reach_nested_keys_and_leave_their_neighbors(path: Path) -> None:
    recipe = resolved(path, ("optimizer.learning_rate", "1e-6"), ("model.lora.rank", "4"))
    assert recipe.optimizer.learning_rate == 1e-6
    assert recipe.optimizer.eps == 1e-7
    assert recipe.model.lora is not None
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (4, 32)
    assert getattr(recipe.objective, "alpha", None) == 0.7


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E-6", 1e-6),
        ("2.5e+3", 2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1e2", 100.0),
        ("3", 3),
        ("1_000", 1000),
    ],
)
def test_numbers_are_read_as_everybody_writes_them(path: Path, text: str, value: float) -> None:
    read = resolved(path, ("optimizer.learning_rate", text)).optimizer.learning_rate
    assert read == value
    in_file = write(path.with_name("file.yaml"), f"algorithm: grpo\noptimizer: {{eps: {text}}}\n")
    assert load_recipe(in_file).optimizer.eps == value


@pytest.mark.parametrize("text", ["1e-6x", "e5", "1-2", "v1e5", "1e5.yaml", "."])
def test_what_only_looks_like_a_number_stays_text(path: Path, text: str) -> None:
    assert resolved(path, ("output_dir", text)).output_dir == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("task.rewards", "[a.py:f, exact_match]", ["a.py:f", "exact_match"]),
        ("task.rewards", "null", None),
        ("task.rewards", "", None),
        ("optimizer.betas", "[0.8, 0.9]", [0.8, 0.9]),
        ("evaluation", "{every: 3, kl_policy_initial: false}", 3),
        ("model.lora", "{rank: 2}", 2),
        ("model.name", "'1e-5'", "1e-5"),
        ("output_dir", "a=b", "a=b"),
    ],
)
def test_override_values_are_yaml(path: Path, key: str, text: str, value: Any) -> None:
    found: Any = resolved(path, (key, text))
    for part in key.split("."):
        found = getattr(found, part)
    found = getattr(found, "every", getattr(found, "rank", found))
    assert found == value


def test_the_last_override_wins(path: Path) -> None:
    assert resolved(path, ("steps", "3"), ("seed", "1"), ("steps", "4")).steps == 4


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (("steps", "[1"), "--steps: '[1' is not a valid YAML value"),
        (("steps", "a: b: c"), "--steps: 'a: b: c' is not a valid YAML value"),
        (("steps", "*other"), "--steps: '*other' is not a valid YAML value"),
        (("steps", "!!python/object:os.system x"), "is not a valid YAML value"),
        (("steps.more", "3"), "steps: input should be a valid integer"),
        (("", "3"), "unknown key"),
        (("optimizer..eps", "3"), "unknown key optimizer."),
    ],
)
def test_an_override_that_makes_no_sense(
    path: Path, override: tuple[str, str], complaint: str
) -> None:
    with pytest.raises(ProxstepError) as caught:
        load_recipe(path, [override])
    assert complaint in str(caught.value)


def test_an_override_below_a_value_given_before(path: Path) -> None:
    with pytest.raises(ProxstepError, match=r"--model\.name: model was given a value already"):
        load_recipe(path, [("model", "x"), ("model.name", "y")])

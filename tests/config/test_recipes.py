"""What a recipe resolves to, by its algorithm, its sections and per_algorithm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.config.recipe_case import COMPOSED, leaves, mistake

from proxstep.algorithms import ALGORITHMS
from proxstep.config.explain import describe_keys
from proxstep.config.loading import dump_recipe, load_recipe, resolve
from proxstep.config.recipe import algorithm_names, meaning_of, undefined_composition
from proxstep.isopo import PRESETS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("algorithm", [*algorithm_names(), *COMPOSED])
def test_an_algorithm_resolves_to_its_objective_and_geometry(algorithm: str) -> None:
    recipe = resolve({"algorithm": algorithm}, {}, "test")
    rule, plus, objective = algorithm.partition("+")
    if not plus:
        rule, objective = (
            (algorithm, "reinforce") if algorithm not in ALGORITHMS else ("none", algorithm)
        )
    assert (recipe.geometry.rule, recipe.objective.name) == (rule, objective)
    assert recipe.algorithm == algorithm


@pytest.mark.parametrize("algorithm", [*algorithm_names(), *COMPOSED])
def test_the_resolved_recipe_reads_back_to_itself(algorithm: str, tmp_path: Path) -> None:
    recipe = resolve(
        {
            "algorithm": algorithm,
            "output_dir": "läufe/ø: #1",
            "model": {"name": "./model", "lora": {"rank": 4, "target_modules": ["q_proj"]}},
            "task": {"name": "table", "train": "null.jsonl", "rewards": ["a.py:f", "exact_match"]},
            "optimizer": {"learning_rate": 1e-6, "max_grad_norm": None, "betas": [0.9, 0.95]},
            "regularizer": {"kl_coef": 1e-3},
            "update": {"microbatch_size": 4},
        },
        {},
        "test",
    )
    text = dump_recipe(recipe)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path) == recipe
    assert dump_recipe(load_recipe(path)) == text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_names_only_what_it_means(path: Path) -> None:
    recipe = load_recipe(path)
    meaning = meaning_of(recipe.algorithm)
    assert meaning is not None
    assert recipe.objective.name == meaning["objective"]["name"]
    assert recipe.output_dir.startswith("runs/")


def test_defaults_come_from_the_losses() -> None:
    for name in ALGORITHMS:
        section = resolve({"algorithm": name}, {}, "test").objective
        assert section.loss_agg_mode == ALGORITHMS[name].default_loss_agg_mode
        assert section.options() == ALGORITHMS[name].defaults


def test_resolving_changes_neither_argument() -> None:
    data = {"algorithm": "opo", "per_algorithm": {"opo": {"steps": 3}}, "model": {"name": "x/y"}}
    changes = {"model": {"dtype": "bfloat16"}}
    before = repr((data, changes))
    recipe = resolve(data, changes, "test")
    assert repr((data, changes)) == before
    assert (recipe.model.name, recipe.model.dtype, recipe.steps) == ("x/y", "bfloat16", 3)


def test_every_key_is_described_in_the_recipes_words() -> None:
    rows = {key: (kind, default, text) for key, kind, default, text in describe_keys()}
    assert rows["algorithm"][:2] == ("text", "required")
    assert rows["steps"] == ("int", "100", "Rollout steps.")
    assert rows["optimizer.learning_rate"][1] == "1e-06"
    assert rows["objective.mu (opo)"][:2] == ("float | auto", "1.0")
    assert "objective.mu (grpo)" not in rows
    for key in leaves(resolve({"algorithm": "grpo"}, {}, "test").model_dump()):
        if key != "objective.name":
            assert {key, f"{key} (grpo)"} & set(rows), key


# per_algorithm


PER_ALGORITHM = {
    "algorithm": "isopo",
    "optimizer": {"learning_rate": 1e-4, "eps": 1e-7},
    "per_algorithm": {
        "isopo": {"optimizer": {"learning_rate": 2e-4}},
        "opo": {"objective": {"mu": 2.0}, "optimizer": {"learning_rate": 3e-4}},
        "isopo+opo": {"geometry": {"damping": 1.0}},
    },
}


@pytest.mark.parametrize(
    ("algorithm", "rate"), [("isopo", 2e-4), ("opo", 3e-4), ("grpo", 1e-4), ("isopo+opo", 1e-4)]
)
def test_per_algorithm_touches_only_its_own(algorithm: str, rate: float) -> None:
    recipe = resolve(PER_ALGORITHM, {"algorithm": algorithm}, "test")
    assert recipe.optimizer.learning_rate == rate
    assert recipe.optimizer.eps == 1e-7
    assert getattr(recipe.objective, "mu", None) == {"opo": 2.0, "isopo+opo": 1.0}.get(algorithm)
    assert recipe.geometry.damping == (1.0 if algorithm == "isopo+opo" else None)


def test_the_command_line_beats_per_algorithm_which_beats_the_recipe() -> None:
    changes = {"optimizer": {"learning_rate": 5e-4}}
    assert resolve(PER_ALGORITHM, changes, "test").optimizer.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ([1], "per_algorithm must map algorithms to parts of a recipe"),
        ("opo", "per_algorithm must map algorithms to parts of a recipe"),
        ({"grop": {}}, "per_algorithm 'grop' is not known; did you mean grpo?"),
        ({"opo": {}, 3: {}}, "per_algorithm 3 is not known"),
        ({"opo": [1]}, "expected a mapping of keys to values, got [1]"),
        ({"opo": {"optimizr": {}}}, "unknown key optimizr; did you mean optimizer?"),
        ({"opo": {"per_algorithm": {}}}, "unknown key per_algorithm"),
        ({"opo": {"algorithm": "grpo"}}, "per_algorithm.opo cannot change the algorithm"),
        ({"opo": {"algorithm": "opo"}}, "per_algorithm.opo cannot change the algorithm"),
        (0, "per_algorithm must map algorithms to parts of a recipe, got 0"),
        ([], "per_algorithm must map algorithms to parts of a recipe, got []"),
        ("", "per_algorithm must map algorithms to parts of a recipe, got ''"),
        (False, "per_algorithm must map algorithms to parts of a recipe, got False"),
    ],
)
def test_mistakes_in_per_algorithm(part: Any, complaint: str) -> None:
    assert complaint in mistake({"algorithm": "opo", "per_algorithm": part})


@pytest.mark.parametrize("part", [None, {}, {"opo": None}, {"opo": {}}, {"opo": {"model": None}}])
def test_an_empty_per_algorithm_changes_nothing(part: Any) -> None:
    plain = resolve({"algorithm": "opo"}, {}, "test")
    assert resolve({"algorithm": "opo", "per_algorithm": part}, {}, "test") == plain


# Empty sections


SECTIONS = [
    key
    for key, value in resolve({"algorithm": "opo"}, {}, "t").model_dump().items()
    if isinstance(value, dict)
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_heading_that_nothing_follows_is_as_good_as_none(section: str) -> None:
    plain = resolve({"algorithm": "isopo"}, {}, "test")
    assert resolve({"algorithm": "isopo", section: None}, {}, "test") == plain
    assert resolve({"algorithm": "isopo"}, {section: None}, "test") == plain


@pytest.mark.parametrize("section", SECTIONS)
def test_an_empty_section_and_an_override(section: str) -> None:
    inside = resolve({"algorithm": "isopo"}, {}, "test").model_dump()[section]
    key = min(set(leaves(inside)) - {"name", "rule"})
    message = mistake({"algorithm": "isopo", section: None}, **{section: {key: [None]}})
    assert message.startswith(f"{section}.{key}")


@pytest.mark.parametrize("key", ["seed", "steps", "device", "output_dir"])
def test_a_value_that_is_missing_is_no_default(key: str) -> None:
    """--seed "$SEED" with an empty variable is a mistake, not seed 0."""
    assert mistake({"algorithm": "opo", key: None}).startswith(f"{key}: input should be a valid ")
    assert mistake({"algorithm": "opo"}, **{key: None}).startswith(
        f"{key}: input should be a valid "
    )


# Names of algorithms


def suggested(message: str) -> set[str]:
    """The names that a message lists after "one of"."""
    return set(re.findall(r"[\w+-]+", message.partition("one of ")[2]))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("grop", "grpo"),
        ("GRPO", None),
        ("isopo-natual", "isopo-natural"),
        ("reinforce++", "reinforce"),
        ("xyz", None),
        ("isopo+", "isopo"),
        ("+opo", "opo"),
        ("none+opo", None),
        (5, None),
        (["opo"], None),
        ({"opo": 1}, None),
    ],
)
def test_an_unknown_algorithm_is_named_with_the_nearest(name: Any, nearest: str | None) -> None:
    message = mistake({"algorithm": name})
    assert message.startswith(f"algorithm {name!r} is not known")
    if nearest:
        assert f"did you mean {nearest}?" in message
    assert set(ALGORITHMS) <= suggested(message)
    assert "isopo+opo" in message


@pytest.mark.parametrize("data", [{}, {"algorithm": None}, {"objective": {"name": "opo"}}])
def test_a_missing_algorithm(data: dict[str, Any]) -> None:
    message = mistake(data)
    assert message.startswith("algorithm is missing; ")
    assert set(ALGORITHMS) <= suggested(message)


@pytest.mark.parametrize("rule", PRESETS)
@pytest.mark.parametrize("objective", ALGORITHMS)
def test_a_composition_is_defined_or_refused(rule: str, objective: str) -> None:
    name = f"{rule}+{objective}"
    if ALGORITHMS[objective].level == "sequence":
        assert undefined_composition(rule, objective) is None
        assert resolve({"algorithm": name}, {}, "test").geometry.rule == rule
        return
    message = mistake({"algorithm": name})
    assert message.startswith(f"geometry.rule {rule} with objective {objective}: ")
    assert suggested(message) & set(ALGORITHMS) == {
        name for name, objective in ALGORITHMS.items() if objective.level == "sequence"
    }
    assert "geometry.rule none" in message


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {"algorithm": "isopo", "objective": {"name": "opo"}},
            "algorithm isopo does not go with objective.name opo and geometry.rule isopo: "
            "for the two together say algorithm isopo+opo",
        ),
        (
            {"algorithm": "opo", "geometry": {"rule": "isopo-natural"}},
            "for the two together say algorithm isopo-natural+opo",
        ),
        (
            {"algorithm": "grpo", "geometry": {"rule": "isopo"}},
            "a token-level objective has no coefficient per sequence",
        ),
        ({"algorithm": "grpo", "objective": {"name": None}}, "does not go with objective.name"),
        ({"algorithm": "grpo", "geometry": {"rule": {"a": 1}}}, "does not go with"),
    ],
)
def test_an_objective_or_geometry_that_is_not_the_algorithms(
    data: dict[str, Any], complaint: str
) -> None:
    assert complaint in mistake(data)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"nonsense": 3}, "unknown key nonsense"),
        ({"objective": {"nonsense": 3}}, "unknown key objective.nonsense"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: input should be"),
        ({"objective": {"mu": -1}}, "objective.mu: input should be greater than 0"),
        ({"algorithm": "grpo"}, " cannot change the algorithm"),
        ({"geometry": {"rule": "isopo"}}, "algorithm opo does not go with"),
        (3, "expected a mapping of keys to values, got 3"),
    ],
)
def test_parts_of_algorithms_that_are_not_chosen_are_checked_too(part: Any, complaint: str) -> None:
    for algorithm in ("grpo", "opo"):
        message = mistake({"algorithm": algorithm, "per_algorithm": {"opo": part}})
        assert message.startswith("per_algorithm.opo")
        assert complaint in message


def test_a_part_may_need_the_rest_of_the_recipe() -> None:
    parts = {"isopo-natural": {"geometry": {"damping_form": "relative"}}}
    data = {"algorithm": "isopo", "geometry": {"scale": "paper"}, "per_algorithm": parts}
    assert resolve(data, {}, "test").geometry.damping_form is None

"""Recipes: what they resolve to, what overrides do, and that every mistake is one clear message."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxstep.algorithms import LOSSES
from proxstep.config.explain import OBJECTIVES, describe_keys
from proxstep.config.loading import dump_recipe, load_recipe, resolve
from proxstep.config.recipe import ALGORITHMS, Recipe, meaning_of, undefined_composition
from proxstep.config.sections import OPTIMIZER_OPTIONS
from proxstep.errors import ProxstepError
from proxstep.isopo import PRESETS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
COMPOSED = ["isopo+opo", "isopo-natural+gspo", "isopo-npg+reinforce", "reinforce+opo"]


def mistake(data: Any, **changes: Any) -> str:
    with pytest.raises(ProxstepError) as caught:
        resolve(data, changes, "test")
    message = str(caught.value)
    assert message.startswith("test: ")
    return message.removeprefix("test: ")


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# What a recipe resolves to


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *COMPOSED])
def test_an_algorithm_resolves_to_its_objective_and_geometry(algorithm: str) -> None:
    recipe = resolve({"algorithm": algorithm}, {}, "test")
    rule, plus, objective = algorithm.partition("+")
    if not plus:
        rule, objective = (
            (algorithm, "reinforce") if algorithm not in LOSSES else ("none", algorithm)
        )
    assert (recipe.geometry.rule, recipe.objective.name) == (rule, objective)
    assert recipe.algorithm == algorithm


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *COMPOSED])
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
    for name in LOSSES:
        section = resolve({"algorithm": name}, {}, "test").objective
        mode = getattr(section, "loss_agg_mode", None)
        assert mode in (None, LOSSES[name].default_loss_agg_mode)


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


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize(
    "text", ["1e-5", "4e2", "08", "+.4", "1_0", "5.", ".", "null", "2026-01-01"]
)
def test_text_that_looks_like_something_else_reads_back(tmp_path: Path, text: str) -> None:
    recipe = resolve({"algorithm": "grpo", "output_dir": text}, {}, "test")
    path = write(tmp_path / "r.yaml", dump_recipe(recipe))
    assert load_recipe(path) == recipe


# Overrides


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
    assert "choose one of reinforce, grpo, " in message
    assert message.endswith("or RULE+OBJECTIVE such as isopo+opo")


@pytest.mark.parametrize("data", [{}, {"algorithm": None}, {"objective": {"name": "opo"}}])
def test_a_missing_algorithm(data: dict[str, Any]) -> None:
    assert mistake(data).startswith("algorithm is missing; choose one of reinforce, grpo, ")


@pytest.mark.parametrize("rule", PRESETS)
@pytest.mark.parametrize("objective", LOSSES)
def test_a_composition_is_defined_or_refused(rule: str, objective: str) -> None:
    name = f"{rule}+{objective}"
    if LOSSES[objective].level == "sequence":
        assert undefined_composition(rule, objective) is None
        assert resolve({"algorithm": name}, {}, "test").geometry.rule == rule
        return
    message = mistake({"algorithm": name})
    assert message.startswith(f"geometry.rule {rule} with objective {objective}: ")
    assert "use one of reinforce, gspo, opo, rloo, or geometry.rule none" in message


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


# Unknown keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("step", "steps"),
        ("optimzer", "optimizer"),
        ("outputdir", "output_dir"),
        ("model.nam", "name"),
        ("model.lora.ranks", "rank"),
        ("task.dificulty", "difficulty"),
        ("task.reward", "rewards"),
        ("geometry.dampin", "damping"),
        ("rollout.num_generation", "num_generations"),
        ("rollout.temprature", "temperature"),
        ("update.micro_batch_size", "microbatch_size"),
        ("optimizer.lerning_rate", "learning_rate"),
        ("optimizer.muon_lr", "muon_learning_rate"),
        ("regularizer.kl_coeff", "kl_coef"),
        ("regularizer.entropy_coeff", "entropy_coef"),
        ("evaluation.evry", "every"),
        ("logging.traker", "tracker"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest(key: str, nearest: str) -> None:
    message = mistake({"algorithm": "isopo"}, **nested(key, 1))
    assert message.startswith(f"unknown key {key}")
    assert f"did you mean {nearest}?" in message
    assert nearest in known_here(message)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unknown_keys_of_every_objective(objective: str) -> None:
    names = list(OBJECTIVES[objective].model_fields)
    for name in names:
        if name == "name":
            continue
        misspelt = name[:-1] + "_" + name[-1]
        message = mistake({"algorithm": objective}, objective={misspelt: 1})
        assert message.startswith(f"unknown key objective.{misspelt}")
        assert f"did you mean {name}?" in message
        assert known_here(message) == names


def test_a_key_of_another_objective_is_unknown() -> None:
    message = mistake({"algorithm": "reinforce"}, objective={"mu": 1.0})
    assert message == "unknown key objective.mu (known here: advantage, name, loss_agg_mode)"


def test_several_mistakes_come_in_one_message() -> None:
    message = mistake({"algorithm": "grpo", "stps": 1, "seed": -1, "model": {"dtype": "int8"}})
    lines = message.splitlines()
    assert len(lines) == 3
    assert {line.strip().split()[0] for line in lines} == {"unknown", "seed:", "model.dtype:"}


def known_here(message: str) -> list[str]:
    return message.partition("(known here: ")[2].removesuffix(")").split(", ")


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# Wrong types and values


LEAVES = [
    (objective, key)
    for objective in OBJECTIVES
    for key in leaves(resolve({"algorithm": objective}, {}, "test").model_dump())
    if (objective == "grpo" or key.startswith("objective."))
    and key not in ("algorithm", "objective.name", "geometry.rule", "model.lora")
]


@pytest.mark.parametrize(("objective", "key"), LEAVES)
@pytest.mark.parametrize("value", [{"no": 1}, [[None]], datetime.date(2026, 1, 1)], ids=repr)
def test_no_key_takes_just_anything(objective: str, key: str, value: Any) -> None:
    message = mistake({"algorithm": objective}, **nested(key, value))
    for line in message.splitlines():
        assert line.strip().startswith(key)
    assert ", got " in message


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("steps", "many", "input should be a valid integer, got 'many'"),
        ("steps", "3", "input should be a valid integer, got '3'"),
        ("steps", 2.5, "input should be a valid integer, got 2.5"),
        ("steps", True, "input should be a valid integer, got True"),
        ("steps", None, "input should be a valid integer, got None"),
        ("steps", 0, "input should be greater than or equal to 1, got 0"),
        ("seed", -1, "input should be greater than or equal to 0, got -1"),
        ("output_dir", 5, "input should be a valid string, got 5"),
        ("optimizer.learning_rate", "fast", "input should be a valid number, got 'fast'"),
        ("optimizer.learning_rate", True, "input should be a valid number, got True"),
        ("optimizer.learning_rate", 0, "input should be greater than 0, got 0"),
        ("optimizer.learning_rate", math.nan, "got nan"),
        ("optimizer.betas", 0.9, "input should be a valid list, got 0.9"),
        ("optimizer.betas", [0.9], "got [0.9]"),
        ("optimizer.name", "adam", "input should be 'adamw', 'sgd', 'muon', 'soap' or 'kron'"),
        ("optimizer.momentum", 1.0, "input should be less than 1, got 1.0"),
        ("model.autocast", "float16", "input should be 'bfloat16', got 'float16'"),
        ("regularizer.kl_coef", -0.1, "input should be greater than or equal to 0, got -0.1"),
        ("regularizer.entropy_coef", -1, "input should be greater than or equal to 0, got -1"),
        ("evaluation.kl_policy_initial", 1, "input should be a valid boolean, got 1"),
        ("evaluation.kl_policy_initial", "no", "input should be a valid boolean, got 'no'"),
        ("model.dtype", "int8", "input should be 'float32' or 'bfloat16', got 'int8'"),
        ("model.name", None, "input should be a valid string, got None"),
        ("model.lora", 16, "expected keys and values, got 16"),
        ("task.difficulty", 9, "input should be less than or equal to 5, got 9"),
        ("task.rewards", "exact_match", "input should be a valid list, got 'exact_match'"),
        ("rollout.top_p", 1.5, "input should be less than or equal to 1, got 1.5"),
        ("geometry.decay", 1, "input should be less than 1, got 1"),
        ("model", "gpt2", "expected keys and values, got 'gpt2'"),
        ("objective", 3, "expected keys and values, got 3"),
        ("geometry", [], "expected keys and values, got []"),
        ("output_dir", None, "input should be a valid string, got None"),
    ],
)
def test_a_wrong_type_or_value_names_key_and_value(key: str, value: Any, complaint: str) -> None:
    message = mistake({"algorithm": "grpo"}, **nested(key, value))
    assert message.startswith(f"{key}: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("key", "place"),
    [("task.rewards", "task.rewards[1]"), ("optimizer.betas", "optimizer.betas[1]")],
)
def test_a_wrong_item_of_a_list_is_pointed_at(key: str, place: str) -> None:
    values: list[Any] = ["exact_match", 0] if "rewards" in key else [0.9, "high"]
    assert mistake({"algorithm": "grpo"}, **nested(key, values)).startswith(f"{place}: ")


@pytest.mark.parametrize(
    "key", ["optimizer.learning_rate", "rollout.temperature", "geometry.damping"]
)
@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
def test_no_number_is_infinite_or_none(tmp_path: Path, key: str, text: str) -> None:
    path = write(tmp_path / "r.yaml", "algorithm: isopo\n")
    with pytest.raises(
        ProxstepError, match=rf"{key}: input should be a finite number, got -?(inf|nan)"
    ):
        load_recipe(path, [(key, text)])


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("optimizer.betas", [0.9, 2.0], "optimizer.betas[1]: input should be less than 1, got 2.0"),
        ("optimizer.learning_rate", 1e39, "optimizer.learning_rate: input should be less than"),
        ("seed", 10**20, "seed: input should be less than 2147483648"),
        ("geometry.fisher_power", math.nan, "geometry.fisher_power: input should be a finite"),
        ("task.reward_weights", [math.nan], "task.reward_weights[0]: input should be a finite"),
    ],
)
def test_values_out_of_range(key: str, value: Any, complaint: str) -> None:
    message = mistake(
        {"algorithm": "isopo", "task": {"rewards": ["exact_match"]}}, **nested(key, value)
    )
    assert message.startswith(complaint)


def test_a_choice_of_types_is_named_without_their_names_in_python() -> None:
    data = {"algorithm": "grpo", "model": {"lora": {"target_modules": 3}}}
    message = mistake(data)
    assert message == "model.lora.target_modules: input should be a valid list, got 3"
    data["model"]["lora"]["target_modules"] = ["q_proj", 3]
    message = mistake(data)
    assert message.startswith("model.lora.target_modules[1]: input should be a valid string, got 3")
    assert "list[str]" not in message
    message = mistake({"algorithm": "opo", "objective": {"mu": "abc"}})
    assert message.startswith("objective.mu: input should be a valid number")
    assert message.endswith("or input should be 'auto', got 'abc'")


# What does not go together


@pytest.mark.parametrize("advantage", ["group-zscore", "group-centered", "leave-one-out"])
def test_a_group_of_one_cannot_be_compared(advantage: str) -> None:
    data = {
        "algorithm": "grpo",
        "rollout": {"num_generations": 1},
        "objective": {"advantage": advantage},
    }
    message = mistake(data)
    assert message.startswith(f"rollout.num_generations is 1, but objective.advantage {advantage} ")
    assert message.endswith("use at least 2, or batch-normalized advantages")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {
                "algorithm": "grpo",
                "rollout": {"num_generations": 1, "num_prompts": 1},
                "objective": {"advantage": "batch-normalized"},
            },
            "one completion per step has nothing to be compared with: sample more",
        ),
        (
            {
                "algorithm": "opo",
                "rollout": {"num_generations": 1},
                "objective": {"advantage": "batch-normalized"},
            },
            "rollout.num_generations is 1, but opo compares the completions of a prompt",
        ),
        (
            {
                "algorithm": "opo",
                "rollout": {"num_generations": 1},
                "objective": {"advantage": "batch-normalized", "drive": "zscore"},
            },
            "rollout.num_generations is 1, but opo compares the completions of a prompt",
        ),
    ],
)
def test_where_nothing_can_be_compared(data: dict[str, Any], complaint: str) -> None:
    assert mistake(data).startswith(complaint)


def test_a_group_of_one_is_fine_with_the_batch_as_its_group() -> None:
    data = {
        "algorithm": "grpo",
        "rollout": {"num_generations": 1},
        "objective": {"advantage": "batch-normalized"},
    }
    assert resolve(data, {}, "test").rollout.num_generations == 1


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {"algorithm": "grpo", "rollout": {"num_prompts": 6}, "update": {"num_minibatches": 4}},
            "update.num_minibatches 4 does not divide rollout.num_prompts 6: a prompt's group "
            "stays in one minibatch",
        ),
        (
            {"algorithm": "isopo", "geometry": {"ntk_damping": 1.0}},
            "geometry.ntk_damping is not an option of isopo, an isometric rule",
        ),
        (
            {"algorithm": "isopo-natural", "geometry": {"fisher_power": 1.0, "damping": 1.0}},
            "geometry.damping is not an option of isopo-natural, the natural rule",
        ),
        (
            {"algorithm": "isopo", "geometry": {"damping_form": "relative"}},
            'damping_form "relative" needs damping > 0; try damping=1.0',
        ),
        (
            {"algorithm": "isopo-natural", "geometry": {"damping_form": "relative"}},
            'damping_form "relative" has no units to preserve: use scale="paper"',
        ),
        (
            {"algorithm": "grpo", "task": {"name": "table"}},
            "task.train is needed: a JSONL or Parquet file, or a hub data set",
        ),
        (
            {"algorithm": "grpo", "task": {"name": "gsm8k"}},
            "model.name embedded knows only arithmetic's characters, not gsm8k's: name a model of "
            "the hub or a local folder",
        ),
        (
            {"algorithm": "grpo", "task": {"name": "svamp"}},
            "model.name embedded knows only arithmetic's characters, not svamp's",
        ),
        (
            {"algorithm": "grpo", "task": {"name": "table", "train": "x.jsonl"}},
            "model.name embedded knows only arithmetic's characters, not table's",
        ),
        (
            {"algorithm": "grpo", "task": {"reward_weights": [1.0]}},
            "task.reward_weights needs task.rewards, with one weight for each",
        ),
        (
            {
                "algorithm": "grpo",
                "task": {"rewards": ["exact_match"], "reward_weights": [1.0, 2.0]},
            },
            "task.reward_weights needs task.rewards, with one weight for each",
        ),
        (
            {"algorithm": "grpo", "optimizer": {"momentum": 0.9}},
            "optimizer.momentum is not an option of adamw, which has betas and eps: leave it null",
        ),
        (
            {
                "algorithm": "isopo-natural",
                "geometry": {"interact": "group"},
                "update": {"microbatch_size": 4},
                "rollout": {"num_generations": 8},
            },
            "update.microbatch_size 4 is below rollout.num_generations 8",
        ),
        (
            {"algorithm": "isopo", "geometry": {"interact": "group"}},
            "geometry.interact is not an option of isopo, an isometric rule",
        ),
        (
            {"algorithm": "isopo-natural", "model": {"head": "chunked"}},
            "model.head chunked has no kernel",
        ),
        (
            {
                "algorithm": "isopo",
                "geometry": {"fisher": "sequences"},
                "model": {"head": "chunked"},
            },
            "use model.head full",
        ),
        (
            {
                "algorithm": "grpo",
                "model": {"head": "chunked"},
                "regularizer": {"entropy_coef": 0.1},
            },
            "regularizer needs all logits",
        ),
        (
            {"algorithm": "grpo", "model": {"head": "chunked"}, "regularizer": {"kl_coef": 0.1}},
            "take regularizer.kl_estimator k2",
        ),
        (
            {"algorithm": "grpo", "regularizer": {"kl_coef": 0.1, "kl_in": "reward"}},
            "regularizer.kl_in reward needs a regularizer.kl_estimator that depends on the sampled "
            "token, or its last token's choice would cost nothing: use k1",
        ),
        (
            {"algorithm": "grpo", "regularizer": {"kl_estimator": "k3"}},
            "regularizer.kl_estimator is of a divergence that regularizer.kl_coef 0 does not price",
        ),
        (
            {"algorithm": "dapo", "rollout": {"overlong_penalty": 2.0}},
            "rollout.overlong_penalty is the largest punishment within rollout.overlong_buffer",
        ),
        (
            {"algorithm": "dapo", "rollout": {"overlong_buffer": 65}},
            "rollout.overlong_buffer 65 is longer than a completion can be "
            "(rollout.max_completion_length 64): lower it",
        ),
        (
            {
                "algorithm": "reinforce",
                "objective": {"advantage": "batch-normalized"},
                "rollout": {"num_generations": 1, "dynamic_sampling_max_batches": 2},
            },
            "rollout.dynamic_sampling_max_batches looks for completions of a prompt with different "
            "rewards, but rollout.num_generations is 1",
        ),
        (
            {
                "algorithm": "isopo",
                "geometry": {
                    "overlap_source": "previous_step",
                    "num_overlap_positions": None,
                },
            },
            "geometry.num_overlap_positions",
        ),
        (
            {"algorithm": "grpo", "model": {"dtype": "bfloat16", "autocast": "bfloat16"}},
            "model.autocast computes with float32 weights in bfloat16, but model.dtype is bfloat16 "
            "already: leave one of them out",
        ),
        *(
            (
                {
                    "algorithm": "grpo",
                    "model": {"dtype": "bfloat16"},
                    "optimizer": {"name": optimizer},
                },
                f"optimizer.name {optimizer} keeps its preconditioner in the dtype of the weights, "
                "and model.dtype bfloat16 is too coarse for one: use float32",
            )
            for optimizer in ("soap", "kron")
        ),
    ],
)
def test_settings_that_do_not_go_together(data: dict[str, Any], complaint: str) -> None:
    assert complaint in mistake(data)


OPTIONS = {"muon_learning_rate": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "momentum": 0.5}


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
@pytest.mark.parametrize("key", OPTIONS)
def test_an_optimizer_takes_its_own_options_alone(name: str, key: str) -> None:
    data = {"algorithm": "grpo", "optimizer": {"name": name, key: OPTIONS[key]}}
    if key in OPTIMIZER_OPTIONS[name]:
        assert resolve(data, {}, "test").optimizer.options() == {key: OPTIONS[key]}
    else:
        message = mistake(data)
        assert message.startswith(f"optimizer.{key} is not an option of {name}, which has ")
        assert all(own in message for own in OPTIMIZER_OPTIONS[name])


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
def test_a_zero_is_set_and_null_is_not(name: str) -> None:
    plain = resolve({"algorithm": "grpo", "optimizer": {"name": name}}, {}, "test").optimizer
    assert plain.options() == {}
    foreign = {"algorithm": "grpo", "optimizer": {"name": "adamw", "momentum": 0.0}}
    assert "momentum is not an option of adamw" in mistake(foreign)


@pytest.mark.parametrize(
    ("evaluation", "regularizer", "lora", "kept"),
    [
        (True, 0.0, None, True),
        (False, 0.0, None, False),
        (False, 0.1, None, True),
        (True, 0.1, {"rank": 2}, False),
    ],
)
def test_when_a_copy_of_the_initial_weights_is_kept(
    evaluation: bool, regularizer: float, lora: Any, kept: bool
) -> None:
    data = {
        "algorithm": "grpo",
        "model": {"lora": lora},
        "evaluation": {"kl_policy_initial": evaluation},
        "regularizer": {"kl_coef": regularizer},
    }
    assert resolve(data, {}, "test").keeps_initial is kept


def test_settings_that_do_go_together() -> None:
    data = {
        "algorithm": "isopo-natural",
        "geometry": {"damping_form": "relative", "scale": "paper", "ntk_damping": 2.0},
        "model": {"name": "some/model"},
        "task": {"name": "table", "train": "x.jsonl", "rewards": ["a.py:f"], "reward_weights": [2]},
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "regularizer": {"entropy_coef": 0, "kl_coef": 0.1},
        "rollout": {"num_prompts": 6},
        "update": {"num_minibatches": 3},
    }
    recipe = resolve(data, {}, "test")
    assert recipe.geometry.to_rule() == PRESETS["isopo-natural"].__class__(
        ntk_damping=2.0, damping_form="relative", scale="paper"
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_kl_estimate_goes_with_the_chunked_head(estimator: str, place: str) -> None:
    data = {
        "algorithm": "isopo",
        "model": {"head": "chunked"},
        "regularizer": {"kl_coef": 0.1, "kl_estimator": estimator, "kl_in": place},
        "rollout": {"overlong_buffer": 64, "dynamic_sampling_max_batches": 1},
    }
    section = resolve(data, {}, "test").regularizer
    assert (section.in_loss, section.in_reward) == (place == "loss", place == "reward")
    assert not section.needs_logits


# Files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", ": a recipe is a YAML mapping of keys to values"),
        ("- 1\n- 2\n", ": a recipe is a YAML mapping of keys to values"),
        ("just words\n", ": a recipe is a YAML mapping of keys to values"),
        ("algorithm: grpo\nsteps: [1,\n  2\nseed: 3\n", ", line 4: not valid YAML: "),
        ("algorithm: grpo\n\tsteps: 3\n", ", line 2: not valid YAML: "),
        ("algorithm: grpo\nsteps: *x\n", ", line 2: not valid YAML: found undefined alias 'x'"),
        ("algorithm: !!python/name:os.system\n", ", line 1: not valid YAML: could not determine"),
        ("algorithm: grpo\n---\nseed: 1\n", ", line 2: not valid YAML: but found another document"),
        (b"\x80\x02\xff\xfe\x00", ": not a text file in UTF-8; a recipe is YAML"),
        (b"algorithm: \x00\x01\n", ": not valid YAML: "),
        ("algorithm: grpo\n1: 2\n", ": 1: keys should be strings, got 1"),
        ("algorithm: grpo\nmodel: {2: 3}\n", ": model.2: keys should be strings, got 2"),
        ("algorithm: grpo\nobjective: {3: 4}\n", ": objective.3: keys should be strings, got 3"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = write(tmp_path / "recipe.yaml", content)
    with pytest.raises(ProxstepError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}{complaint}")


@pytest.mark.parametrize(
    "text", ["2024-13-45", "0x_", "!!int x", "9" * 5000, "[" * 1500, "!!float x", "{a: 1, a: 2}"]
)
def test_values_that_yaml_cannot_construct(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", "algorithm: grpo\n")
    with pytest.raises(ProxstepError, match=r"^--output_dir: .* is not a valid YAML value$"):
        load_recipe(path, [("output_dir", text)])
    write(path, f"algorithm: grpo\noutput_dir: {text}\n")
    with pytest.raises(ProxstepError, match=rf"^{path}(, line 2)?: not valid YAML: ") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "model: {name: x, name: y}\n"])
def test_a_key_given_twice(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", f"algorithm: grpo\n{text}")
    with pytest.raises(ProxstepError, match=r"not valid YAML: the key (seed|name) is given twice$"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["missing.yaml", "", "no/such/folder.yaml"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ProxstepError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: no such recipe file; recipes/ has examples"


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", b"\xef\xbb\xbfalgorithm: grpo\r\nsteps: 3\r\n")
    assert load_recipe(path).steps == 3


# Anything at all


KEYS = sorted(
    {part for _, key in LEAVES for part in key.split(".")} | {"algorithm", "per_algorithm", "lora"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=5)
    | st.sampled_from([*ALGORITHMS, *COMPOSED, "none", "isopo+grpo", "table", "sgd", "natural"])
    | st.dates()
    | st.binary(max_size=3)
)
NAMES = st.sampled_from(KEYS) | st.text(max_size=4) | st.integers(-1, 1) | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
QUICK = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def resolves_or_says_why(data: Any, changes: Any) -> None:
    try:
        recipe = resolve(data, changes, "fuzz")
    except ProxstepError as error:
        message = str(error)
    else:
        message = "fuzz: none"
        yaml.safe_load(dump_recipe(recipe))
    assert message.startswith("fuzz: ")


@QUICK
@given(data=st.dictionaries(NAMES, VALUES, max_size=6), changes=st.dictionaries(NAMES, VALUES))
def test_any_mapping_resolves_or_says_why(data: dict[Any, Any], changes: dict[Any, Any]) -> None:
    resolves_or_says_why(data, changes)


@QUICK
@given(
    algorithm=st.sampled_from([*ALGORITHMS, *COMPOSED]),
    key=st.sampled_from(sorted({key for _, key in LEAVES} | {"per_algorithm", "model.lora"})),
    value=VALUES,
    extra=NAMES,
)
def test_a_recipe_with_one_odd_value_resolves_or_says_why(
    algorithm: str, key: str, value: Any, extra: Any
) -> None:
    resolves_or_says_why({"algorithm": algorithm}, nested(key, value))
    section = key.split(".")[0]
    resolves_or_says_why({"algorithm": algorithm, section: {extra: value}}, {})


@QUICK
@given(
    key=st.sampled_from(sorted({key for _, key in LEAVES})) | st.text(max_size=8),
    text=st.text(max_size=12)
    | st.text("[]{}:,&*!|>'\"#%@`-? \n\tae01.", max_size=8)
    | st.floats().map(str),
)
def test_any_override_is_applied_or_refused(
    key: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text("algorithm: grpo\n")
    try:
        recipe = load_recipe(path, [(key, text)])
    except ProxstepError:
        return
    assert isinstance(recipe, Recipe)

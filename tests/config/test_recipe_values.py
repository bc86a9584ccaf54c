"""Keys and values that are unknown, of the wrong type or out of range."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
from tests.config.recipe_case import LEAVES, known_here, mistake, nested, write

from proxstep.algorithms import ALGORITHMS
from proxstep.config.loading import load_recipe
from proxstep.config.objectives import section_of
from proxstep.errors import ProxstepError

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


@pytest.mark.parametrize("objective", ALGORITHMS)
def test_unknown_keys_of_every_objective(objective: str) -> None:
    names = list(section_of(ALGORITHMS[objective]).model_fields)
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
    here = "(known here: name, advantage, loss_agg_mode)"
    assert message == f"unknown key objective.mu; it belongs to opo, gopo {here}"
    message = mistake({"algorithm": "grpo"}, alpha=0.2)
    assert message.startswith("unknown key alpha; did you mean model.lora.alpha or objective.alpha")


def test_several_mistakes_come_in_one_message() -> None:
    message = mistake({"algorithm": "grpo", "stps": 1, "seed": -1, "model": {"dtype": "int8"}})
    lines = message.splitlines()
    assert len(lines) == 3
    assert {line.strip().split()[0] for line in lines} == {"unknown", "seed:", "model.dtype:"}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rate", "did you mean optimizer.learning_rate?"),
        ("optimizer.num_prompts", "did you mean rollout.num_prompts?"),
        ("every", "did you mean evaluation.every?"),
        ("model.rank", "did you mean model.lora.rank?"),
    ],
)
def test_a_key_in_the_wrong_section_comes_with_its_own(key: str, hint: str) -> None:
    message = mistake({"algorithm": "grpo"}, **nested(key, 1))
    assert message.startswith(f"unknown key {key}; {hint}")


# Words and numbers of YAML 1.1 and Python


@pytest.mark.parametrize("value", ["100.0", "1e2"])
def test_an_exact_integer_may_have_an_exponent(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", f"algorithm: grpo\nsteps: {value}\n")
    assert load_recipe(path, [("update.microbatch_size", "1.6e1")]).steps == 100
    with pytest.raises(ProxstepError, match=r"seed: .*got 0\.5"):
        load_recipe(path, [("seed", "5e-1")])


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("evaluation.kl_policy_initial", "off", "got 'off'; YAML 1.2 writes false"),
        ("evaluation.kl_policy_initial", "Yes", "got 'Yes'; YAML 1.2 writes true"),
        ("steps", "1e2", "got '1e2'; write it without quotes"),
        ("task.validation", "None", "null is what stands for nothing in YAML, got 'None'"),
        ("optimizer.max_grad_norm", "None", "null is what stands for nothing in YAML"),
        ("optimizer.betas", "none", "null is what stands for nothing in YAML"),
    ],
)
def test_words_of_other_languages_come_with_yamls(key: str, value: str, hint: str) -> None:
    message = mistake({"algorithm": "grpo"}, **nested(key, value))
    assert message.startswith(f"{key}: ")
    assert hint in message


# Wrong types and values


@pytest.mark.parametrize(("objective", "key"), LEAVES)
@pytest.mark.parametrize("value", [{1: "no"}, [[None]], datetime.date(2026, 1, 1)], ids=repr)
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
        ("model.autocast", "float16", "input should be 'bfloat16' or 'auto', got 'float16'"),
        ("regularizer.kl_coef", -0.1, "input should be greater than or equal to 0, got -0.1"),
        ("regularizer.entropy_coef", -1, "input should be greater than or equal to 0, got -1"),
        ("evaluation.kl_policy_initial", 1, "input should be a valid boolean, got 1"),
        ("evaluation.kl_policy_initial", "no", "input should be a valid boolean, got 'no'"),
        ("model.dtype", "int8", "input should be 'float32' or 'bfloat16', got 'int8'"),
        ("model.name", None, "input should be a valid string, got None"),
        ("model.lora", 16, "expected keys and values, got 16"),
        ("task.difficulty", 9, "input should be less than or equal to 5, got 9"),
        ("task.rewards", 3, "input should be a valid list, got 3"),
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

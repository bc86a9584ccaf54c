"""The recipes of the papers' settings: the figures, and that every line in their heads loads."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from proxstep.config.loading import load_recipe
from proxstep.config.recipe import Recipe
from proxstep.isopo import PRESETS

RECIPES = Path(__file__).parents[2] / "recipes"
GSM8K, MATH = RECIPES / "gsm8k-isopo.yaml", RECIPES / "math-opo.yaml"


def load(path: Path, algorithm: str) -> Recipe:
    return load_recipe(path, [("algorithm", algorithm)])


def commands(path: Path) -> list[list[str]]:
    """The command lines in a recipe's head."""
    head = path.read_text().split("\nalgorithm:")[0]
    text = "\n".join(line.removeprefix("#") for line in head.splitlines()).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("proxstep ")]


def chosen(command: list[str], option: str, default: str) -> str:
    return command[command.index(option) + 1] if option in command else default


@pytest.mark.parametrize("path", [GSM8K, MATH], ids=lambda path: path.name)
def test_every_command_in_the_head_loads(path: Path) -> None:
    """Each option is either the command's own or a key of the recipe."""
    outputs = []
    for command in commands(path):
        assert command[1] in ("train", "compare")
        assert command[2] == path.stem
        names, values = command[3::2], command[4::2]
        assert all(name.startswith("--") for name in names), command
        options = dict(zip(names, values, strict=True))
        own = {"--engine", "--algorithms", "--seeds", "--output"}
        assert options.pop("--engine", "local") in ("local", "trl", "verl")
        overrides = [(k.removeprefix("--"), v) for k, v in options.items() if k not in own]
        for algorithm in options.get("--algorithms", "").split(","):
            with_algorithm = [("algorithm", algorithm)] if algorithm else []
            recipe = load_recipe(path, overrides + with_algorithm)
        outputs.append(options.get("--output", recipe.output_dir))
    assert len(outputs) > 8


@pytest.mark.parametrize(
    ("path", "baselines"),
    [
        (
            GSM8K,
            {"isopo", "grpo", "reinforce", "isopo-figure4", "isopo-euclidean", "isopo-natural"},
        ),
        (MATH, {"opo", "grpo", "gspo", "dapo"}),
    ],
    ids=["gsm8k", "math"],
)
def test_the_head_names_the_paper_s_algorithms_and_both_engines(
    path: Path, baselines: set[str]
) -> None:
    named, engines = {load_recipe(path).algorithm}, set()
    folders: set[tuple[str, ...]] = set()
    for command in commands(path):
        named |= set(chosen(command, "--algorithms", "").split(",")) - {""}
        named |= {chosen(command, "--algorithm", "")} - {""}
        engines |= {(chosen(command, "--engine", "local"), chosen(command, "--algorithm", "own"))}
        folder = chosen(command, "--output_dir", chosen(command, "--output", ""))
        if folder:
            assert (folder,) not in folders, f"two commands write {folder}"
            folders.add((folder,))
    assert named == baselines
    for engine in ("trl", "verl"):
        assert {(engine, "own"), (engine, "grpo")} <= engines


def test_per_algorithm_covers_no_stranger() -> None:
    for path in (GSM8K, MATH):
        block = path.read_text().split("\nper_algorithm:")[1]
        listed = set(re.findall(r"^  ([a-z0-9-]+):", block, re.MULTILINE))
        named = {w for c in commands(path) for o in c for w in o.split(",")} | {"isopo", "opo"}
        assert listed <= named


@pytest.mark.parametrize(
    "algorithm",
    ["isopo", "isopo-figure4", "isopo-euclidean", "isopo-natural", "grpo", "reinforce"],
)
def test_gsm8k_has_the_figures_of_isopo(algorithm: str) -> None:
    recipe = load(GSM8K, algorithm)
    assert (recipe.model.name, recipe.task.name) == ("Qwen/Qwen3-0.6B", "gsm8k")
    assert recipe.rollout.num_prompts == 128
    assert recipe.rollout.num_generations == 8
    assert recipe.update.num_minibatches * recipe.update.num_iterations == 2
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("adamw", 2e-6)
    assert recipe.regularizer.kl_coef == 0
    assert recipe.regularizer.entropy_coef == 0
    assert recipe.objective.advantage == "group-zscore"
    assert (recipe.task.num_validation, recipe.steps) == (1319, 50)
    assert recipe.evaluation.kl_policy_initial


def test_gsm8k_has_the_powers_and_the_damping_of_the_figures() -> None:
    powers = {"isopo": (-1, 0, 0), "isopo-figure4": (0, -1, -2), "isopo-euclidean": (0, -1, 0)}
    for algorithm, pqr in powers.items():
        geometry = load(GSM8K, algorithm).geometry
        rule = geometry.to_rule()
        assert (rule.fisher_power, rule.norm_power, rule.relative_fisher_power) == pqr
        assert (rule.damping, rule.scale) == (0, "paper")
    natural = load(GSM8K, "isopo-natural").geometry
    assert natural.to_rule() == replace(PRESETS["isopo-natural"], scale="paper")
    assert (natural.ntk_damping, natural.decay) == (1.0, 0.9)
    grpo = load(GSM8K, "grpo")
    assert grpo.objective.name == "grpo"
    assert (grpo.objective.clip_ratio_low, grpo.objective.clip_ratio_high) == (0.2, 0.2)
    assert grpo.geometry.rule == load(GSM8K, "reinforce").geometry.rule == "none"


@pytest.mark.parametrize("algorithm", ["opo", "grpo", "gspo", "dapo"])
def test_math_has_the_figures_of_opo_s_table_1(algorithm: str) -> None:
    recipe = load(MATH, algorithm)
    assert (recipe.model.name, recipe.task.name, recipe.task.level) == (
        "Qwen/Qwen3-1.7B",
        "math",
        3,
    )
    assert (recipe.rollout.num_prompts, recipe.rollout.num_generations) == (32, 6)
    assert (recipe.optimizer.learning_rate, recipe.steps) == (2e-6, 224)
    assert recipe.objective.advantage == "group-zscore"
    assert recipe.regularizer.kl_coef == 0
    assert recipe.update.num_minibatches > 1
    assert recipe.task.rewards is None  # math_verify


def test_math_has_each_algorithm_s_own_settings() -> None:
    opo = load(MATH, "opo").objective
    assert opo.name == "opo"
    assert (opo.alpha, opo.mu, opo.adaptive_tau) == (0.4, 1.0, True)
    assert (opo.tau_min, opo.tau_max) == (0.2, 1.5)
    dapo = load(MATH, "dapo")
    assert dapo.objective.name == "dapo"
    assert (dapo.objective.clip_ratio_high, dapo.objective.loss_agg_mode) == (0.28, "token-mean")
    assert dapo.rollout.dynamic_sampling_max_batches is not None
    assert dapo.rollout.mask_truncated_completions
    assert dapo.rollout.overlong_buffer is not None
    gspo = load(MATH, "gspo").objective
    assert gspo.name == "gspo"
    assert (gspo.clip_ratio_low, gspo.clip_ratio_high) == (3e-4, 4e-4)
    for algorithm in ("opo", "grpo", "gspo"):
        rollout = load(MATH, algorithm).rollout
        assert rollout.dynamic_sampling_max_batches is rollout.overlong_buffer is None
        assert not rollout.mask_truncated_completions

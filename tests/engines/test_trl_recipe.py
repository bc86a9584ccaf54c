"""A recipe in TRL's terms: every key becomes something, or is refused by name."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine import tiny_recipe

from proxstep.algorithms.temperature import TEMPERATURE_KEYS
from proxstep.config.explain import describe_keys
from proxstep.config.loading import load_recipe
from proxstep.config.recipe import Recipe, algorithm_names
from proxstep.engines.keys import is_known, leaves
from proxstep.engines.trl import translation
from proxstep.engines.trl.expressions import Call, Shared, make
from proxstep.engines.trl.script import script
from proxstep.engines.trl.tables import KNOWN, RENAMED, RUN_FOLDER, SAME_ANYHOW, TRANSLATED
from proxstep.engines.trl.translation import translate
from proxstep.errors import ProxstepError
from proxstep.rewards import reward_name
from proxstep.training import lifecycle

ROOT = Path(__file__).parents[2]
OURS = ROOT / "recipes" / "smollm2.yaml"
"""It begins with a supervised warm-up, which TRL's trainer has not."""
RECIPES = sorted({*(ROOT / "recipes").glob("*.yaml")} - {OURS})
KEYS = {key: (kind.split(" | "), default) for key, kind, default, _ in describe_keys()}
OTHERS = {"text": "other", "int": 5, "float": 0.35, "true": True, "list of float": [0.8, 0.9]}
"""A value of each kind; the recipes below have no such one by default."""

TABLE = {"model": {"name": "some/model"}, "task": {"name": "table", "train": "rows.jsonl"}}
HUB = {**TABLE, "task": {"name": "table", "train": "some/data", "validation": "some/data"}}
GSM8K = {"model": {"name": "some/model"}, "task": {"name": "gsm8k"}}
ADAPTIVE = {"objective": {"adaptive_tau": True}}
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "model.warmup_solutions": ("isopo", GSM8K),
    "model.warmup_learning_rate": (
        "isopo",
        {**GSM8K, "model": {"name": "some/model", "warmup_solutions": 8}},
    ),
    "model.lora.": ("isopo", {"model": {"lora": {"rank": 4}}}),
    "task.prompt_column": ("isopo", TABLE),
    "task.answer_column": ("isopo", TABLE),
    "task.config": ("isopo", HUB),
    "task.train_split": ("isopo", HUB),
    "task.validation_split": ("isopo", HUB),
    "task.train": ("isopo", TABLE),
    "task.validation": ("isopo", TABLE),
    "task.num_train": ("isopo", TABLE),
    "task.n": ("isopo", GSM8K),
    **{
        f"task.{key}": ("isopo", GSM8K)
        for key in ("prompt_format", "instruction", "system", "num_few", "chat", "drop_long")
    },
    "task.few_shot_seed": ("isopo", {**GSM8K, "task": {"name": "gsm8k", "num_few_shot": 2}}),
    "task.level": ("isopo", {**GSM8K, "task": {"name": "math"}}),
    "task.reward_weights": ("isopo", {"task": {"rewards": ["exact_match", "numeric_answer"]}}),
    **{f"objective.{key}": ("opo", ADAPTIVE) for key in TEMPERATURE_KEYS if key != "adaptive_tau"},
    "geometry.ntk_damping": ("isopo-natural", {}),
    "geometry.interact": ("isopo-natural", {"update": {"microbatch_size": 8}}),
    "regularizer.": ("isopo", {"regularizer": {"kl_coef": 0.1, "kl_estimator": "k3"}}),
    "rollout.overlong_penalty": ("isopo", {"rollout": {"overlong_buffer": 2}}),
    "optimizer.muon": ("isopo", {"optimizer": {"name": "muon"}}),
    "optimizer.min_lr_rate": ("isopo", {"optimizer": {"lr_scheduler_type": "cosine"}}),
    "optimizer.momentum": ("isopo", {"optimizer": {"name": "sgd"}}),
    "update.kl_": ("isopo", {"update": {"kl_budget": 0.1}}),
    "update.kl_budget": ("isopo", {}),
    "update.kl_budget_per": ("isopo", {"update": {"kl_budget": 0.1}}),
    "evaluation.temperature": ("isopo", {"evaluation": {"num_samples": 4}}),
    "rollout.gpu_memory": ("isopo", {"rollout": {"engine": "vllm"}}),
    "logging.project": ("isopo", {"logging": {"tracker": "wandb"}}),
}
"""By the beginning of a key: the algorithm and the keys that it needs beside it."""
VALUES: dict[str, Any] = {
    "device": "cpu",
    "external_lib": "json",
    "model.name": "some/model",
    "model.lora": {"rank": 4},
    "task.name": "svamp",
    "task.chat_template_kwargs": {"enable_thinking": False},
    "task.rewards": ["exact_match", "numeric_answer"],
    "objective.target_min": -0.5,
    "objective.tau_max": 1.2,
    "regularizer.kl_estimator": "k2",
    "rollout.overlong_buffer": 2,
    "rollout.stop": ["."],
    "update.num_minibatches": 2,
}


def other_value(key: str) -> Any:
    """A value of the key that is not its default."""
    name, _, _ = key.partition(" ")
    if name in VALUES:
        return VALUES[name]
    kinds, default = KEYS[key]
    kind = next(kind for kind in kinds if kind not in (default, "null", str(default).lower()))
    if kind == "false":
        return False
    return OTHERS.get(kind, kind)


def recipes_of(folder: Path, key: str) -> tuple[Recipe, Recipe]:
    """A recipe in which the key has its default, and the same with another value."""
    name, _, of = key.partition(" (")
    beginnings = [beginning for beginning in BESIDE if name.startswith(beginning)]
    algorithm, beside = BESIDE[max(beginnings, key=len)] if beginnings else ("isopo", {})
    algorithm = of.rstrip(")") or algorithm
    if name in ("algorithm", "geometry.rule"):  # the rule follows from the algorithm
        first, second = (
            ("isopo", "opo") if name == "algorithm" else ("isopo+gspo", "isopo-npg+gspo")
        )
        return tiny_recipe(folder, first), tiny_recipe(folder, second)
    changed: dict[str, Any] = {top: dict(value) for top, value in beside.items()}
    *sections, last = name.split(".")
    below = changed
    for section in sections:
        below[section] = dict(below.get(section, {}))
        below = below[section]
    below[last] = other_value(key)
    return tiny_recipe(folder, algorithm, **beside), tiny_recipe(folder, algorithm, **changed)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_the_script_or_is_refused(tmp_path: Path, key: str) -> None:
    """What changes nothing is listed as such; nothing else is dropped."""
    name = key.partition(" ")[0]
    before, after = recipes_of(tmp_path, key)
    assert leaves(before) != leaves(after)
    try:
        changed = script(before) != script(after)
    except ProxstepError as error:
        refused = str(error)
        assert name not in (*RUN_FOLDER, *SAME_ANYHOW)
        others = ("algorithm", "optimizer.name", "model.warmup_solutions")
        assert refused.split()[0] in (name, "rollout.engine", *others)
        assert "--engine trl: " in refused
        return
    assert changed == (name not in (*RUN_FOLDER, *SAME_ANYHOW))


def test_the_tables_know_every_key() -> None:
    named = [*RENAMED, *TRANSLATED, *RUN_FOLDER, *SAME_ANYHOW]
    assert len(set(named)) == len(named)
    for key in KEYS:
        assert is_known(key.partition(" ")[0], KNOWN), key
    for name in named:
        assert any(is_known(key.partition(" ")[0], [name]) for key in KEYS), name


def test_a_key_that_nothing_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by name, but for its default."""
    monkeypatch.setattr(translation, "KNOWN", tuple(k for k in KNOWN if k != "model.autocast"))
    assert script(tiny_recipe(tmp_path, "isopo"))
    with pytest.raises(ProxstepError, match=r"^model.autocast bfloat16 is not for --engine trl"):
        script(tiny_recipe(tmp_path, "isopo", model={"autocast": "bfloat16"}))


@pytest.mark.parametrize(
    ("algorithm", "changes", "key"),
    [
        ("opo", {"device": "cuda:1"}, "device cuda:1"),
        ("isopo", {"optimizer": {"name": "soap"}}, "optimizer.name soap"),
        (
            "dapo",
            {"rollout": {"dynamic_sampling_max_batches": 3}},
            "dynamic_sampling_max_batches 3",
        ),
        ("opo", {"rollout": {"importance_cap": 2.0}}, "rollout.importance_cap 2.0"),
        ("grpo", {"rollout": {"engine": "vllm"}}, "rollout.engine vllm"),
        ("grpo", {"rollout": {"stop": ["."]}}, "rollout.stop"),
        ("grpo", {"rollout": {"prefill": "So"}}, "rollout.prefill So"),
        ("isopo", {"update": {"microbatch_size": 5}}, "update.microbatch_size 5"),
        ("isopo", {"geometry": {"diagnose_every": 5}}, "geometry.diagnose_every 5"),
        (
            "grpo",
            {"optimizer": {"lr_scheduler_type": "linear", "min_lr_rate": 0.1}},
            "optimizer.min_lr_rate 0.1",
        ),
        ("grpo", {"regularizer": {"kl_coef": 0.1}}, "regularizer.kl_estimator exact"),
        (
            "reinforce",
            {
                "objective": {"advantage": "batch-normalized"},
                "rollout": {"num_generations": 1},
            },
            "rollout.num_generations 1",
        ),
    ],
)
def test_what_trl_cannot_do_is_one_message(
    tmp_path: Path, algorithm: str, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ProxstepError) as caught:
        translate(tiny_recipe(tmp_path, algorithm, **changes), chat=False)
    message = str(caught.value)
    assert key in message
    assert "\n" not in message
    assert message.count(" is not for --engine trl: ") == 1


@pytest.mark.parametrize(
    ("algorithm", "trainer", "expected"),
    [
        ("grpo", "GRPOTrainer", {"loss_type": "grpo"}),
        ("dapo", "GRPOTrainer", {"epsilon_high": 0.28}),
        ("dr-grpo", "GRPOTrainer", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (
            "gspo",
            "GRPOTrainer",
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 3e-4,
                "epsilon_high": 4e-4,
            },
        ),
        ("cispo", "GRPOTrainer", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("opo", "OpoTrainer", {}),
        ("reinforce", "PolicyTrainer", {"loss_type": "reinforce"}),
        ("rloo", "PolicyTrainer", {"loss_type": "rloo"}),
        ("dro", "PolicyTrainer", {"loss_type": "dro"}),
        ("isopo", "IsopoTrainer", {}),
        ("isopo+rloo", "IsopoTrainer", {"loss_type": "rloo"}),
        ("isopo-natural+opo", "IsopoTrainer", {"rule": "isopo-natural", "loss_type": "opo"}),
    ],
)
def test_algorithms_are_these_trainers(
    tmp_path: Path, algorithm: str, trainer: str, expected: dict[str, Any]
) -> None:
    made = translate(tiny_recipe(tmp_path, algorithm), chat=False)
    names = {"rule", "loss_type", "epsilon", "epsilon_high", "scale_rewards", "reward_weights"}
    names |= {"importance_sampling_level", "loss_agg_mode"}
    assert made.trainer.name == trainer
    assert {k: v for k, v in made.args.keywords.items() if k in names} == expected


@pytest.mark.parametrize(
    ("algorithm", "changes", "expected"),
    [
        ("cispo", {"objective": {"clip_ratio_low": 0.2}}, {"clip_ratio_low": 0.2}),
        (
            "cispo",
            {"objective": {"loss_agg_mode": "seq-mean-token-mean"}},
            {"loss_agg_mode": "seq-mean-token-mean"},
        ),
        ("grpo", {"objective": {"advantage": "leave-one-out"}}, {"advantage": "leave-one-out"}),
        ("grpo", {"rollout": {"mask_truncated_completions": True}}, {}),
        ("dr-grpo", {"regularizer": {"kl_coef": 0.1, "kl_estimator": "k3"}}, {}),
        ("dro", {"objective": {"beta": 0.5}}, {"objective_beta": 0.5}),
    ],
)
def test_what_trl_s_own_trainer_computes_otherwise_is_ours(
    tmp_path: Path, algorithm: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    made = translate(tiny_recipe(tmp_path, algorithm, **changes), chat=False)
    assert made.trainer.name == "PolicyTrainer"
    names = {"clip_ratio_low", "loss_agg_mode", "advantage", "objective_beta"}
    found = made.args.keywords
    assert found["loss_type"] == algorithm
    assert {name: found[name] for name in names if name in found} == expected


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sizes(tmp_path: Path, minibatches: int, size: int | None, iterations: int) -> None:
    """A step's completions, its microbatches and its updates, whatever the number of ranks."""
    update = {"num_minibatches": minibatches, "num_iterations": iterations}
    if size is not None:
        update["microbatch_size"] = size
    recipe = tiny_recipe(tmp_path, "isopo", update=update)
    made = translate(recipe, chat=False)
    for world_size in (1, 2):
        options = {key: make(value, world_size) for key, value in made.args.keywords.items()}
        args = make(made.args.function, 1)(use_cpu=True, **options)
        assert args.per_device_train_batch_size == (size or 16 // minibatches // world_size)
        accumulated = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert accumulated * world_size * minibatches == 16
        assert args.steps_per_generation == args.gradient_accumulation_steps * minibatches
        assert args.num_iterations == iterations
        assert args.max_steps == 3 * minibatches * iterations == 3 * recipe.update.num_updates
    with pytest.raises(ProxstepError, match="cannot be shared out over 3 ranks evenly"):
        [make(value, 3) for value in made.args.keywords.values()]


def test_shared_counts_are_written_for_any_number_of_ranks(tmp_path: Path) -> None:
    text = script(tiny_recipe(tmp_path, "isopo", update={"microbatch_size": 2}))
    assert "gradient_accumulation_steps=8 // world_size," in text
    assert 'world_size = int(os.environ.get("WORLD_SIZE", "1"))' in text


@pytest.mark.parametrize("task", ["arithmetic", "gsm8k", "svamp", "table"])
def test_the_rewards_are_the_task_s_own(tmp_path: Path, task: str) -> None:
    changes: dict[str, Any] = {}
    if task != "arithmetic":
        rows = tmp_path / "rows.jsonl"
        row = {
            "gsm8k": {"question": "1+1?", "answer": "#### 2"},
            "svamp": {"Body": "1", "Question": "1+1?", "Answer": 2},
            "table": {"prompt": "1+1=", "answer": "2"},
        }[task]
        rows.write_text((json.dumps(row) + "\n") * 4)
        data = {"name": task, "train": str(rows), "num_validation": 2}
        changes = {"task": data, "model": {"name": "some/model"}}
    recipe = tiny_recipe(tmp_path / "run", "isopo", **changes)
    made = translate(recipe, chat=False)
    expected = lifecycle.load_task(recipe, chat=False)
    assert [reward_name(make(reward, 1)) for reward in made.rewards] == list(expected.rewards)
    found = make(made.task, 1)
    assert [found.train[i] for i in range(2)] == [expected.train[i] for i in range(2)]
    assert list(found.validation) == list(expected.validation)


def test_a_warm_up_is_not_left_out_in_silence() -> None:
    with pytest.raises(ProxstepError, match=r"model\.warmup_solutions 256 is not for --engine trl"):
        script(load_recipe(OURS, [("rollout.dynamic_sampling_max_batches", "null")]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("changes", [{}, {"model.lora.rank": "4", "rollout.overlong_buffer": "2"}])
def test_scripts_of_the_recipes_are_python(path: Path, changes: dict[str, str]) -> None:
    """All names are imported, all keyword arguments exist, and none is a default."""
    overrides = [*changes.items(), ("rollout.dynamic_sampling_max_batches", "null")]
    recipe = load_recipe(path, overrides)
    text = script(recipe)
    tree = ast.parse(text)
    assert max(map(len, text.splitlines())) <= 100
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = imported | {"world_size", "model", "task", "trainer", "tokenizer", "int", "str"}
    assert loaded <= known
    assert imported <= loaded
    made = translate(recipe, chat=False)
    call = Call(made.args.function, {**made.args.keywords, "use_cpu": True})
    args = make(call, 1)
    for name, value in made.args.keywords.items():
        if not isinstance(value, Shared):
            assert getattr(args, name) == value, name
            assert type(args).__dataclass_fields__[name].default != value


@pytest.mark.parametrize("algorithm", algorithm_names())
def test_every_algorithm_has_a_script(tmp_path: Path, algorithm: str) -> None:
    """Of TRL's own trainer or of ours, under its own name."""
    recipe = tiny_recipe(tmp_path, algorithm)
    assert "Trainer(" in script(recipe)
    made = translate(recipe, chat=False)
    if made.trainer.module != "trl":
        call = Call(made.args.function, {**made.args.keywords, "use_cpu": True})
        assert make(call, 1).objective().name == recipe.objective.name


def test_the_script_converts_a_gguf_file(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", "grpo", model={"name": "tiny.gguf"})
    written = script(recipe)
    assert 'model = str(ensure_converted(name="tiny.gguf"))\n' in written
    assert "from proxstep.training.gguf import ensure_converted\n" in written

"""A recipe in verl's terms: nothing of it is lost, and what verl cannot do is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from tests.engine import Silent

from proxstep.algorithms import ADVANTAGES, ALGORITHMS, Algorithm
from proxstep.config.explain import describe_keys
from proxstep.config.loading import load_recipe, resolve
from proxstep.engines.verl import launch, table
from proxstep.engines.verl.compute_score import compute_score
from proxstep.engines.verl.launch import _reason
from proxstep.engines.verl.overrides import Machine, Prepared, gpus, overrides
from proxstep.engines.verl.prompt_files import messages, plan, prepare
from proxstep.engines.verl.run_metrics import FIELDS, record
from proxstep.engines.verl.seams import config_name, find_obstacle, loss_mode
from proxstep.errors import ProxstepError
from proxstep.runs.folder import RunFolder
from proxstep.runs.reading import read_rows
from proxstep.runs.schema import unknown_fields
from proxstep.training.prompts import batch_rows

PREPARED = Prepared("model", Path("/t.parquet"), Path("/v.parquet"), ("exact_match",), (1.0,), None)
TWO, EIGHT = gpus(2), gpus(8)
ATTENTION = f"+{table.MODEL}.override_config.attn_implementation"


def options(changes: dict[str, Any] | None = None, machine: Machine = TWO) -> dict[str, str]:
    recipe = resolve({"algorithm": "grpo"}, changes or {}, "test")
    return dict(pair.split("=", 1) for pair in overrides(recipe, PREPARED, machine))


RECIPES = Path(__file__).parents[2] / "recipes"
LINES = [
    line.removeprefix("#").split()
    for path in sorted(RECIPES.glob("*.yaml"))
    for line in path.read_text().splitlines()
    if "--engine verl" in line
]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_what_the_recipes_say_of_verl_can_be_done(words: list[str]) -> None:
    assert words[:2] == ["proxstep", "train"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options.pop("--engine") == "verl"
    changes = [(key.removeprefix("--"), value) for key, value in options.items()]
    recipe = load_recipe(words[2], changes)
    assert overrides(recipe, PREPARED, EIGHT)


def test_the_recipes_of_both_papers_and_of_the_demo_speak_of_verl() -> None:
    assert {words[2] for words in LINES} == {"arithmetic-isopo", "gsm8k-isopo", "math-opo"}


COMPUTED = {
    *("seed", "algorithm", "device", "output_dir", "model.dtype", "model.autocast", "model.lora"),
    *("model.lora.rank", "model.lora.alpha", "model.lora.target_modules"),
    *("regularizer.kl_coef", "regularizer.kl_estimator", "regularizer.kl_in"),
    *("rollout.top_k", "rollout.overlong_buffer", "rollout.overlong_penalty"),
    *("rollout.engine", "rollout.gpu_memory_utilization"),
    *("rollout.importance_cap", "update.num_minibatches", "update.microbatch_size"),
    *("update.microbatch_tokens", "update.kl_budget", "update.kl_budget_per"),
    *("update.kl_control", "update.kl_num_sequences"),
    *("optimizer.name", "optimizer.betas", "optimizer.eps", "optimizer.momentum"),
    *("optimizer.max_grad_norm", "optimizer.warmup_updates"),
    *("logging.tracker", "logging.num_samples", "logging.checkpoint_every"),
    *("logging.checkpoints_kept", "task.chat_template_kwargs"),
}
"""Recipe keys that `overrides` turns into other values."""

PREPARED_IN_FILES = {
    *("model.name", "model.warmup_score", "task.name", "task.difficulty", "task.level"),
    *("model.warmup_solutions", "model.warmup_learning_rate"),
    *("task.train", "task.validation", "task.prompt_column", "task.answer_column", "task.config"),
    *("task.train_split", "task.validation_split", "task.num_train", "task.num_validation"),
    *("task.prompt_format", "task.rewards", "task.reward_weights", "task.instruction"),
    *("task.system_prompt", "task.num_few_shot", "task.few_shot_seed", "task.drop_long_prompts"),
    *("evaluation.baselines", "label"),  # run.json, recipe.yaml
}
"""Those that decide what verl's data files, model folder and reward function hold."""

UNMEASURED = {
    *("evaluation.batch_size", "evaluation.num_probe_prompts", "evaluation.kl_policy_initial"),
    "rollout.batch_size",
    *("evaluation.num_samples", "evaluation.temperature", "evaluation.remember_first"),
}
"""Those of measurements that the local engine makes, and of what verl's sampler decides itself."""


def test_every_key_of_a_recipe_has_its_place() -> None:
    keys = {key.split(" ")[0] for key, *_ in describe_keys()}
    own = {key for key in keys if key.startswith(("objective.", "geometry."))}
    refused = {key for key, *_ in table.REFUSED}
    own -= {*refused, *table.RENAMED}  # the rest keeps its name, in a class made of the declaration
    placed = [set(table.RENAMED), COMPUTED, PREPARED_IN_FILES, UNMEASURED, own]
    assert keys <= set().union(refused, *placed)
    assert set().union(refused, *placed) <= keys
    for number, left in enumerate(placed):  # in one place each
        for right in placed[number + 1 :]:
            assert not left & right
    assert refused - set().union(*placed) == {
        "evaluation.patience",
        "external_lib",
        "geometry.diagnose_every",
        "guard",
        "logging.checkpoint_last",
        "logging.checkpoint_minutes",
        "model.head",
        "model.lora.dropout",
        "optimizer.muon_learning_rate",
        "rollout.dynamic_sampling_max_batches",
        "rollout.mask_truncated_completions",
        "rollout.prefill",
        "rollout.stop",
        "task.reward_seconds",
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda found: found.name)
def test_every_algorithm_goes_to_verl_or_is_refused(algorithm: Algorithm) -> None:
    """Under its own name, with its keys where they are not at their defaults."""
    advantage = next(name for name in ADVANTAGES if name != algorithm.advantage)
    changes = {"algorithm": algorithm.name, "objective": {"advantage": advantage}}
    if find_obstacle(algorithm, algorithm.defaults) is not None:
        with pytest.raises(ProxstepError, match="is not for --engine verl: "):
            options(changes)
        return
    found, mode = options(changes), loss_mode(algorithm)
    assert found["algorithm.adv_estimator"] == mode
    assert found[f"{table.ACTOR}.policy_loss.loss_mode"] == mode
    kind = f"proxstep.engines.verl.{config_name(algorithm)}"
    assert found[f"{table.ACTOR}.policy_loss._target_"] == kind
    assert found[f"+{table.ACTOR}.policy_loss.advantage"] == advantage
    assert found[f"{table.ACTOR}.loss_agg_mode"] == algorithm.default_loss_agg_mode
    assert found[f"{table.MODEL}.external_lib"] == "proxstep.engines.verl"
    names = [config_name(other) for other in ALGORITHMS.values()]
    assert names.count(config_name(algorithm)) == 1


def test_an_algorithm_that_reads_the_old_policy_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that this test alone declares; without that, verl computes it."""
    scratch = replace(ALGORITHMS["reinforce"], name="scratch")
    monkeypatch.setitem(ALGORITHMS, "scratch", scratch)
    assert options({"algorithm": "scratch"})["algorithm.adv_estimator"] == "proxstep_scratch"
    reading = replace(scratch, reads_old_policy=lambda options: True)
    monkeypatch.setitem(ALGORITHMS, "scratch", reading)
    message = "^algorithm isopo\\+scratch is not for --engine verl: .*old policy.*local engine"
    with pytest.raises(ProxstepError, match=message):
        options({"algorithm": "isopo+scratch"})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"device": "cuda:1"}, "device"),
        ({"external_lib": "json"}, "external_lib"),
        ({"device": "cpu"}, "device"),
        ({"model": {"head": "chunked"}}, "model.head"),
        ({"model": {"autocast": "auto"}}, "model.autocast"),
        (
            {"model": {"autocast": "bfloat16"}, "update": {"kl_budget": 0.03}},
            "model.autocast",
        ),
        ({"model": {"lora": {"dropout": 0.1}}}, "model.lora.dropout"),
        ({"algorithm": "opo", "objective": {"mu": "auto"}}, "objective.mu"),
        ({"algorithm": "opo", "objective": {"adaptive_tau": True}}, "objective.adaptive_tau"),
        (
            {"algorithm": "isopo+opo", "objective": {"anchor_correction": "length"}},
            "objective.anchor_correction",
        ),
        ({"algorithm": "opo", "rollout": {"importance_cap": 2.0}}, "rollout.importance_cap"),
        ({"algorithm": "isopo", "geometry": {"diagnose_every": 1}}, "geometry.diagnose_every"),
        ({"regularizer": {"kl_coef": 0.1}}, "regularizer.kl_estimator"),
        ({"rollout": {"dynamic_sampling_max_batches": 2}}, "rollout.dynamic_sampling_max_batches"),
        ({"rollout": {"mask_truncated_completions": True}}, "rollout.mask_truncated_completions"),
        ({"rollout": {"stop": ["."]}}, "rollout.stop"),
        ({"rollout": {"prefill": "So"}}, "rollout.prefill"),
        ({"optimizer": {"name": "soap"}}, "optimizer.name"),
        ({"evaluation": {"patience": 2}}, "evaluation.patience"),
        ({"optimizer": {"lr_scheduler_type": "linear"}}, "optimizer.lr_scheduler_type"),
        ({"optimizer": {"name": "muon", "muon_learning_rate": 1e-3}}, "optimizer.name"),
    ],
)
def test_what_verl_cannot_do_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ProxstepError, match=rf"^{key} \S+ is not for --engine verl: "):
        options(changes)


@pytest.mark.parametrize("key", sorted(set(table.RENAMED) - {"objective.loss_agg_mode"}))
def test_renamed_keys_carry_their_value(key: str) -> None:
    section, _, field = key.rpartition(".")
    value: Any = {"logging.project": "mine", "rollout.top_p": 0.5}.get(key, 4)
    if isinstance(value, int) and key.split(".")[-1] in ("temperature", "entropy_coef"):
        value = 0.25
    if key.startswith("optimizer."):
        value = 0.125
    if key == "optimizer.lr_scheduler_type":
        value = "cosine"
    beside = {"logging.project": ("tracker", "wandb")}
    beside["optimizer.min_lr_rate"] = ("lr_scheduler_type", "cosine")
    more = dict([beside[key]]) if key in beside else {}
    found = options({section: {field: value, **more}} if section else {field: value})
    assert found[table.RENAMED[key]] == str(value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": "dapo"}, {"loss_agg_mode": "token-mean"}),
        ({"seed": 7}, {"fsdp_config.seed": "7", "data_loader_seed": "7"}),
        ({"objective": {"clip_ratio_high": 0.3}}, {"policy_loss.clip_ratio_high": "0.3"}),
        ({"algorithm": "dro", "objective": {"beta": 0.5}}, {"policy_loss.beta": "0.5"}),
        ({"objective": {"loss_agg_mode": "token-mean"}}, {"loss_agg_mode": "token-mean"}),
        (
            {"algorithm": "dr-grpo", "rollout": {"max_completion_length": 7}},
            {"loss_scale_factor": "7", "loss_agg_mode": "seq-mean-token-sum-norm"},
        ),
        (
            {"regularizer": {"kl_coef": 0.5, "kl_estimator": "k2"}},
            {"use_kl_loss": "true", "kl_loss_type": "mse", "kl_loss_coef": "0.5"},
        ),
        (
            {"update": {"num_minibatches": 4, "microbatch_size": 5}},
            {"ppo_mini_batch_size": "4", "ppo_micro_batch_size_per_gpu": "4"},
        ),
        (
            {"optimizer": {"name": "sgd", "momentum": 0.5, "max_grad_norm": None}},
            {
                "optim.optimizer": "SGD",
                "optim.override_optimizer_config": "{momentum:0.5}",
                "optim.clip_grad": "inf",
            },
        ),
        (
            {"optimizer": {"warmup_updates": 5}, "update": {"num_iterations": 2}},
            {"optim.lr_warmup_steps": "3"},
        ),
        (
            {"algorithm": "opo", "objective": {"alpha": 0.3, "advantage": "group-centered"}},
            {
                "policy_loss._target_": "proxstep.engines.verl.OpoPolicyLossConfig",
                "policy_loss.loss_mode": "chi2_opo",
                "policy_loss.alpha": "0.3",
                "policy_loss.advantage": "group-centered",
                "loss_agg_mode": "seq-mean-token-mean",
            },
        ),
        (
            {"algorithm": "isopo-natural+opo", "geometry": {"ntk_damping": 0.5}},
            {
                "strategy": "isopo",
                "_target_": "proxstep.engines.verl.IsopoActorConfig",
                "geometry": "{rule:isopo-natural,ntk_damping:0.5}",
                "policy_loss.loss_mode": "chi2_opo",
            },
        ),
        (
            {"update": {"kl_budget": 0.03, "num_minibatches": 2, "num_iterations": 3}},
            {
                "strategy": "kl_budget",
                "_target_": "proxstep.engines.verl.BudgetActorConfig",
                "kl_budget": "0.03",
                "kl_num_updates": "6",
            },
        ),
        (
            {
                "algorithm": "isopo",
                "update": {
                    "kl_budget": 0.03,
                    "kl_budget_per": "token",
                    "kl_control": "corrected",
                    "kl_num_sequences": 8,
                },
            },
            {
                "strategy": "isopo",
                "kl_budget": "0.03",
                "kl_budget_per": "token",
                "kl_control": "corrected",
                "kl_num_sequences": "8",
                "kl_num_updates": "1",
            },
        ),
        (
            {"model": {"autocast": "bfloat16"}},
            {
                "fsdp_config.model_dtype": "fp32",
                "fsdp_config.mixed_precision": "{param_dtype:bf16,reduce_dtype:fp32,"
                "buffer_dtype:fp32}",
            },
        ),
    ],
)
def test_keys_of_the_actor(changes: dict[str, Any], expected: dict[str, str]) -> None:
    found = options(changes)
    for name, value in expected.items():
        key = f"{table.ACTOR}.{name}"
        assert found.get(key, found.get(f"+{key}")) == value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": "opo"}, {"algorithm.adv_estimator": "chi2_opo"}),
        ({"algorithm": "dppo-tv"}, {"algorithm.rollout_correction.bypass_mode": "true"}),
        ({"algorithm": "isopo"}, {f"{table.MODEL}.external_lib": "proxstep.engines.verl"}),
        (
            {"rollout": {"importance_cap": 2.0}},
            {
                "algorithm.rollout_correction.rollout_is": "sequence",
                "algorithm.rollout_correction.rollout_is_threshold": "2.0",
            },
        ),
        (
            {"regularizer": {"kl_coef": 0.5, "kl_estimator": "k1", "kl_in": "reward"}},
            {"algorithm.use_kl_in_reward": "true", "algorithm.kl_penalty": "kl"},
        ),
        (
            {"rollout": {"overlong_buffer": 8, "max_completion_length": 32}},
            {"reward.reward_manager.name": "dapo", "+reward.reward_kwargs.max_resp_len": "32"},
        ),
        (
            {
                "model": {"name": "m"},
                "task": {"name": "gsm8k", "chat_template_kwargs": {"enable_thinking": False}},
            },
            {"+data.apply_chat_template_kwargs": "{enable_thinking:false}"},
        ),
        ({"rollout": {"top_k": 0}}, {f"{table.ROLLOUT}.top_k": "-1"}),
        ({}, {ATTENTION: "sdpa"}),
        (
            {"rollout": {"engine": "vllm", "gpu_memory_utilization": 0.4}},
            {f"{table.ROLLOUT}.name": "vllm", f"{table.ROLLOUT}.gpu_memory_utilization": "0.4"},
        ),
        ({"model": {"lora": {"rank": 4}}}, {f"{table.MODEL}.lora_rank": "4"}),
        ({"logging": {"tracker": "wandb"}}, {"trainer.logger": "[console,file,wandb]"}),
        ({"steps": 7, "logging": {"checkpoint_every": None}}, {"trainer.save_freq": "7"}),
    ],
)
def test_keys_outside_the_actor(changes: dict[str, Any], expected: dict[str, str]) -> None:
    found = options(changes)
    assert {key: found[key] for key in expected} == expected


def test_half_precision_has_verls_own_attention() -> None:
    assert ATTENTION not in options({"model": {"autocast": "bfloat16"}})


def test_the_machine_decides_the_ranks() -> None:
    found = options(machine=EIGHT)
    assert found[f"{table.ROLLOUT}.name"] == "vllm"
    assert found["trainer.n_gpus_per_node"] == "8"
    assert found[f"{table.ACTOR}.ppo_micro_batch_size_per_gpu"] == "16"
    with pytest.raises(ProxstepError, match=r"^update.num_minibatches 1 .* 8 ranks"):
        options({"rollout": {"num_prompts": 3, "num_generations": 5}}, EIGHT)


def test_a_machine_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints the script for another one, and says which."""
    monkeypatch.setattr(launch, "check_verl", lambda: None)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    recipe = resolve({"algorithm": "grpo", "output_dir": str(tmp_path / "run")}, {}, "test")
    with pytest.raises(ProxstepError, match=r"^--engine verl needs a GPU.*--engine local"):
        launch.train(recipe, Silent())
    assert not (tmp_path / "run").exists()
    script = launch.command(recipe)
    assert "# The run, on one machine with 1 GPU(s)" in script
    assert "trainer.n_gpus_per_node=1 " in script


def test_gpus_without_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ProxstepError, match=r'vLLM, .*: pip install "verl\[vllm\]==0.9.1"'):
        launch.find_machine()
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    assert launch.find_machine() == TWO


@pytest.mark.parametrize("name", ["OpoPolicyLossConfig", "IsopoActorConfig", "register"])
def test_the_room_is_open_without_verl(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What needs verl says how to install it."""
    import proxstep.engines.verl as engine

    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("proxstep.config.releases.version", version)
    with pytest.raises(ProxstepError, match=r'^verl is not installed: pip install "proxstep\[verl'):
        getattr(engine, name)()
    assert not hasattr(engine, "OpoConfig")


def test_data_is_in_the_local_engines_order(tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i % 2} for i in range(7)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = _saved_model(tmp_path)
    changes = {
        "steps": 3,
        "seed": 5,
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(model)},
        "task": {"name": "table", "train": str(source), "validation": str(source)},
        "rollout": {"num_prompts": 4},
    }
    recipe = resolve({"algorithm": "grpo"}, changes, "test")
    prepared = prepare(recipe, print)
    assert prepared == plan(recipe)[0]
    written = parquet.read_table(prepared.train).to_pylist()
    chosen = [row for step in range(3) for row in batch_rows(7, 4, step, 5)]
    assert [row["prompt"][0]["content"] for row in written] == [rows[i]["prompt"] for i in chosen]
    assert [row["reward_model"]["ground_truth"] for row in written] == [
        rows[i]["answer"] for i in chosen
    ]
    for row in parquet.read_table(prepared.validation).to_pylist():
        number = row["reward_model"]["ground_truth"]
        arguments = (row["data_source"], f"so {number}", number, row["extra_info"])
        graded = compute_score(*arguments, ["numeric_answer"], [2.0])
        assert graded["score"] == 2.0
        assert graded["acc"] == graded["rewards/numeric_answer"] == 1.0


def _saved_model(folder: Path) -> Path:
    from tests.engines.trl_case import tiny

    tokenizer, model = tiny()
    for part in (tokenizer, model):
        part.save_pretrained(folder / "model")
    return folder / "model"


def test_a_tokenizer_that_adds_tokens_to_plain_prompts_is_refused(tmp_path: Path) -> None:
    from tests.engines.trl_case import tiny

    from proxstep.engines.verl.prompt_files import PLAIN_TEMPLATE, _check_tokens
    from proxstep.tasks import Example

    tokenizer, _ = tiny()
    example = Example("1+1=", "2")
    _check_tokens(tokenizer, PLAIN_TEMPLATE, [example])
    assert messages(Example([{"role": "user", "content": "x"}], "2"))[0]["content"] == "x"

    class Adding:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            found = tokenizer(text)["input_ids"]
            return {"input_ids": [0, *found] if add_special_tokens else found}

        apply_chat_template = tokenizer.apply_chat_template

    with pytest.raises(ProxstepError, match="special tokens"):
        _check_tokens(Adding(), PLAIN_TEMPLATE, [example])


def test_a_completion_without_a_reward_gets_none(tmp_path: Path) -> None:
    file = tmp_path / "graders.py"
    file.write_text(
        "def broken(prompts, completions, **columns):\n"
        "    return [float('nan') for _ in completions]\n"
        "def absent(prompts, completions, **columns):\n"
        "    return [None for _ in completions]\n"
    )
    info = {"example": json.dumps({"prompt": "1+1=", "columns": {}})}
    for name in ("broken", "absent"):
        graded = compute_score("mine", "2", "2", info, [f"{file}:{name}"], [1.0])
        assert graded["score"] == 0.0
        assert graded["invalid_reward"] == 1.0
        assert all(map(math.isfinite, graded.values()))


def test_metrics_have_our_names() -> None:
    recipe = resolve({"algorithm": "grpo", "update": {"num_minibatches": 2}}, {}, "test")
    measured = {theirs: float(i) for i, theirs in enumerate(FIELDS.values())}
    measured |= {"val-core/arithmetic/acc/mean@1": 0.5, "actor/geometry_weight_spread": 3.0}
    found = record(recipe, 4, measured)
    assert not unknown_fields(found)
    assert found["score"] == 0.5
    assert found["geometry/weight_spread"] == 3.0
    assert found["num_updates"] == 8
    assert found["num_sequences"] == 4 * 16 * 8
    assert {name: found[name] for name in FIELDS} == {
        ours: measured[theirs] for ours, theirs in FIELDS.items()
    }


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_entropy_is_in_nats_per_token(mode: str) -> None:
    entropies = [[0.5, 1.0, 0.25], [0.75], [0.5, 0.25]]  # of three responses
    total, count, horizon = sum(map(sum, entropies)), 6, 7
    aggregated = {
        "token-mean": total / count,
        "seq-mean-token-sum": total / 3,
        "seq-mean-token-sum-norm": total / 3 / horizon,
    }
    changes = {"objective": {"loss_agg_mode": mode}, "rollout": {"max_completion_length": horizon}}
    recipe = resolve({"algorithm": "grpo"}, changes, "test")
    measured = {"actor/entropy": aggregated[mode], "response_length/mean": count / 3}
    assert record(recipe, 1, measured)["entropy"] == pytest.approx(total / count)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "no output"),
        ("begin\nend", "end"),
        ("(W pid=1) ValueError: no unit\n(D pid=2) a.b.KeyError: 3\nend", "ValueError: no unit"),
        (
            "x.RayError: lost\nproxstep.errors.ProxstepError: k: v",
            "proxstep.errors.ProxstepError: k: v",
        ),
    ],
)
def test_the_reason_of_a_failure_is_the_first_error(tmp_path: Path, log: str, reason: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(log)
    assert _reason(path) == reason


def test_a_mean_of_means_is_no_entropy_per_token() -> None:
    recipe = resolve({"algorithm": "opo"}, {}, "test")
    assert "entropy" not in record(recipe, 1, {"actor/entropy": 0.5, "response_length/mean": 2.0})


def test_the_printed_script_is_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    folder = tmp_path / "it's mine"
    recipe = resolve({"algorithm": "grpo", "output_dir": str(folder)}, {}, "test")
    path = tmp_path / "run.sh"
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    monkeypatch.setattr(launch, "gpus", lambda count: TWO)
    path.write_text(launch.command(recipe))
    said = subprocess.run(
        ["sh", path],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[:3] == ["-m", "proxstep.engines.verl", f"{folder}/recipe.yaml"]
    prepared, _ = plan(recipe)
    arguments = overrides(recipe, prepared, TWO)
    assert said[3:] == ["-m", "verl.trainer.main_ppo", *arguments]
    assert load_recipe(folder / "recipe.yaml") == recipe


def test_completions_of_a_validation_are_waited_for(tmp_path: Path) -> None:
    """verl writes them in a thread of its own: later than its metrics, or only a part at first."""
    recipe = resolve({"algorithm": "grpo", "logging": {"num_samples": 2}}, {}, "test")
    folder = RunFolder(tmp_path)
    path = tmp_path / "verl" / "validation" / "4.jsonl"
    path.parent.mkdir(parents=True)
    row = json.dumps({"input": "1+1=", "output": "2", "gts": "2", "acc": 1.0})
    assert launch.add_samples(recipe, folder, [0, 4]) == [0, 4]
    path.write_text(row + "\n" + row[:9])
    assert launch.add_samples(recipe, folder, [0, 4]) == [0, 4]
    path.write_text((row + "\n") * 3)
    assert launch.add_samples(recipe, folder, [0, 4]) == [0]
    path.with_stem("0").write_text(row + "\n")
    assert launch.add_samples(recipe, folder, [0], ended=True) == []
    found = read_rows(folder.samples)
    assert [sample["step"] for sample in found] == [4, 4, 0]

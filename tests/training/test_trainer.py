"""The local engine end to end on a tiny model: what it writes, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import (
    Killed,
    Silent,
    assert_same_records,
    kill_at,
    records,
    spread_reward,
    tiny_recipe,
    weights,
)
from tests.selection import slow

from proxstep.config.loading import dump_recipe
from proxstep.config.recipe import algorithm_names
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import latest_checkpoint, load_state
from proxstep.runs.folder import RunFolder
from proxstep.runs.schema import FIELDS, unknown_fields
from proxstep.training import lifecycle, trainer
from proxstep.training.objective import Objective

EVERY = [*algorithm_names(), "isopo+opo", "isopo-natural+gspo"]


@pytest.mark.parametrize("algorithm", [*EVERY[::2], *slow(*EVERY[1::2])])
def test_every_algorithm_runs(tmp_path: Path, algorithm: str) -> None:
    recipe = tiny_recipe(tmp_path / "run", algorithm, steps=1)
    assert lifecycle.train(recipe, Silent()) == "finished"
    first, last = records(tmp_path / "run")
    assert first["step"] == 0
    assert first["score"] is not None
    assert first["reward"] is None
    assert first["kl_policy_initial"] == pytest.approx(0.0, abs=1e-6)
    assert first["kl_initial_policy"] == pytest.approx(0.0, abs=1e-6)
    assert set(FIELDS) <= set(last)
    assert not unknown_fields(last)
    assert last["kl_policy_initial"] >= 0
    assert last["num_sequences"] == 16
    assert last["num_updates"] == 1
    assert last["entropy"] > 0


def test_a_checkpoint_is_an_ordinary_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lifecycle.train(tiny_recipe(tmp_path / "run", "isopo"), Silent())
    folder = latest_checkpoint(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("1+2=", return_tensors="pt")).logits.isfinite().all()
    assert tokenizer.decode(tokenizer("12+7=")["input_ids"]) == "12+7="


OF_EVERY_KIND = [
    *slow(
        (
            "isopo",
            {
                "optimizer": {"name": "soap", "learning_rate": 1e-3},
                "update": {"num_iterations": 4},  # it renews its basis in the 11th update of 16
            },
        ),
        ("isopo", {"update": {"num_minibatches": 2, "microbatch_tokens": 20}}),
        ("grpo", {"update": {"num_minibatches": 2, "microbatch_tokens": 20}}),
        ("reinforce", {}),
        ("opo", {}),
        ("isopo-natural", {}),
        ("grpo", {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}}),
        ("grpo", {"optimizer": {"name": "kron", "learning_rate": 1e-3}}),
        ("isopo", {"model": {"autocast": "bfloat16"}}),
    ),
    (
        "isopo",
        {
            "optimizer": {
                "name": "muon",
                "learning_rate": 1e-3,
                "warmup_updates": 1,
                "lr_scheduler_type": "cosine",
                "min_lr_rate": 0.1,
            },
            "update": {"num_minibatches": 1},
        },
    ),
    (
        "isopo",
        {
            "regularizer": {"entropy_coef": 0.1, "kl_coef": 1.0},
            "evaluation": {"every": 2, "num_probe_prompts": 3, "kl_policy_initial": False},
        },
    ),
]


@pytest.mark.parametrize(("algorithm", "own"), OF_EVERY_KIND)
def test_resuming_repeats_the_run_to_the_bit(
    tmp_path: Path, algorithm: str, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "steps": 4,
        "update": {"num_minibatches": 2},
        "logging": {"checkpoint_every": 2},
        **own,
    }
    whole = tiny_recipe(tmp_path / "whole", algorithm, **changes)
    lifecycle.train(whole, Silent())

    kill_at(4, monkeypatch)
    with pytest.raises(Killed):
        lifecycle.train(tiny_recipe(tmp_path / "cut", algorithm, **changes), Silent())
    monkeypatch.undo()
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "failed"
    assert lifecycle.resume(tmp_path / "cut", Silent()) == "finished"

    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = records(tmp_path / "whole"), records(tmp_path / "cut")
    assert [r["step"] for r in first] == [r["step"] for r in second] == [0, 1, 2, 3, 4]
    assert_same_records(first, second)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_optimizer_that_its_recipe_says_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Rate, weight decay and the like, which the checkpoint's state has as they were."""
    folder, seen, progress = tmp_path / "run", [], Silent()
    changes: Any = {"optimizer": {"name": optimizer, "learning_rate": 1e-3}, "steps": 1}
    lifecycle.train(tiny_recipe(folder, **changes), Silent())
    changes["optimizer"] |= {"learning_rate": 1e-5, "weight_decay": 0.5, "betas": [0.5, 0.6]}
    recipe = tiny_recipe(folder, **changes | {"steps": 3})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    train_step = trainer.Trainer._train_step

    def watched(self: Any) -> dict[str, Any]:
        seen[:] = [{**group} for group in self.optimizer.param_groups]
        return train_step(self)

    monkeypatch.setattr(trainer.Trainer, "_train_step", watched)
    assert lifecycle.resume(folder, progress) == "finished"
    assert [record["learning_rate"] for record in records(folder)[1:]] == [1e-3, 1e-5, 1e-5]
    assert {group["lr"] for group in seen} == {group["initial_lr"] for group in seen} == {1e-5}
    assert {group["weight_decay"] for group in seen} == {0.5}
    assert list(seen[0]["betas"]) == [0.5, 0.6]
    assert "optimizer.learning_rate 0.001 is now 1e-05" in progress.notes[0]


def test_an_extended_run_has_the_rates_of_the_longer_schedule(tmp_path: Path) -> None:
    """From its first new update on, which the shorter schedule would have given a rate of 0."""
    falling = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=2, optimizer=falling), Silent())
    RunFolder(tmp_path / "run").extend([("steps", "4")])
    assert lifecycle.resume(tmp_path / "run", Silent()) == "finished"
    rates = [record["learning_rate"] for record in records(tmp_path / "run")[1:]]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=1), Silent())
    with pytest.raises(ProxstepError, match="is finished"):
        lifecycle.resume(tmp_path / "run", Silent())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(tmp_path: Path, number: int) -> None:
    class Impatient(Silent):
        def record(self, record: Any) -> None:
            super().record(record)
            if record["step"] == 1:
                os.kill(os.getpid(), number)

    folder = tmp_path / "run"
    assert lifecycle.train(tiny_recipe(folder, steps=5), Impatient()) == "interrupted"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    stopped = records(folder)[-1]["step"]
    assert stopped < 5
    assert load_state(latest_checkpoint(folder))["step"] == stopped
    assert lifecycle.resume(folder, Silent()) == "finished"
    assert [r["step"] for r in records(folder)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("algorithm", ["grpo", *slow("reinforce", "opo", "gspo")])
def test_microbatches_do_not_change_the_step(tmp_path: Path, algorithm: str) -> None:
    for name, size in (("whole", None), ("split", 3)):
        update = {"microbatch_size": size, "num_minibatches": 2, "num_iterations": 2}
        lifecycle.train(tiny_recipe(tmp_path / name, algorithm, steps=1, update=update), Silent())
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "split")
    start = load_file(
        Path(lifecycle.model_source(tiny_recipe(tmp_path / "x"), print)) / "model.safetensors"
    )
    for name in a:
        moved = (a[name] - start[name]).norm()
        assert (a[name] - b[name]).norm() <= 2e-2 * moved, name
    first, second = records(tmp_path / "whole")[-1], records(tmp_path / "split")[-1]
    assert first["num_updates"] == 4
    for field in ("loss", "grad_norm", "entropy", "objective/ratio"):
        assert first[field] == pytest.approx(second[field], rel=1e-3, abs=1e-5), field


def test_equal_rewards_leave_a_plain_sgd_policy_as_it_was(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def half(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    )
    recipe = tiny_recipe(
        tmp_path / "run",
        task={"rewards": [f"{reward}:half"]},
        optimizer={"name": "sgd", "learning_rate": 1.0},
    )
    lifecycle.train(recipe, Silent())
    source = load_file(Path(lifecycle.model_source(recipe, print)) / "model.safetensors")
    after = weights(tmp_path / "run")
    assert all(torch.equal(source[name], after[name]) for name in after)
    last = records(tmp_path / "run")[-1]
    assert last["frac_reward_zero_std"] == 1.0
    assert last["grad_norm"] == 0.0
    assert last["advantage_range"] == 0.0
    assert last["grad_response_efficiency"] is None


def test_missing_rewards_are_left_out_and_counted(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def odd(prompts, completions, **columns):\n"
        "    return [None if i % 4 == 0 else float('nan') if i in (1, 2, 3) else float(i % 4)\n"
        "            for i in range(len(prompts))]\n"
    )
    recipe = tiny_recipe(tmp_path / "run", steps=2, task={"rewards": [f"{reward}:odd"]})
    lifecycle.train(recipe, Silent())
    last = records(tmp_path / "run")[-1]
    assert last["frac_invalid_reward"] == 7 / 16
    assert last["reward"] == 2.0
    assert last["advantage_range"] == pytest.approx(2.0 / (1 + 1e-6))
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_a_step_without_any_reward_is_skipped(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def none(prompts, completions, **columns):\n    return [None] * len(prompts)\n"
    )
    recipe = tiny_recipe(tmp_path / "run", task={"rewards": [f"{reward}:none"]})
    assert lifecycle.train(recipe, Silent()) == "finished"
    last = records(tmp_path / "run")[-1]
    assert last["num_updates"] == 0
    assert last["loss"] is None
    assert last["score"] is None


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    backward = Objective.backward

    def poisoned(self: Objective, log_prob_BT: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return backward(self, log_prob_BT * float("inf"), *rest, **options)

    folder = tmp_path / "run"
    recipe = tiny_recipe(folder, steps=3, logging={"checkpoint_every": 1})
    lifecycle.train(recipe.model_copy(update={"steps": 1}), Silent())
    good = weights(folder)
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("steps: 1", "steps: 3")
    )
    monkeypatch.setattr(Objective, "backward", poisoned)
    with pytest.raises(ProxstepError, match=r"step 2, update 2: the gradient's norm is nan"):
        lifecycle.resume(folder, Silent())
    after = weights(folder)
    assert all(torch.equal(good[name], after[name]) for name in good)
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_samples_are_kept(tmp_path: Path) -> None:
    lifecycle.train(tiny_recipe(tmp_path / "run", logging={"num_samples": 2}), Silent())
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["step"] for s in samples] == [0, 0, 2, 2, 3, 3]
    assert set(samples[0]) == {"step", "prompt", "completion", "answer", "reward"}


@pytest.mark.parametrize("algorithm", ["isopo", *slow("reinforce")])
def test_lora_trains_adapters_alone_and_resumes(tmp_path: Path, algorithm: str) -> None:
    folder = tmp_path / "run"
    reward = spread_reward(tmp_path)
    recipe = tiny_recipe(folder, algorithm, steps=2, model={"lora": {"rank": 2}}, task=reward)
    lifecycle.train(recipe.model_copy(update={"steps": 1}), Silent())
    files = {path.name for path in latest_checkpoint(folder).iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert records(folder)[0]["kl_policy_initial"] == pytest.approx(0.0, abs=1e-6)
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("steps: 1", "steps: 2")
    )
    assert lifecycle.resume(folder, Silent()) == "finished"
    assert records(folder)[-1]["kl_policy_initial"] > 0


def test_adapters_follow_from_the_seed(tmp_path: Path) -> None:
    for name in ("first", "second"):
        torch.seed()
        recipe = tiny_recipe(tmp_path / name, steps=1, model={"lora": {"rank": 2}})
        lifecycle.train(recipe, Silent())
    first, second = (
        load_file(latest_checkpoint(tmp_path / name) / "adapter_model.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_optimizers_and_schedule(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9, "warmup_updates": 3}
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=3, optimizer=optimizer), Silent())
    rates = [r["learning_rate"] for r in records(tmp_path / "run")[1:]]
    assert rates == pytest.approx([0.125, 0.25, 0.375])  # of the step's last update itself

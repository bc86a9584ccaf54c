"""Runs of recipes through TRL: their folders, their scripts, stopping, killing and going on."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import Silent, tiny_recipe
from tests.engines.trl_case import quiet
from tests.selection import slow
from trl import GRPOTrainer

from proxstep.cli import commands as cli
from proxstep.config.loading import dump_recipe
from proxstep.config.recipe import Recipe
from proxstep.engines.trl import launch
from proxstep.engines.trl.logs import record_of
from proxstep.engines.trl.script import script
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
REWARD = """
def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def narrow(prompts, completions, answer):
    return [0.0 for text in completions]
"""
TIMES = ("elapsed_seconds", "seconds_step", "seconds_evaluation")


def recipe_of(folder: Path, algorithm: str = "isopo", **changes: Any) -> Recipe:
    """Three steps whose rewards differ: completions of the untrained model are rarely right."""
    rewards = folder.parent / "rewards.py"
    rewards.write_text(REWARD)
    changes.setdefault("task", {"rewards": [f"{rewards}:length"]})
    return tiny_recipe(folder, algorithm, device="cpu", **changes)


def trained(recipe: Recipe, **options: Any) -> str:
    with quiet():
        return launch.train(recipe, Silent(), **options)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in kept]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        *slow(
            ("isopo", {}),
            (
                "opo",
                {"update": {"num_minibatches": 2, "num_iterations": 2, "microbatch_size": 4}},
            ),
        ),
        ("cispo", {"rollout": {"overlong_buffer": 2}, "optimizer": {"warmup_updates": 2}}),
    ],
)
def test_the_printed_script_trains_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path / "run", algorithm, **changes)
    assert trained(recipe) == "finished"
    alone = recipe.model_copy(update={"output_dir": str(tmp_path / "alone")})
    with quiet():
        exec(compile(script(alone), "train.py", "exec"), {"__name__": "__main__"})
    written = sorted((tmp_path / "alone").glob("checkpoint-*"))
    assert len(written) == 1
    assert_equal(load_file(written[0] / "model.safetensors"), weights(tmp_path / "run"))


def test_a_run_s_folder_is_as_the_local_engine_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(folder, "opo", update={"num_minibatches": 2})
    assert trained(recipe) == "finished"
    found = records(folder)
    assert [record["step"] for record in found] == [0, 1, 2, 3]
    assert [record["score"] is None for record in found] == [False, True, False, False]
    assert [record["num_updates"] for record in found] == [0, 2, 4, 6]
    assert found[-1]["num_sequences"] == 48
    for record in found[1:]:
        for name in ("reward", "reward_std", "entropy", "loss", "grad_norm", "learning_rate"):
            assert math.isfinite(record[name]), name
        assert 0 < record["completions_mean_length"] <= record["completions_max_length"] <= 3
        assert {"rewards/length", "objective/effective_sample_size"} <= record.keys()
    assert found[0]["kl_policy_initial"] == found[0]["kl_initial_policy"] == 0
    assert found[-1]["kl_policy_initial"] > 0
    info = RunFolder(folder).info()
    assert (info["engine"], info["status"]) == ("trl", "finished")
    assert (folder / "recipe.yaml").read_text() == dump_recipe(recipe)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4 + [3] * 4
    assert [path.name for path in (folder / "checkpoints").glob("*-*")] == ["step-000003"]
    assert cli.main(["eval", str(folder)]) == 0
    assert f"greedy score {found[-1]['score']:.4f}" in capsys.readouterr().out
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert "opo" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["isopo", "opo"])
def test_the_first_step_has_the_local_engine_s_figures(tmp_path: Path, algorithm: str) -> None:
    """For the records' names to mean one thing, whatever wrote them: the initial policy's."""
    from proxstep.training import lifecycle

    recipe = recipe_of(tmp_path / "trl", algorithm)
    trained(recipe)
    lifecycle.train(recipe.model_copy(update={"output_dir": str(tmp_path / "local")}), Silent())
    found, expected = records(tmp_path / "trl")[0], records(tmp_path / "local")[0]
    assert found == expected
    local = records(tmp_path / "local")[1]
    ours = {name for name, value in records(tmp_path / "trl")[1].items() if value is not None}
    missing = {name for name, value in local.items() if value is not None} - ours
    phases = ("rollout", "reward", "log_probs", "update")
    assert missing <= {f"seconds_{phase}" for phase in phases}


@pytest.mark.slow
def test_lora_adapters_are_trained_and_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lora = {"model": {"lora": {"rank": 2}}, "regularizer": {"kl_coef": 0.1, "kl_estimator": "k3"}}
    assert trained(recipe_of(folder, "isopo", **lora)) == "finished"
    checkpoint = latest_checkpoint(folder)
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    assert cli.main(["eval", str(folder)]) == 0
    assert records(folder)[-1]["regularizer/kl"] > 0


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a rollout's updates stops after its last one."""
    update = {"num_minibatches": 2, "num_iterations": 2}
    whole = recipe_of(tmp_path / "whole", "isopo", update=update)
    trained(whole)
    recipe = recipe_of(tmp_path / "run", "isopo", update=update)
    step = GRPOTrainer.training_step
    calls = []

    def interrupting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", interrupting)
    assert trained(recipe) == "interrupted"
    assert len(calls) == 8
    assert RunFolder(tmp_path / "run").info()["status"] == "interrupted"
    assert records(tmp_path / "run")[-1]["score"] is not None
    with quiet():
        assert launch.resume(tmp_path / "run", Silent()) == "finished"
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    with pytest.raises(ProxstepError, match="the run is finished, at step 3 of 3"):
        launch.resume(tmp_path / "run", Silent())


def test_a_resumed_run_has_the_optimizer_that_its_recipe_says_now(tmp_path: Path) -> None:
    """Its rates are those of the schedule over all steps, from the first new update on."""
    folder, progress = tmp_path / "run", Silent()
    changes: Any = {"optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}}
    trained(recipe_of(folder, "reinforce", steps=1, **changes))
    changes["optimizer"] |= {"learning_rate": 1e-5, "weight_decay": 0.5}
    recipe = recipe_of(folder, "reinforce", steps=4, **changes)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    with quiet():
        assert launch.resume(folder, progress) == "finished"
    rates = [record["learning_rate"] for record in records(folder)[1:]]
    assert rates == pytest.approx([1e-3, 7.5e-6, 5e-6, 2.5e-6])
    kept = torch.load(latest_checkpoint(folder) / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in kept["param_groups"]] == [0.5, 0.0]
    assert "optimizer.learning_rate 0.001 is now 1e-05" in progress.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["isopo", "opo"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path, algorithm: str) -> None:
    """After a real kill -9, from the newest checkpoint, through the command line."""
    changes = {"steps": 6, "logging": {"checkpoint_every": 2}}
    recipe = recipe_of(tmp_path / "run", algorithm, **changes)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "proxstep", "train"]
    begun = subprocess.Popen([*command, str(tmp_path / "recipe.yaml"), "--engine", "trl"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert begun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    begun.kill()
    begun.wait()
    assert RunFolder(tmp_path / "run").info()["status"] == "running"
    resumed_from = latest_checkpoint(tmp_path / "run").name
    assert resumed_from < "step-000006"
    subprocess.run([*command, "--resume", str(tmp_path / "run")], check=True)
    whole = recipe.model_copy(update={"output_dir": str(tmp_path / "whole")})
    trained(whole)
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_write_one_run(tmp_path: Path) -> None:
    """Under torchrun; what one rank takes is halved, and the checkpoint has both ranks' state."""
    recipe = recipe_of(tmp_path / "run", "isopo", update={"microbatch_size": 4})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "proxstep", "train"]
    command += [str(tmp_path / "recipe.yaml"), "--engine", "trl"]
    subprocess.run(command, check=True, timeout=300)
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 1, 2, 3]
    assert [record["num_updates"] for record in found] == [0, 1, 2, 3]
    assert all(record["grad_norm"] > 0 for record in found[1:])
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 12
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert {path.name for path in checkpoint.glob("rng_state_*.pth")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert RunFolder(tmp_path / "run").info()["status"] == "finished"


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_wrong_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    few = {"task": {"difficulty": 1}, "rollout": {"num_prompts": 200_000}}
    with pytest.raises(ProxstepError, match=r"num_prompts 200000 is more than the"):
        trained(recipe_of(folder, **few))
    narrow = {"task": {"rewards": [f"{tmp_path / 'rewards.py'}:narrow"]}}
    with pytest.raises(ProxstepError, match=r"hands completion_ids, .* to narrow.*add \*\*columns"):
        trained(recipe_of(folder, **narrow))
    lora = {"model": {"lora": {"target_modules": ["nothing"]}}}
    with pytest.raises(ValueError, match="nothing"):
        trained(recipe_of(folder, **lora))
    assert not folder.exists()


@pytest.mark.slow
def test_a_run_in_the_folder_is_kept_or_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(recipe_of(folder, steps=1))
    with pytest.raises(ProxstepError, match="already holds a run"):
        trained(recipe_of(folder, steps=2))
    assert trained(recipe_of(folder, steps=2), overwrite=True) == "finished"
    assert records(folder)[-1]["step"] == 2


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = GRPOTrainer._compute_loss

    def broken(self: Any, *args: Any) -> Any:
        return loss(self, *args) * (math.nan if self.state.global_step == 1 else 1)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken)
    with pytest.raises(ProxstepError, match=r"step 2, update 2: the gradient's norm is nan"):
        trained(recipe_of(tmp_path / "run", "grpo"))
    assert RunFolder(tmp_path / "run").info()["status"] == "failed"
    assert records(tmp_path / "run")[-1]["step"] == 1


@pytest.mark.slow
def test_nothing_is_reported_to_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import _telemetry

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    sent: list[Any] = []
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", sent.append)
    trained(recipe_of(tmp_path / "run", "grpo", steps=1))
    assert sent == []


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_records_against_an_obvious_oracle(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 3, (2, 16), generator=generator).double()
    drawn[0, 3] = math.nan
    long = -torch.rand(16, generator=generator, dtype=torch.float64)
    changes = {
        "task": {"rewards": ["exact_match", "numeric_answer"], "reward_weights": [1.0, 0.5]},
        "rollout": {"overlong_buffer": 2, "overlong_penalty": 0.25},
    }
    recipe = recipe_of(tmp_path / "run", "grpo", **changes)
    rewards = {
        "exact_match": drawn[0].tolist(),
        "numeric_answer": drawn[1].tolist(),
        "soft_overlong_punishment_reward": long.tolist(),
    }
    logs = [
        {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1, "completions/max_length": 3.0},
        {"loss": 3.0, "grad_norm": 4.0, "learning_rate": 0.2, "other": 1.0, "kl": None},
    ]
    found = record_of(recipe, logs, rewards, [1.0, -2.0])
    totals = [
        (0.0 if math.isnan(a) else a) + 0.5 * b
        for a, b in zip(*(row.tolist() for row in drawn), strict=True)
    ]
    groups = [totals[i : i + 4] for i in range(0, 16, 4)]
    shaped = [total + 0.25 * length for total, length in zip(totals, long.tolist(), strict=True)]
    spreads = [statistics.stdev(shaped[i : i + 4]) for i in range(0, 16, 4)]
    expected = {
        "loss": 2.0,
        "grad_norm": 3.0,
        "learning_rate": 0.2,
        "completions_max_length": 3,
        "reward": sum(totals) / 16,
        "reward_std": sum(spreads) / 4,
        "frac_reward_zero_std": 0.0,
        "frac_informative_groups": sum(len(set(group)) > 1 for group in groups) / 4,
        "frac_invalid_reward": 0.0,
        "advantage_range": 3.0,
        "grad_response_efficiency": 2.0,
        "rewards/exact_match": statistics.mean(r for r in rewards["exact_match"] if r == r),
        "rewards/numeric_answer": statistics.mean(rewards["numeric_answer"]),
        "rewards/overlong": 0.25 * long.mean().item(),
        "generation_batches": 1,
        "skipped": 0,
    }
    assert found == pytest.approx(expected)


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trl_learns_the_embedded_task(tmp_path: Path) -> None:
    """From 0.19 to 0.6 and more in 20 steps; docs/trl.md has the figures of several seeds."""
    from proxstep.config.loading import load_recipe

    overrides = [("steps", "20"), ("device", "cpu"), ("output_dir", str(tmp_path / "run"))]
    recipe = load_recipe(ROOT / "recipes" / "arithmetic-isopo.yaml", overrides)
    assert trained(recipe) == "finished"
    scores = [record["score"] for record in records(tmp_path / "run") if record["score"]]
    assert scores[0] < 0.3
    assert scores[-1] > scores[0] + 0.3

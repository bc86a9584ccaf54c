"""The local engine end to end on a tiny model: what it writes, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import Silent, tiny_recipe

from proxstep.config.recipe import algorithm_names
from proxstep.errors import ProxstepError
from proxstep.logprobs.logits import token_log_probs
from proxstep.runs.checkpoint import latest_checkpoint, load_state
from proxstep.runs.folder import RunFolder
from proxstep.runs.schema import FIELDS, unknown_fields
from proxstep.training import lifecycle
from proxstep.training.batch import Batch, collect
from proxstep.training.rollout import response_logits
from proxstep.training.trainer import Trainer


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / "model.safetensors")


@pytest.mark.parametrize("algorithm", [*algorithm_names(), "isopo+opo", "isopo-natural+gspo"])
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
    ("reinforce", {}),
    ("opo", {}),
    ("isopo-natural", {}),
    ("grpo", {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}}),
    (
        "isopo",
        {
            "optimizer": {"name": "muon", "learning_rate": 1e-3, "warmup_updates": 3},
            "update": {"num_minibatches": 1},
        },
    ),
    (
        "isopo",
        {
            "optimizer": {"name": "soap", "learning_rate": 1e-3},
            "update": {"num_iterations": 4},  # it renews its basis in the 11th update of 16
        },
    ),
    ("grpo", {"optimizer": {"name": "kron", "learning_rate": 1e-3}}),
    ("isopo", {"model": {"autocast": "bfloat16"}}),
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

    class Killed(Exception):
        pass

    train_step = Trainer._train_step

    def killed_at_step_4(self: Trainer) -> dict[str, Any]:
        record = train_step(self)
        if self.step == 4:
            raise Killed
        return record

    monkeypatch.setattr(Trainer, "_train_step", killed_at_step_4)
    with pytest.raises(Killed):
        lifecycle.train(tiny_recipe(tmp_path / "cut", algorithm, **changes), Silent())
    monkeypatch.undo()
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "failed"
    assert lifecycle.resume(tmp_path / "cut", Silent()) == "finished"

    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = records(tmp_path / "whole"), records(tmp_path / "cut")
    assert [r["step"] for r in first] == [r["step"] for r in second] == [0, 1, 2, 3, 4]
    for r, s in zip(first, second, strict=True):
        for name in r:
            if not name.startswith(("seconds", "elapsed")):
                assert r[name] == s[name], (r["step"], name)


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


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "opo", "gspo"])
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
    from proxstep.training.objective import Objective

    backward = Algorithm.backward

    def poisoned(self: Algorithm, log_prob_BT: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return backward(self, log_prob_BT * float("inf"), *rest, **options)

    folder = tmp_path / "run"
    recipe = tiny_recipe(folder, steps=3, logging={"checkpoint_every": 1})
    lifecycle.train(recipe.model_copy(update={"steps": 1}), Silent())
    good = weights(folder)
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("steps: 1", "steps: 3")
    )
    monkeypatch.setattr(Algorithm, "backward", poisoned)
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


# bfloat16 autocast


def watch_the_policy(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Return the dtypes in which the policy's output layer computes from now on."""
    seen: set[torch.dtype] = set()
    load_model = lifecycle.load_model

    def watched(*arguments: Any) -> Any:
        model: Any = load_model(*arguments)
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        return model

    monkeypatch.setattr(lifecycle, "load_model", watched)
    return seen


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("algorithm", ["grpo", "isopo", "isopo-natural"])
@pytest.mark.parametrize(
    ("autocast", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_policy_computes_in_one_dtype_wherever_it_runs(
    tmp_path: Path,
    autocast: str | None,
    dtype: torch.dtype,
    algorithm: str,
    lora: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = watch_the_policy(monkeypatch)
    folder = tmp_path / "run"
    recipe = tiny_recipe(
        folder,
        algorithm,
        steps=2,
        model={"autocast": autocast, "lora": lora},
        update={"num_minibatches": 2},
        regularizer={"entropy_coef": 0.1, "kl_coef": 0.1},
    )
    assert lifecycle.train(recipe, Silent()) == "finished"
    lifecycle.evaluate(recipe, latest_checkpoint(folder), Silent())
    assert seen == {dtype}
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    saved = load_file(latest_checkpoint(folder) / name)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert records(folder)[0]["kl_policy_initial"] == pytest.approx(0.0, abs=1e-6)
    assert records(folder)[0]["kl_initial_policy"] == pytest.approx(0.0, abs=1e-6)


TWO: dict[str, Any] = {"update": {"num_minibatches": 2}}
COARSE: dict[str, Any] = {"model": {"autocast": "bfloat16"}}


def one_batch(folder: Path, algorithm: str, **changes: Any) -> tuple[Trainer, Batch]:
    """A trainer of the embedded model, and a batch on which its completions differ."""
    recipe = tiny_recipe(folder, algorithm, **changes)
    source = lifecycle.model_source(recipe, print)
    tokenizer, prompts = lifecycle._tokenized(recipe, source)
    model = lifecycle.load_model(source, "float32", torch.device("cpu"), None)
    made = Trainer(recipe, model, tokenizer, *prompts, RunFolder(folder), Silent())
    torch.manual_seed(0)
    batch, _ = collect(recipe, made.algorithm, model, tokenizer, prompts[0], 0, made.clock)
    assert batch is not None
    signal_B = torch.linspace(-1, 1, len(batch))
    return made, dataclasses.replace(batch, signal_B=signal_B)


@pytest.mark.parametrize("algorithm", ["grpo", "isopo", "isopo-natural"])
def test_the_gradient_under_autocast_is_near_the_one_in_float32(
    tmp_path: Path, algorithm: str
) -> None:
    exact, batch = one_batch(tmp_path / "exact", algorithm, **TWO)
    coarse, _ = one_batch(tmp_path / "coarse", algorithm, **TWO, **COARSE)
    for made in (exact, coarse):
        made._accumulate(batch, {}, measure_entropy=False)
    a, b = (
        {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}
        for made in (exact, coarse)
    )
    assert set(a) == set(b) == {name for name, _ in exact.model.named_parameters()}
    for name in a:
        assert b[name].dtype == torch.float32
        assert 0 < (a[name] - b[name]).norm() < 0.1 * a[name].norm(), name


def test_the_ratio_starts_at_one_under_autocast(tmp_path: Path) -> None:
    made, batch = one_batch(tmp_path / "run", "grpo", **TWO, **COARSE)
    old_log_prob_BT = batch.old_log_prob_BT
    assert old_log_prob_BT is not None
    response_BT = batch.completions.response_BT[:, 1:]
    token_BT = batch.completions.token_BT[:, 1:]

    def furthest(logits: torch.Tensor) -> float:
        change_BT = token_log_probs(logits, token_BT) - old_log_prob_BT
        return change_BT[response_BT].abs().max().item()

    logits_BTV = made._score(batch.completions).logits_BTV
    assert logits_BTV is not None
    assert furthest(logits_BTV) < 1e-5
    assert furthest(response_logits(made.model, batch.completions, 1.0)) > 1e-3


def test_rewards_are_not_graded_under_autocast(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import torch\n\n"
        "def exact(prompts, completions, **columns):\n"
        "    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32\n"
        "    return [0.5] * len(prompts)\n"
    )
    recipe = tiny_recipe(
        tmp_path / "run", task={"rewards": [f"{reward}:exact"]}, model={"autocast": "bfloat16"}
    )
    assert lifecycle.train(recipe, Silent()) == "finished"
    assert lifecycle.evaluate(recipe, None, Silent())[0].score == 0.5


@pytest.mark.parametrize("algorithm", ["reinforce", "isopo"])
def test_lora_trains_adapters_alone_and_resumes(tmp_path: Path, algorithm: str) -> None:
    folder = tmp_path / "run"
    recipe = tiny_recipe(folder, algorithm, steps=2, model={"lora": {"rank": 2}})
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


def test_optimizers_and_schedule(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9, "warmup_updates": 3}
    lifecycle.train(tiny_recipe(tmp_path / "run", steps=3, optimizer=optimizer), Silent())
    rates = [r["learning_rate"] for r in records(tmp_path / "run")[1:]]
    assert rates == pytest.approx([0.25, 0.375, 0.5])


def spread_reward(folder: Path) -> dict[str, Any]:
    """A reward that tells nearly all completions apart, so that every step has a gradient."""
    file = folder / "spread.py"
    file.write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [float(sum(map(ord, c)) % 17) for c in completions]\n"
    )
    return {"rewards": [f"{file}:spread"]}


GEOMETRIES = {
    "carried": {"overlap_source": "previous_step", "num_overlap_positions": 20},
    "ranks": {"overlap_source": "ranks"},
    "sequences": {"fisher": "sequences"},
    "trailing": {"fisher_denominator": "trailing"},
    "small memory": {"memory_mib": 1},
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_options_of_the_geometry_change_the_run(tmp_path: Path, options: dict[str, Any]) -> None:
    for name, geometry in (("plain", {}), ("given", options)):
        recipe = tiny_recipe(
            tmp_path / name,
            "isopo",
            task=spread_reward(tmp_path),
            update={"microbatch_size": 8},
            geometry=geometry,
        )
        assert lifecycle.train(recipe, Silent()) == "finished"
    ours, theirs = weights(tmp_path / "given"), weights(tmp_path / "plain")
    same = all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert same == ("memory_mib" in options or options.get("overlap_source") == "ranks")


@pytest.mark.parametrize("interact", ["group", "microbatch"])
def test_the_natural_rule_by_prompt_does_not_depend_on_microbatches(
    tmp_path: Path, interact: str
) -> None:
    """Without a step before, c is of each microbatch: the second step's is the first's mean."""
    runs = []
    for size in (4, 8, None):
        made, batch = one_batch(
            tmp_path / str(size),
            "isopo-natural",
            task=spread_reward(tmp_path),
            update={"microbatch_size": size},
            geometry={"interact": interact},
        )
        assert made.isopo is not None
        for _ in range(2):
            made.model.zero_grad()
            made._accumulate(batch, {}, measure_entropy=False)
            made.isopo.step()
        runs.append([p.grad for p in made.model.parameters()])
    errors = [
        max(float((a - b).norm() / b.norm()) for a, b in zip(run, runs[-1], strict=True))
        for run in runs[:-1]
    ]
    assert max(errors) < 1e-3 if interact == "group" else min(errors) > 1e-2


def test_diagnostics_are_written_on_their_cadence(tmp_path: Path, capsys: Any) -> None:
    from proxstep.cli import commands as cli

    folder = tmp_path / "run"
    recipe = tiny_recipe(
        folder, "isopo", steps=3, task=spread_reward(tmp_path), geometry={"diagnose_every": 2}
    )
    assert lifecycle.train(recipe, Silent()) == "finished"
    lines = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert all(layer["ntk_condition"] != 0 for line in lines for layer in line["layers"])
    first, second, third = records(folder)[1:]
    assert first["geometry/cosine_to_reinforce"] is not None
    assert third["geometry/noise_variance"] > 0
    assert "geometry/noise_variance" not in second
    assert cli.main(["diagnose", str(folder), "--step", "1"]) == 0
    assert capsys.readouterr().out.startswith("step 1\n")
    assert cli.main(["diagnose", str(folder), "--step", "2"]) == 2
    assert "was not measured" in capsys.readouterr().err


def test_diagnostics_do_not_change_the_run(tmp_path: Path) -> None:
    for every in (1, None):
        recipe = tiny_recipe(
            tmp_path / str(every),
            "isopo-figure4",
            task=spread_reward(tmp_path),
            geometry={"diagnose_every": every},
        )
        lifecycle.train(recipe, Silent())
    ours, theirs = weights(tmp_path / "1"), weights(tmp_path / "None")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "isopo", "isopo+opo"])
def test_the_chunked_head_gives_the_same_run(tmp_path: Path, algorithm: str) -> None:
    for head in ("full", "chunked"):
        recipe = tiny_recipe(
            tmp_path / head,
            algorithm,
            steps=2,
            model={"head": head},
            task=spread_reward(tmp_path),
            update={"num_minibatches": 2},
            optimizer={"name": "sgd", "learning_rate": 0.05},
        )
        assert lifecycle.train(recipe, Silent()) == "finished"
    ours, theirs = records(tmp_path / "chunked"), records(tmp_path / "full")
    for a, b in zip(ours, theirs, strict=True):
        for name in ("score", "kl_initial_policy", "kl_policy_initial", "entropy", "grad_norm"):
            if a[name] is not None or b[name] is not None:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name

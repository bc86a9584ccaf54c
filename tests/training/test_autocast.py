"""Under bfloat16 autocast the policy computes in one dtype, near what float32 gives."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import Silent, records, tiny_recipe
from tests.selection import slow
from tests.training.one_batch import one_batch

from proxstep.logprobs.tokens import token_log_probs
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import lifecycle
from proxstep.training.batch import _log_probs
from proxstep.training.rollout import response_logits


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


@pytest.mark.parametrize(
    ("autocast", "algorithm", "lora"),
    [
        ("bfloat16", "isopo", {"rank": 2}),
        (None, "isopo-natural", None),
        *slow(
            *product([None], ["grpo", "isopo"], [None, {"rank": 2}]),
            *product(["bfloat16"], ["grpo", "isopo-natural"], [None, {"rank": 2}]),
            (None, "isopo-natural", {"rank": 2}),
            ("bfloat16", "isopo", None),
        ),
    ],
)
def test_the_policy_computes_in_one_dtype_wherever_it_runs(
    tmp_path: Path,
    autocast: str | None,
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
    assert seen == {torch.bfloat16 if autocast else torch.float32}
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    saved = load_file(latest_checkpoint(folder) / name)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert records(folder)[0]["kl_policy_initial"] == pytest.approx(0.0, abs=1e-6)
    assert records(folder)[0]["kl_initial_policy"] == pytest.approx(0.0, abs=1e-6)


TWO: dict[str, Any] = {"update": {"num_minibatches": 2}}


COARSE: dict[str, Any] = {"model": {"autocast": "bfloat16"}}


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
    """Of every sequence; a batch has no old log-probabilities of those without an advantage."""
    made, batch = one_batch(tmp_path / "run", "grpo", **TWO, **COARSE)
    old_log_prob_BT = _log_probs(made.recipe, made.model, batch.completions)
    first = batch.completions.first_column()
    assert first > 1  # the prompts' logits are left out
    response_BT = batch.completions.response_BT[:, first:]
    token_BT = batch.completions.token_BT[:, first:]

    def furthest(logits: torch.Tensor) -> float:
        change_BT = token_log_probs(logits, token_BT) - old_log_prob_BT[:, first - 1 :]
        return change_BT[response_BT].abs().max().item()

    logits_BTV = made._score(batch.completions).logits_BTV
    assert logits_BTV is not None
    assert furthest(logits_BTV) < 1e-5
    assert furthest(response_logits(made.model, batch.completions, 1.0, first)) > 1e-3


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

"""A KL budget in TRL: a loop that steps its optimizer by itself."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine import Silent, tiny_recipe
from tests.engines.trl_case import (
    SIZES,
    Watch,
    dataset,
    made,
    quiet,
    text_reward,
    tiny,
    trained,
)
from tests.selection import slow
from torch import Tensor
from trl import GRPOTrainer

from proxstep.budget import KlBudget
from proxstep.budget.prediction import sampled_kl
from proxstep.engines.trl import IsopoTrainer, OpoTrainer, PolicyTrainer
from proxstep.engines.trl.budget import StepBudget
from proxstep.engines.trl.launch import train
from proxstep.engines.trl.scoring import response_mask
from proxstep.errors import ProxstepError

NATS, LARGE = 0.02, {"learning_rate": 0.3, "optim": "sgd"}
KINDS = {
    "policy": (PolicyTrainer, {"loss_type": "grpo"}),
    "isopo": (IsopoTrainer, {}),
    "opo": (OpoTrainer, {}),
}


def run(kind: str, folder: Path, **options: Any) -> tuple[Any, Watch, Any]:
    """A trainer after its run, what was watched, and the initial weights."""
    trainer_class, own = KINDS[kind]
    tokenizer, model = tiny()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    trainer, watch = made(trainer_class, folder, model, tokenizer, **own, **options)
    trained(trainer)
    return trainer, watch, initial


def divergence(trainer: Any, inputs: list[Any], before: Any, after: Any) -> float:
    """KL of two policies on a step's completions, in nats per completion."""
    found: list[list[Tensor]] = []
    for weights in (before, after):
        trainer.model.load_state_dict(weights)
        with torch.no_grad():
            found.append([trainer._score_again(batch) for batch in inputs])
    masks = [response_mask(batch) for batch in inputs]
    kl = [sampled_kl(*each).mean() for each in zip(*found, masks, strict=True)]
    return torch.stack(kl).mean().item()


@pytest.mark.parametrize("kind", ["policy", *slow("isopo", "opo")])
def test_a_step_is_no_longer_than_its_budget(kind: str, tmp_path: Path) -> None:
    """All completions judge, so that the measured divergence is the budget's own.

    TRL's learning rate falls to 0 by default, and the budget with its square.
    """
    options = {**LARGE, "kl_budget": NATS, "kl_num_sequences": 16, "max_steps": 3}
    trainer, watch, initial = run(kind, tmp_path, **options)
    scales = [log["kl_budget/scale"] for log in watch.logs if "kl_budget/scale" in log]
    assert len(scales) == 3
    assert all(scale < 0.5 for scale in scales)
    for number, (before, after) in enumerate(pairwise([initial, *watch.weights])):
        kl = divergence(trainer, watch.microbatches[4 * number : 4 * number + 4], before, after)
        budget = NATS * (1 - number / 3) ** 2
        assert 0.5 * budget < kl < 1.5 * budget


@pytest.mark.parametrize("kind", ["policy", *slow("isopo", "opo")])
def test_a_step_within_its_budget_is_the_optimizers_own(kind: str, tmp_path: Path) -> None:
    _, free, _ = run(kind, tmp_path / "free", max_steps=2)
    _, watch, _ = run(kind, tmp_path / "budget", max_steps=2, kl_budget=1e6)
    for one, other in zip(free.weights, watch.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_steps_of_a_rollout_share_it(tmp_path: Path) -> None:
    options = {**LARGE, "kl_budget": NATS, "kl_num_sequences": 8, "max_steps": 4}
    options |= {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer, watch, initial = run("policy", tmp_path, **options)
    for number, (before, after) in enumerate(pairwise([initial, *watch.weights])):
        kl = divergence(trainer, watch.microbatches[2 * number : 2 * number + 2], before, after)
        assert kl < 0.75 * NATS


@pytest.mark.slow
def test_autocast_does_not_blur_what_is_measured(tmp_path: Path) -> None:
    """Under bfloat16 a step of nothing would seem to move the policy."""
    _, watch, _ = run("policy", tmp_path, bf16=True, kl_budget=NATS, learning_rate=1e-9)
    assert watch.logs[0]["kl_budget/predicted"] < 1e-9


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    options = {**LARGE, "optim": "adamw_torch", "kl_budget": NATS, "kl_control": "corrected"}
    options |= {"save_strategy": "steps", "save_steps": 1}
    whole, *_ = run("policy", tmp_path / "whole", max_steps=3, **options)
    run("policy", tmp_path / "part", max_steps=3, **options)
    again = made(
        PolicyTrainer, tmp_path / "part", *tiny()[::-1], loss_type="grpo", max_steps=3, **options
    )[0]
    trained(again, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("microbatches", "accumulated", "iterations", "steps"),
    [(4, 2, 1, 2), (2, 4, 1, 1), (2, 4, 2, 1), (2, 4, 4, 2), (3, 2, 2, 3), (6, 4, 2, 3)],
)
def test_how_many_steps_share_a_rollout(
    microbatches: int, accumulated: int, iterations: int, steps: int
) -> None:
    """TRL samples anew after so many microbatches, wherever a step begins."""
    budget, _ = step_budget(
        steps_per_generation=microbatches,
        gradient_accumulation_steps=accumulated,
        num_iterations=iterations,
    )
    budget.begin_rollout()
    assert budget.optimizer is not None
    assert budget.optimizer.state_dict()["kl_budget"]["rollout"] == (1 / steps, 0.0, steps)


def step_budget(**options: Any) -> tuple[StepBudget, list[Tensor]]:
    """The budget of a trainer, and the completions that it has scored."""
    scored: list[Tensor] = []

    def score(part: Any) -> tuple[Tensor, Tensor]:
        scored.append(part["completion_ids"][:, 0])
        return torch.zeros(part["completion_ids"].shape), response_mask(part)

    given = {"kl_budget": 0.1, "kl_budget_per": "sequence", "kl_control": "predicted"}
    args = SimpleNamespace(**given, kl_num_sequences=None, **options)
    budget = StepBudget(args, score, lambda measured: None)
    model = torch.nn.Linear(2, 2)
    budget.around(torch.optim.SGD(model.parameters(), lr=0.1), model)
    return budget, scored


@pytest.mark.parametrize("counting", [12, 3, 0])
def test_completions_that_are_masked_do_not_judge(counting: int) -> None:
    """As with mask_truncated_completions: eight judges evenly spaced could all be such."""
    budget, scored = step_budget()
    mask = torch.zeros(64, 5, dtype=torch.long)
    mask[torch.randperm(64, generator=torch.Generator().manual_seed(3))[:counting]] = 1
    ids = torch.arange(64)[:, None].expand(64, 5)
    for part in range(4):
        rows = slice(16 * part, 16 * part + 16)
        budget.remember({"completion_ids": ids[rows], "completion_mask": mask[rows]})
    budget._log_probs()
    judged = torch.cat(scored)
    assert len(judged) == {12: 8, 3: 3, 0: 8}[counting]
    assert counting == 0 or mask[judged].all()


REFUSED: dict[str, Any] = {
    "fp16": {"fp16": True},
    "fsdp": {"fsdp": "full_shard"},
    "optim": {"optim": "lomo"},
    "weights of its own": {"optim": "schedule_free_adamw"},
    "kl_budget": {"kl_budget": -1.0},
    "kl_control": {"kl_control": "hope"},
    "kl_num_sequences": {"kl_budget": None, "kl_num_sequences": 4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    options = {"loss_type": "grpo", "use_cpu": True, "kl_budget": 0.1, **REFUSED[name]}
    with pytest.raises(ProxstepError, match=name), quiet():
        PolicyTrainer.config_class(str(tmp_path), **options)


def test_weights_in_half_precision_are_refused(tmp_path: Path) -> None:
    tokenizer, model = tiny()
    trainer, _ = made(
        PolicyTrainer, tmp_path, model.bfloat16(), tokenizer, loss_type="grpo", kl_budget=0.1
    )
    with pytest.raises(ProxstepError, match="rounding errors are larger"):
        trainer.create_optimizer()


def test_a_step_that_nobody_judges() -> None:
    _, model = tiny()
    optimizer = KlBudget(torch.optim.SGD(model.parameters(), lr=0.1), model, nats=0.1)
    with pytest.raises(ProxstepError, match="needs a function"):
        optimizer.step()


def _lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_a_recipe_with_a_budget(tmp_path: Path) -> None:
    """GRPO too goes through our trainer then; its fields are those of the local engine."""
    (tmp_path / "rewards.py").write_text(
        "def spread(completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    rewards = {"rewards": [f"{tmp_path}/rewards.py:spread"]}
    recipe = tiny_recipe(tmp_path / "run", "grpo", update={"kl_budget": 1e-8}, task=rewards)
    with quiet():
        train(recipe, Silent())
    rows = [json.loads(line) for line in _lines(tmp_path / "run")]
    scales = [row["kl_budget/scale"] for row in rows if "kl_budget/scale" in row]
    assert scales
    assert all(scale < 1 for scale in scales)


def test_trls_own_trainer_does_not_train_with_our_configuration(tmp_path: Path) -> None:
    """It would take a loss_type that it knows as its own, and leave the budget out."""
    tokenizer, model = tiny()
    with quiet():
        args = PolicyTrainer.config_class(str(tmp_path), **SIZES, loss_type="grpo", kl_budget=0.1)
        trainer = GRPOTrainer(model, text_reward, args, dataset(), processing_class=tokenizer)
    with pytest.raises(ProxstepError, match="PolicyConfig was given to a trainer of TRL's"):
        trained(trainer)


@pytest.mark.parametrize(
    ("loss_type", "remedy"), [("dapo", "set clip_ratio_high instead"), ("opo", "leave it out")]
)
def test_a_clip_by_trls_name_is_refused_with_ours(
    tmp_path: Path, loss_type: str, remedy: str
) -> None:
    with pytest.raises(ProxstepError, match=remedy), quiet():
        PolicyTrainer.config_class(
            str(tmp_path), loss_type=loss_type, epsilon_high=0.28, use_cpu=True
        )

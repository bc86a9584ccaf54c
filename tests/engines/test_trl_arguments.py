"""What people hand to GRPOTrainer beside its options, and find afterwards: as in TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.engines.trl_case import PROMPTS, SIZES, Watch, dataset, quiet, text_reward, tiny, trained
from tests.selection import slow
from trl import GRPOConfig, GRPOTrainer

from proxstep.engines.trl import IsopoTrainer, OpoTrainer

TRAINERS = [OpoTrainer, *slow(IsopoTrainer)]
SAMPLED = ("reward", "reward_std", "rewards/", "completions/")


def run(
    trainer_class: Any, folder: Path, reward: Any = text_reward, *, data: Any = None, **more: Any
) -> tuple[Any, Watch]:
    """A trainer of one step with arguments of the trainer's own, and what it did."""
    options = {"gradient_accumulation_steps": 2} | more.pop("options", {})
    tokenizer, model = tiny()
    config_class = getattr(trainer_class, "config_class", GRPOConfig)
    if callable(more.get("optimizers")):
        more["optimizers"] = more["optimizers"](model)
    with quiet():
        args = config_class(str(folder), **(SIZES | options))
        trainer = trainer_class(
            model, reward, args, data or dataset(), processing_class=tokenizer, **more
        )
    watch = Watch(model=trainer.model)
    trainer.add_callback(watch)
    torch.manual_seed(0)
    trained(trainer)
    return trainer, watch


def sampled(watch: Watch) -> dict[str, float]:
    return {name: value for name, value in watch.logs[0].items() if name.startswith(SAMPLED)}


async def slow_reward(completions: list[str], **columns: Any) -> list[float]:
    return text_reward(completions, **columns)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_asynchronous_rewards(tmp_path: Path, trainer_class: Any) -> None:
    """A coroutine's rewards are those of the function that it awaits, and of TRL's own trainer."""
    _, found = run(trainer_class, tmp_path / "a", [slow_reward, text_reward])
    _, expected = run(GRPOTrainer, tmp_path / "b", [slow_reward, text_reward])
    assert sampled(found) == sampled(expected)
    assert found.logs[0]["rewards/slow_reward/mean"] == found.logs[0]["rewards/text_reward/mean"]


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_an_iterable_dataset(tmp_path: Path, trainer_class: Any) -> None:
    stream = {"data": Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset()}
    _, found = run(trainer_class, tmp_path / "a", **stream)
    _, expected = run(GRPOTrainer, tmp_path / "b", **stream)
    assert sampled(found) == sampled(expected)
    assert len(found.gradients) == 1


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_several_evaluation_sets(tmp_path: Path, trainer_class: Any) -> None:
    sets = {"eval_dataset": {"one": dataset(), "two": dataset()}}
    options = {"eval_strategy": "steps", "eval_steps": 1}
    _, watch = run(trainer_class, tmp_path, **sets, options=options)
    logged = {name for log in watch.logs for name in log}
    assert {"eval_one_loss", "eval_two_loss"} <= logged


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_an_optimizer_of_one_s_own(tmp_path: Path, trainer_class: Any) -> None:
    def own(model: torch.nn.Module) -> tuple[Any, Any]:
        return torch.optim.Adagrad(model.parameters(), lr=0.5), None

    trainer, _ = run(trainer_class, tmp_path, optimizers=own)
    assert type(trainer.optimizer.optimizer) is torch.optim.Adagrad


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_card_says_what_trained_the_model(tmp_path: Path, trainer_class: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer, _ = run(trainer_class, tmp_path, options=options)
    card = (tmp_path / "README.md").read_text()
    assert trainer._paper["id"] in card
    assert trainer._name in card
    assert "- proxstep" in card
    assert set(trainer_class._tag_names) <= set(trainer.model.model_tags)


@pytest.mark.slow
def test_opo_with_torch_compile(tmp_path: Path) -> None:
    """The compiled model has the gradient of the plain one."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    _, found = run(OpoTrainer, tmp_path / "a", options=compiled)
    _, expected = run(OpoTrainer, tmp_path / "b")
    assert sampled(found) == sampled(expected)
    for name, gradient in expected.gradients[0].items():
        torch.testing.assert_close(found.gradients[0][name], gradient, rtol=1e-4, atol=1e-6)

"""The KL penalty in the reward: what a step's advantages become, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import collected, made_trainer, with_reward
from torch import Tensor

from proxstep.logprobs.tokens import KlEstimator, token_log_probs
from proxstep.training.rollout import initial_policy, response_logits
from proxstep.training.sampler import make_sampler
from proxstep.training.trainer import Trainer

COEF, TEMPERATURE = 0.5, 0.8


def by_index(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(index % 3) for index in range(len(prompts))]


def left_home(folder: Path, kind: KlEstimator = "k1", **changes: Any) -> Trainer:
    """A trainer whose policy is no longer the initial one."""
    made = made_trainer(
        folder,
        objective={"advantage": "group-centered"},
        regularizer={"kl_coef": COEF, "kl_in": "reward", "kl_estimator": kind},
        rollout={"num_prompts": 3, "temperature": TEMPERATURE},
        **changes,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return with_reward(made, by_index)


def log_ratio(made: Trainer, completions: Any) -> list[Tensor]:
    """log p - log q of each completion's tokens, from all logits."""
    token = completions.token_BT[:, 1:]
    with torch.no_grad():
        ours = response_logits(made.model, completions, TEMPERATURE)
        with initial_policy(made.model, made.initial) as policy:
            theirs = response_logits(policy, completions, TEMPERATURE)
        ratio = token_log_probs(ours, token) - token_log_probs(theirs, token)
    return [row[mask] for row, mask in zip(ratio, completions.response_BT[:, 1:], strict=True)]


OF_KIND = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: (-x).exp() - 1 + x,
}


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize(
    "model", [{}, {"lora": {"rank": 2}}, {"head": "chunked"}], ids=["full", "lora", "chunked"]
)
def test_advantages_are_of_the_penalized_reward(
    tmp_path: Path, kind: KlEstimator, model: dict[str, Any]
) -> None:
    made = left_home(tmp_path, kind, model=model)
    batch, measured = collected(made)
    assert batch is not None
    ratios = log_ratio(made, batch.completions)
    penalty = torch.stack([-COEF * OF_KIND[kind](ratio).sum() for ratio in ratios])
    assert penalty.std() > 0.01
    reward = torch.tensor(by_index([None] * 12, []))
    total = (reward + penalty).view(3, 4)
    expected = (total - total.mean(dim=1, keepdim=True)).flatten()
    assert torch.allclose(batch.signal_B, expected, atol=1e-4)
    assert measured["rewards/kl"] == pytest.approx(penalty.mean().item(), rel=1e-3, abs=1e-5)
    assert measured["reward"] == pytest.approx(reward.mean().item())
    assert batch.old_log_prob_BT is None


def test_the_log_probabilities_serve_the_update_too(tmp_path: Path) -> None:
    made = left_home(tmp_path, update={"num_minibatches": 3, "microbatch_size": 5})
    batch, _ = collected(made)
    assert batch is not None
    assert batch.old_log_prob_BT is not None
    with torch.no_grad():
        logits = response_logits(made.model, batch.completions, TEMPERATURE)
        expected = token_log_probs(logits, batch.completions.token_BT[:, 1:])
    mask = batch.completions.response_BT[:, 1:]
    assert torch.allclose(batch.old_log_prob_BT[mask], expected[mask], atol=1e-5)


def test_a_policy_that_has_not_moved_pays_nothing(tmp_path: Path) -> None:
    made = made_trainer(
        tmp_path, regularizer={"kl_coef": 5.0, "kl_in": "reward", "kl_estimator": "k1"}
    )
    batch, measured = collected(with_reward(made, by_index))
    assert batch is not None
    assert measured["rewards/kl"] == pytest.approx(0.0, abs=1e-5)


def test_nothing_is_added_to_the_loss(tmp_path: Path) -> None:
    made = left_home(tmp_path)
    batch, _ = collected(made)
    assert batch is not None
    taken = made._accumulate(batch, {}, measure_entropy=False)
    assert set(taken) == {"loss"}


def test_equal_rewards_descend_the_divergence(tmp_path: Path) -> None:
    """The penalty alone: averaged over many samples, a step leads towards the initial policy."""
    made = left_home(tmp_path, optimizer={"name": "sgd", "learning_rate": 0.05})
    made.recipe = made.recipe.model_copy(
        update={"rollout": made.recipe.rollout.model_copy(update={"num_generations": 64})}
    )
    made.sampler = make_sampler(made.recipe, made.model, made.tokenizer)
    with_reward(made, lambda prompts, completions, **columns: [1.0] * len(prompts))

    def divergence() -> float:
        batch, measured = collected(made)
        assert batch is not None
        return -measured["rewards/kl"] / COEF

    before = divergence()
    for _ in range(6):
        made._train_step()
    assert divergence() < 0.8 * before

"""A recipe's regularizer on a policy's completions: as a term of the loss, or of the reward.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.logprobs.logits import entropy, kl_divergence, kl_estimate
from proxstep.training.evaluation import initial_log_probs, initial_logits
from proxstep.training.models import autocast
from proxstep.training.regularizers import kl_reward, regularizer_loss
from proxstep.training.rollout import Completions
from proxstep.training.scores import Scores
from proxstep.typing import Float, Tensor


def loss_penalty(
    recipe: Recipe,
    model: nn.Module,
    initial: nn.Module | None,
    scores: Scores,
    completions: Completions,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return a microbatch's share of the regularizer's loss, and its terms.

    Args:
        recipe: The recipe, whose regularizer is in the loss.
        model: The policy.
        initial: The initial policy, or None for a model whose adapters can be switched off.
        scores: What the policy gives to the completions, with its graph.
        completions: The microbatch.
        num_tokens: Completion tokens of the whole optimizer step.
    """
    section = recipe.regularizer
    entropy_BT = kl_BT = None
    if section.entropy_coef > 0:
        entropy_BT = entropy(_logits(scores))
    if section.kl_coef > 0 and section.kl_in == "loss":
        of_initial = (model, initial, completions, recipe.rollout.temperature)
        with autocast(recipe, model):
            if section.kl_estimator == "exact":
                reference = initial_logits(*of_initial)
            else:
                reference = initial_log_probs(*of_initial, len(completions), recipe.model.head)
        if section.kl_estimator == "exact":
            kl_BT = kl_divergence(_logits(scores), reference)
        else:
            kl_BT = kl_estimate(scores.log_prob_BT, reference, section.kl_estimator)
    return regularizer_loss(
        entropy_BT,
        kl_BT,
        completions.response_BT[:, 1:],
        entropy_coef=section.entropy_coef,
        kl_coef=section.kl_coef,
        num_tokens=num_tokens,
    )


def reward_penalty(
    recipe: Recipe,
    model: nn.Module,
    initial: nn.Module | None,
    log_prob_BT: Float[Tensor, "batch last"],
    completions: Completions,
) -> Float[Tensor, " batch"]:
    """Return what the divergence from the initial policy adds to each completion's reward.

    Args:
        recipe: The recipe, whose regularizer is in the reward.
        model: The policy that sampled.
        initial: The initial policy, or None for a model whose adapters can be switched off.
        log_prob_BT: The policy's log-probabilities of the tokens from the second on, in nats.
        completions: The completions.
    """
    section, update = recipe.regularizer, recipe.update
    assert section.kl_estimator != "exact"  # the recipe's check
    with autocast(recipe, model):
        initial_log_prob_BT = initial_log_probs(
            model,
            initial,
            completions,
            recipe.rollout.temperature,
            update.microbatch_size or len(completions),
            recipe.model.head,
        )
    return kl_reward(
        log_prob_BT,
        initial_log_prob_BT,
        completions.response_BT[:, 1:],
        kl_coef=section.kl_coef,
        kind=section.kl_estimator,
    )


def _logits(scores: Scores) -> Float[Tensor, "batch last vocab"]:
    assert scores.logits_BTV is not None  # the recipe's check: the head is full
    return scores.logits_BTV

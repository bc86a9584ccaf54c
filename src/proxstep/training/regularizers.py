"""What is added to an objective: an entropy bonus and a penalty for leaving the initial policy.

As terms of the loss they are ordinary losses: ISOPO must be off in their forward and backward. As
a term of the reward the penalty goes the way of every reward, through advantages and geometry.

Which KL penalty to use: in the loss, `kl_divergence` (exact over the vocabulary) or, where logits
are not at hand, `kl_estimate` k2, whose expected gradient on-policy is the same; k3, which TRL and
verl call their KL loss, descends KL(initial || policy) instead, and k1 descends nothing in
expectation. In the reward, k1: with it the policy gradient of the penalized reward is exactly that
of the expected reward minus the KL divergence of whole completions; k2 and k3 have another.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.logprobs.tokens import KlEstimator, entropy, kl_divergence, kl_estimate, masked_sum
from proxstep.training.rollout import (
    Completions,
    Cut,
    Scores,
    autocast,
    completion_log_probs,
    from_column,
    initial_policy,
    response_logits,
)
from proxstep.typing import Bool, Float, Tensor


def regularizer_loss(
    entropy_BT: Float[Tensor, "batch tokens"] | None,
    kl_BT: Float[Tensor, "batch tokens"] | None,
    response_BT: Bool[Tensor, "batch tokens"],
    *,
    entropy_coef: float,
    kl_coef: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return one microbatch's share of the regularizer's loss, and of its terms.

    With H the entropy of the policy p at a token and D its divergence from the initial policy q:

        L = sum over tokens of (-entropy_coef H + kl_coef D) / num_tokens

    Args:
        entropy_BT: H in nats, with its graph; None to leave the term out.
        kl_BT: D in nats, with its graph: `kl_divergence` of the logits, or `kl_estimate` from the
            sampled tokens; None to leave the term out.
        response_BT: True at completion tokens, aligned with both.
        entropy_coef: Reward for a nat of entropy per token.
        kl_coef: Price of a nat of KL divergence per token.
        num_tokens: Completion tokens of the whole optimizer step.

    Returns:
        The loss, and the microbatch's shares of the step's mean entropy and KL divergence in nats
        per token and of the loss; the shares of a step's microbatches sum to the step's values.

    Raises:
        ValueError: If both terms are left out.

    Source: the entropy bonus of Williams and Peng (1991); the KL penalty of arXiv 2402.03300, eq.
        3, TRL's `beta` and verl's `kl_loss_coef`.

    Differs: they take D = k3 of the sampled tokens; with `kl_divergence` the gradient is that of
        KL(p || q) at each token, without an estimate's variance.
    """
    if entropy_BT is None and kl_BT is None:
        raise ValueError("regularizer_loss needs entropy_BT or kl_BT")
    terms: dict[str, Tensor] = {}
    if entropy_BT is not None:
        terms["entropy"] = masked_sum(entropy_BT, response_BT).sum() / num_tokens
    if kl_BT is not None:
        terms["kl"] = masked_sum(kl_BT, response_BT).sum() / num_tokens
    price = {"entropy": -entropy_coef, "kl": kl_coef}
    loss = torch.stack([price[name] * term for name, term in terms.items()]).sum()
    return loss, {**{name: term.item() for name, term in terms.items()}, "loss": loss.item()}


def kl_reward(
    log_prob_BT: Float[Tensor, "batch tokens"],
    initial_log_prob_BT: Float[Tensor, "batch tokens"],
    response_BT: Bool[Tensor, "batch tokens"],
    *,
    kl_coef: float,
    kind: KlEstimator,
) -> Float[Tensor, " batch"]:
    """Return what a completion's divergence from the initial policy adds to its reward.

    r_b = -kl_coef * sum over its tokens of D, with D the estimate `kind`

    With k1 it is -kl_coef log(p(y_b) / q(y_b)): REINFORCE's expected gradient on r is that of
    -kl_coef KL(p || q) between distributions over whole completions. That gradient has a part that
    the terms of a loss lack: how a token changes the divergence of the tokens after it.

    Args:
        log_prob_BT: log p of the tokens under the policy that sampled them, in nats.
        initial_log_prob_BT: log q of the same tokens under the initial policy.
        response_BT: True at completion tokens, aligned with both.
        kl_coef: Price of a nat, in reward units.
        kind: The estimator.

    Returns:
        One number for each sequence, in reward units; 0 for one without a completion token.

    Source: arXiv 2203.02155, section 3.5 (per token there); verl's `use_kl_in_reward`.

    Differs: verl subtracts each token's estimate from that token's reward; with one advantage for
        the whole sequence only the sum matters.
    """
    kl_BT = kl_estimate(log_prob_BT, initial_log_prob_BT, kind)
    return -kl_coef * masked_sum(kl_BT, response_BT)


def loss_penalty(
    recipe: Recipe,
    model: nn.Module,
    initial: nn.Module | None,
    scores: Scores,
    completions: Completions,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return a microbatch's share of the recipe's regularizer loss, and its terms.

    `initial` is the initial policy, or None for a model whose adapters can be switched off. The
    scores are the policy's, with their graph; `num_tokens` counts the whole optimizer step's.
    """
    section, temperature = recipe.regularizer, recipe.rollout.temperature
    logits_BTV = scores.logits_BTV  # None with the chunked head, which the recipe refuses below
    first = completions.first_column()
    entropy_BT = kl_BT = None
    if section.entropy_coef > 0:
        assert logits_BTV is not None
        entropy_BT = from_column(entropy(logits_BTV), first)
    if section.kl_coef > 0 and section.kl_in == "loss":
        if section.kl_estimator == "exact":
            with autocast(recipe, model), initial_policy(model, initial) as policy:
                initial_BTV = response_logits(policy, completions, temperature, first)
            assert logits_BTV is not None
            kl_BT = from_column(kl_divergence(logits_BTV, initial_BTV), first)
        else:
            together = Cut(size=len(completions))
            initial_BT = _initial_log_probs(recipe, model, initial, completions, together)
            kl_BT = kl_estimate(scores.log_prob_BT, initial_BT, section.kl_estimator)
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

    `initial` is as for `loss_penalty`; `log_prob_BT` is the policy's, of the tokens from the second
    on, in nats.
    """
    section, cut = recipe.regularizer, Cut.of(recipe.update)
    assert section.kl_estimator != "exact"  # the recipe's check
    initial_log_prob_BT = _initial_log_probs(recipe, model, initial, completions, cut)
    return kl_reward(
        log_prob_BT,
        initial_log_prob_BT,
        completions.response_BT[:, 1:],
        kl_coef=section.kl_coef,
        kind=section.kl_estimator,
    )


def _initial_log_probs(
    recipe: Recipe,
    model: nn.Module,
    initial: nn.Module | None,
    completions: Completions,
    cut: Cut,
) -> Tensor:
    temperature, head = recipe.rollout.temperature, recipe.model.head
    with autocast(recipe, model), initial_policy(model, initial) as policy:
        return completion_log_probs(policy, completions, temperature, cut, head)

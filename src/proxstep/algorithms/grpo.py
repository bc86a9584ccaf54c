"""GRPO and DAPO: PPO's clipped token ratio with one advantage per sequence.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

from functools import partial

import torch

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate,
    check_clip_range,
    check_inputs,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.logprobs.tokens import bounded, masked_mean, ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def clipped_surrogate(
    ratio: Float[Tensor, "batch ..."],
    advantage: Float[Tensor, "batch ..."],
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> tuple[Float[Tensor, "batch ..."], Bool[Tensor, "batch ..."]]:
    """Return PPO's pessimistic surrogate and where its clip took the gradient away.

    -min(rho A, clip(rho, 1 - low, 1 + high) A), the same for a token's ratio and a sequence's.

    Source: arXiv 1707.06347, equation 7.
    """
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    free_gain, clipped_gain = ratio * advantage, clipped * advantage
    return -torch.minimum(free_gain, clipped_gain), clipped_gain < free_gain


def grpo(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return GRPO's clipped token-level objective.

    L = aggregate(-min(rho_bt A_b, clip(rho_bt, 1 - low, 1 + high) A_b))
    rho_bt = pi(y_bt) / pi_old(y_bt)

    One update per batch means rho = 1: the clip never acts and the gradient is REINFORCE's, up to
    the aggregation.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        clip_ratio_low: Width of the clip below 1.
        clip_ratio_high: Width of the clip above 1.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `clip_ratio` (share of tokens whose gradient the clip
        removed), `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together or a clip width is negative.

    Source: arXiv 2402.03300, equation 3.
    Differs: no KL term here (it is a separate term, not part of the clip); the log-ratio is bounded
    at 20 nats, so that neither loss nor gradient overflows.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_clip_range(clip_ratio_low, clip_ratio_high)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    loss_BT, is_clipped_BT = clipped_surrogate(
        bounded(log_ratio_BT).exp(), advantages.detach()[:, None], clip_ratio_low, clip_ratio_high
    )
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    metrics["clip_ratio"] = masked_mean(is_clipped_BT.to(log_probs), response_mask)
    return aggregate(loss_BT, response_mask, aggregation), metrics


CLIP_KEYS = {
    "clip_ratio_low": Key("Ratios are clipped at 1 - this.", ge=0),
    "clip_ratio_high": Key("Ratios are clipped at 1 + this.", ge=0),
}

GRPO = Algorithm(
    "grpo",
    grpo,
    level="token",
    idle_at_zero=True,
    about="Token ratios, clipped (arXiv 2402.03300).",
    keys=CLIP_KEYS,
    on_policy="clips nothing",
)
DAPO = Algorithm(
    "dapo",
    partial(grpo, clip_ratio_high=0.28, aggregation=TOKEN_MEAN),
    level="token",
    idle_at_zero=True,
    about="GRPO with a higher upper bound and a token mean (arXiv 2503.14476).",
    keys=CLIP_KEYS,
    on_policy="clips nothing",
    source="arXiv 2503.14476, sections 3.1 (clip-higher) and 3.3 (token mean); widths from section "
    "4.1. Dynamic sampling and overlong shaping act on the batch and are keys of the rollout.",
)
DR_GRPO = Algorithm(
    "dr-grpo",
    partial(grpo, aggregation=SEQ_MEAN_TOKEN_SUM_NORM),
    level="token",
    idle_at_zero=True,
    about="GRPO without the biases of length and of the group's spread (arXiv 2503.20783).",
    keys=CLIP_KEYS,
    advantage="group-centered",
    on_policy="clips nothing",
    source="arXiv 2503.20783, section 3.2: dividing the sum over tokens by a constant removes the "
    "length bias, and not dividing by the group's standard deviation the difficulty bias.",
)

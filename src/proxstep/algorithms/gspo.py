"""GSPO: the clipped surrogate of the whole sequence's length-normalized ratio.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
    check_clip_range,
    check_inputs,
)
from proxstep.algorithms.base import Algorithm
from proxstep.algorithms.grpo import CLIP_KEYS, clipped_surrogate
from proxstep.logprobs.tokens import bounded, masked_mean, ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def gspo(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    clip_ratio_low: float = 3e-4,
    clip_ratio_high: float = 4e-4,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return GSPO's sequence-level objective.

    L = mean_b -min(s_b A_b, clip(s_b, 1 - low, 1 + high) A_b)
    s_b = exp(mean_t (log pi(y_bt) - log pi_old(y_bt)))

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        clip_ratio_low: Width of the clip below 1; s_b moves far less than a token's ratio.
        clip_ratio_high: Width of the clip above 1.
        aggregation: The mode and the counts of the whole optimizer step. The sequence's value
            stands at each of its tokens, so the default is the paper's mean over sequences;
            token-mean weights a sequence by its length.

    Returns:
        The loss and the per-sequence metrics `clip_ratio` (1 where the clip removed the sequence's
        gradient), `ratio` (s_b) and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together or a clip width is negative.

    Source: arXiv 2507.18071, equations 5 and 7; widths from section 5.1.
    Differs: the mean log-ratio is bounded at 20 nats, so that neither loss nor gradient overflows.
    verl spreads the same value over tokens with stopped gradients (the paper's GSPO-token); the
    gradients are equal.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_clip_range(clip_ratio_low, clip_ratio_high)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    ratio_B = bounded(masked_mean(log_ratio_BT, response_mask)).exp()
    loss_B, is_clipped_B = clipped_surrogate(
        ratio_B, advantages.detach(), clip_ratio_low, clip_ratio_high
    )
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    metrics |= {"ratio": ratio_B.detach(), "clip_ratio": is_clipped_B.to(log_probs)}
    return aggregate_sequences(loss_B, response_mask, aggregation), metrics


GSPO = Algorithm(
    "gspo",
    gspo,
    level="sequence",
    idle_at_zero=True,
    about="The sequence's mean ratio, clipped (arXiv 2507.18071).",
    keys=CLIP_KEYS,
    on_policy="clips nothing",
)

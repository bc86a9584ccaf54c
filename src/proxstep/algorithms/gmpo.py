"""GMPO: the geometric mean of a sequence's token ratios, each of them clipped.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
    check_clip_range,
    check_inputs,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.logprobs.tokens import bounded, masked_mean, ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def gmpo(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    clip_ratio_low: float = 0.4,
    clip_ratio_high: float = 0.4,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return GMPO's objective: the sequence's mean ratio over token ratios that are clipped.

    L = mean_b -A_b R_b, R_b = exp(mean_t c_bt), Delta_bt = log pi(y_bt) - log pi_old(y_bt)
    c_bt = min(Delta_bt, high) where A_b >= 0, max(Delta_bt, -low) where A_b < 0

    A clipped token has no gradient of its own, but its bound stays in R_b, which scales that of the
    others: the gradient differs between the tokens of a sequence wherever the clip acts.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        clip_ratio_low: Largest fall of a token's log-probability that counts, in nats: the ratio's
            lower bound is exp(-low).
        clip_ratio_high: Largest rise that counts, in nats: the upper bound is exp(high).
        aggregation: The mode and the counts of the whole optimizer step. The sequence's value
            stands at each of its tokens, so the default is the paper's mean over sequences;
            token-mean weights a sequence by its length.

    Returns:
        The loss and the per-sequence metrics `clip_ratio` (share of tokens whose gradient the clip
        removed), `ratio` (R_b) and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together or a clip width is negative.

    Source: arXiv 2507.20673; formula as in verl 0.9.1 (`geo_mean`) and TRL 1.16's `GMPOTrainer`,
    which agree; 0.4 (ratios from exp(-0.4) to exp(0.4)) from both. The paper itself was not
    available, so its equation numbers are not checked.
    Differs: the mean log-ratio is bounded at 20 nats, so that neither loss nor gradient overflows.
    verl averages over the rows of a microbatch whatever their number, and its clip_ratio's own
    default of 0.2 acts unless both widths are set.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_clip_range(clip_ratio_low, clip_ratio_high)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    rises_B1 = advantages.detach()[:, None] >= 0
    clipped_BT = torch.where(
        rises_B1, log_ratio_BT.clamp(max=clip_ratio_high), log_ratio_BT.clamp(min=-clip_ratio_low)
    )
    ratio_B = bounded(masked_mean(clipped_BT, response_mask)).exp()
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    is_clipped_BT = clipped_BT.detach() != log_ratio_BT.detach()
    metrics |= {
        "ratio": ratio_B.detach(),
        "clip_ratio": masked_mean(is_clipped_BT.to(log_probs), response_mask),
    }
    return aggregate_sequences(-advantages.detach() * ratio_B, response_mask, aggregation), metrics


GMPO = Algorithm(
    "gmpo",
    gmpo,
    level="token",
    idle_at_zero=True,
    about="Geometric mean of clipped token ratios (arXiv 2507.20673).",
    keys={
        "clip_ratio_low": Key("Log-ratios are clipped at minus this, in nats.", ge=0),
        "clip_ratio_high": Key("Log-ratios are clipped at this, in nats.", ge=0),
    },
    on_policy="clips nothing",
)

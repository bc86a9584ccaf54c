"""CISPO: REINFORCE with a clipped importance weight per token, so that no token loses its gradient.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

from proxstep.algorithms.aggregate import (
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


def cispo(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    clip_ratio_low: float = 1.0,
    clip_ratio_high: float = 4.0,
    aggregation: Aggregation = TOKEN_MEAN,
) -> LossAndMetrics:
    """Return CISPO's objective.

    L = aggregate(-w_bt A_b log pi(y_bt)), w_bt = stop_gradient(clip(rho_bt, 1 - low, 1 + high)).

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        clip_ratio_low: Width of the clip below 1; from 1.0 on there is no lower bound.
        clip_ratio_high: Width of the clip above 1, as in verl: the cap is 1 + clip_ratio_high.
            TRL's epsilon_high is the cap itself.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `clip_ratio` (share of tokens whose weight was
        clipped), `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together or a clip width is negative.

    Source: arXiv 2506.13585 (MiniMax-M1), equations 4 and 5.
    Differs: that paper gives no value for the cap; the default of 5 is that of ScaleRL (arXiv
    2510.13786), as TRL recommends. The log-ratio is bounded at 20 nats before the exponential.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_clip_range(clip_ratio_low, clip_ratio_high)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    ratio_BT = bounded(log_ratio_BT.detach()).exp()
    weight_BT = ratio_BT.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    loss_BT = -weight_BT * advantages.detach()[:, None] * log_probs
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    metrics["clip_ratio"] = masked_mean((weight_BT != ratio_BT).to(log_probs), response_mask)
    return aggregate(loss_BT, response_mask, aggregation), metrics


CISPO = Algorithm(
    "cispo",
    cispo,
    level="token",
    idle_at_zero=True,
    about="Detached, clipped importance weights (arXiv 2506.13585).",
    keys={
        "clip_ratio_low": Key("Weights are clipped at 1 - this.", ge=0),
        "clip_ratio_high": Key("Weights are clipped at 1 + this.", ge=0),
    },
    on_policy="clips nothing",
)

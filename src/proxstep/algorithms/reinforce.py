"""REINFORCE: the policy gradient without ratio and without clipping.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import dataclasses

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_SUM,
    Aggregation,
    LossAndMetrics,
    aggregate,
    check_inputs,
)
from proxstep.algorithms.base import Algorithm
from proxstep.logprobs.tokens import ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def reinforce(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_SUM,
) -> LossAndMetrics:
    """Return the score-function surrogate, whose gradient on-policy is the policy gradient.

    L = aggregate(-A_b log pi(y_bt)); with the default, mean_b -A_b log pi(y_b).

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: The sampling policy's, in nats; only the metrics use them.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together.

    Source: Williams (1992), "Simple statistical gradient-following algorithms".
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    loss_BT = -advantages.detach()[:, None] * log_probs
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    return aggregate(loss_BT, response_mask, aggregation), ratio_metrics(
        log_ratio_BT, response_mask
    )


REINFORCE = Algorithm(
    "reinforce",
    reinforce,
    level="sequence",
    idle_at_zero=True,
    about="Policy gradient without ratio and clipping.",
)
RLOO = dataclasses.replace(
    REINFORCE,
    name="rloo",
    about="REINFORCE against the mean of the prompt's other completions (arXiv 2402.14740).",
    advantage="leave-one-out",
)

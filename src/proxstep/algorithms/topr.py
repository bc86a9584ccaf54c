"""TOPR, tapered off-policy REINFORCE: a ratio of at most 1, for bad completions alone.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_SUM,
    Aggregation,
    LossAndMetrics,
    aggregate,
    check_inputs,
)
from proxstep.algorithms.base import Algorithm
from proxstep.logprobs.tokens import masked_sum, ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def topr(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_SUM,
) -> LossAndMetrics:
    """Return the TOPR loss: good completions weigh 1, bad ones their ratio, if it is below 1.

    L = aggregate(-w_b A_b log pi(y_bt)), w_b = stop_gradient(min(rho_b, 1)) where A_b < 0, else 1
    rho_b = exp(sum_t (log pi(y_bt) - log pi_old(y_bt)))

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence, in reward units.
        response_mask: True at the response's tokens.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together.

    Source: arXiv 2503.14286, the update with weight 1 where the reward is at least 0, and with the
    ratio cut to [0, 1] where it is below; the equation's number is not checked.
    Differs: the weight depends on the advantage's sign, not the reward's. They agree where rewards
    are 1 and -1 with a baseline in between, as in the paper; the default baseline here is the
    prompt's mean.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    delta_B = masked_sum(log_ratio_BT, response_mask).detach()
    weight_B = torch.where(advantages < 0, delta_B.clamp(max=0).exp(), 1)
    loss_BT = -(weight_B * advantages.detach())[:, None] * log_probs
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    return aggregate(loss_BT, response_mask, aggregation), metrics


TOPR = Algorithm(
    "topr",
    topr,
    level="sequence",
    idle_at_zero=True,
    about="REINFORCE; a bad completion weighs its ratio, at most 1 (arXiv 2503.14286).",
    advantage="group-centered",
    on_policy="is REINFORCE",
)

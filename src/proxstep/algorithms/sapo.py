"""SAPO: a smooth gate on each token's ratio in the place of PPO's clip.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate,
    check_inputs,
    check_positive,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.logprobs.tokens import bounded, masked_mean, ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def sapo(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return SAPO's soft-gated token-level objective.

    L = aggregate(-f(rho_bt) A_b), f(x) = (4 / tau) sigmoid(tau (x - 1))
    tau = tau_pos where A_b > 0, else tau_neg

    With p = sigmoid(tau (rho - 1)) a token's gradient is that of REINFORCE times 4 p (1 - p) rho:
    exactly 1 at rho = 1 for every tau, and falling to 0 on both sides of about 1 / tau.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        tau_pos: How sharply the gate closes where the advantage is above 0; above 0.
        tau_neg: The same where it is not; larger than tau_pos closes sooner on tokens that are
            pushed down, whose gradient goes to many unlikely tokens.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `gate` (mean of 4 p (1 - p), 1 where it is open),
        `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together, or a tau is not above 0.

    Source: arXiv 2511.20347; formula and values as in verl 0.9.1 (`sapo`) and TRL 1.16
    (`loss_type="sapo"`), which agree. The paper itself was not available, so its equation numbers
    are not checked.
    Differs: the log-ratio is bounded at 20 nats, as in verl; verl ignores its own loss_agg_mode
    here and always takes seq-mean-token-mean.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_positive("tau_pos", tau_pos)
    check_positive("tau_neg", tau_neg)
    advantage_B1 = advantages.detach()[:, None]
    tau_B1 = torch.full_like(advantage_B1, tau_neg).masked_fill(advantage_B1 > 0, tau_pos)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    gate_BT = (tau_B1 * (bounded(log_ratio_BT).exp() - 1)).sigmoid()
    loss_BT = -4 / tau_B1 * gate_BT * advantage_B1
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    openness_BT = 4 * gate_BT.detach() * (1 - gate_BT.detach())
    metrics["gate"] = masked_mean(openness_BT, response_mask)
    return aggregate(loss_BT, response_mask, aggregation), metrics


SAPO = Algorithm(
    "sapo",
    sapo,
    level="token",
    idle_at_zero=True,
    about="Token ratios through a smooth gate (arXiv 2511.20347).",
    keys={
        "tau_pos": Key("How sharply the gate closes for advantages above 0.", gt=0),
        "tau_neg": Key("How sharply the gate closes for advantages of 0 and below.", gt=0),
    },
    on_policy="has its gate wide open: objective.tau_pos and objective.tau_neg change nothing",
)

"""DRO: REINFORCE with a quadratic penalty on each token's log-ratio.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

from proxstep.algorithms.aggregate import (
    TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate,
    check_inputs,
    check_positive,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.logprobs.tokens import ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor


def dro(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    beta: float = 1.0,
    aggregation: Aggregation = TOKEN_MEAN,
) -> LossAndMetrics:
    """Return the per-token quadratic objective that verl ships as `dro`.

    L = aggregate(-A_b log pi(y_bt) + (beta / 2) (log pi(y_bt) - log pi_old(y_bt))^2)

    Against OPO (arXiv 2601.12415, equation 19) with omega = A, this penalizes the sum over the
    tokens of the squared log-ratios where OPO penalizes the square of their sum: the cross terms
    are missing, so a sequence may drift far as long as each token drifts little, and there is no
    one coefficient per sequence.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of the policy at the start of the update, in nats; without gradient.
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        beta: Curvature of the penalty, per square nat; the counterpart of OPO's mu.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together or beta is not above 0.

    Source: verl 0.9.1's policy loss `dro`; arXiv 2405.19107 (Direct Reward Optimization).
    Differs: the paper regresses the reward on V(x) + tau log(pi / pi_ref) of the whole sequence,
    with V a learned value and pi_ref a fixed reference. Divided by tau, that square is this loss
    with A = reward - V and beta = tau; here the old policy stands for pi_ref and the square is
    taken per token. verl has no default for beta; 1.0 is that of OPO's mu.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_positive("beta", beta)
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    loss_BT = -advantages.detach()[:, None] * log_probs + 0.5 * beta * log_ratio_BT.square()
    return aggregate(loss_BT, response_mask, aggregation), ratio_metrics(
        log_ratio_BT, response_mask
    )


DRO = Algorithm(
    "dro",
    dro,
    level="token",
    about="Quadratic penalty on each token's log-ratio, as verl ships it.",
    keys={"beta": Key("Weight of the penalty on squared log-ratios.", gt=0)},
    on_policy="has no penalty to pay: objective.beta changes nothing",
)

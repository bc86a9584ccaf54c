"""The policy's ratio to the old policy, as every objective takes it.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

from proxstep.logprobs.masked import masked_mean
from proxstep.typing import Bool, Float, Tensor

# exp(20) = 4.9e8 is far outside every clip range, and its square is finite in float32. verl's, too.
LOG_RATIO_BOUND = 20.0


def token_log_ratio(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """Return log pi - log pi_old at the response's tokens and 0 elsewhere.

    The old log-probabilities carry no gradient, and what stands at masked positions (NaN,
    infinities) goes no further.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: The old policy's, in nats.
        response_mask: True at the response's tokens.

    Returns:
        The log-ratio of each token, in nats.
    """
    return (log_probs - old_log_probs.detach()).masked_fill(~response_mask, 0.0)


def bounded(log_ratio: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Return the log-ratio limited to `LOG_RATIO_BOUND` either way; its exponential stays finite.

    Beyond the bound the gradient is 0: without it, an infinite ratio turns the zero gradient of a
    clipped token into NaN.
    """
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio_metrics(
    log_ratio_BT: Float[Tensor, "batch tokens"], response_mask: Bool[Tensor, "batch tokens"]
) -> dict[str, Float[Tensor, " batch"]]:
    """Return the metrics that every token-ratio objective reports, one entry per sequence.

    `ratio` is the mean ratio of the tokens; `kl_old_policy` the mean of log pi_old - log pi, an
    unbiased estimate of KL(old || policy) in nats per token when the old policy sampled the tokens.
    """
    log_ratio_BT = log_ratio_BT.detach()
    return {
        "ratio": masked_mean(bounded(log_ratio_BT).exp(), response_mask),
        "kl_old_policy": -masked_mean(log_ratio_BT, response_mask),
    }

"""Truncated importance weights: samples of one policy stand for another's.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import math

from proxstep.algorithms.aggregate import check_positive
from proxstep.logprobs.tokens import bounded, kl_estimate, masked_sum, token_log_ratio, widest_dtype
from proxstep.typing import Bool, Float, Tensor


def importance_weights(
    anchor_log_probs: Float[Tensor, "batch tokens"],
    sampler_log_probs: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    cap: float,
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return how much more likely each sequence was under the anchor than under its sampler.

    w_b = min(exp(sum_t (log pi_k(y_bt) - log pi_sampler(y_bt))), cap)

    Weighting every sequence's loss with w turns a mean over the sampler's sequences into the mean
    over the anchor's: without bias where the cap does not act, and only over sequences that the
    sampler can produce. A nucleus below 1 never produces the others, whatever their weight.

    Args:
        anchor_log_probs: The anchor's log-probabilities of the sampled tokens, in nats.
        sampler_log_probs: Those of the distribution that the tokens were drawn from, after
            temperature, top-k and top-p, in nats.
        response_mask: True at the response's tokens.
        cap: Largest weight, above 0; it bounds the variance.

    Returns:
        The weights, above 0 and without gradient, 1 for a sequence without a token (at most the
        cap); and the metrics `importance_mean`, `importance_max`, `importance_truncated` (share of
        sequences at the cap) and `importance_sample_size` ((sum w)^2 / sum w^2, in sequences).

    Raises:
        ProxstepError: The cap is not above 0.

    Source: arXiv 2601.12415, section 10, "off-policy settings"; truncation: Ionides (2008),
    "Truncated importance sampling".
    Differs: the log-ratio is bounded at 20 nats either way, so that no weight is 0 or infinite.
    """
    check_positive("cap", cap)
    log_ratio_BT = token_log_ratio(anchor_log_probs.detach(), sampler_log_probs, response_mask)
    ratio_B = bounded(masked_sum(log_ratio_BT, response_mask)).exp()
    weight_B = ratio_B.clamp(max=cap)
    return weight_B, {
        "importance_mean": weight_B.mean().item(),
        "importance_max": weight_B.max().item(),
        "importance_truncated": (ratio_B > cap).cpu().double().mean().item(),
        "importance_sample_size": (weight_B.sum().square() / weight_B.square().sum()).item(),
    }


def sampler_mismatch(
    log_probs: Float[Tensor, "batch tokens"],
    sampler_log_probs: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
) -> dict[str, float]:
    """Return how far a policy is from the sampler, over the tokens that the sampler drew.

    Args:
        log_probs: The policy's log-probabilities, in nats.
        sampler_log_probs: Those with which the tokens were drawn, in nats.
        response_mask: True at the response's tokens.

    Returns:
        In nats: `log_ratio_max`, the largest |log pi - log pi_sampler| of any token; and
        `log_ratio_p999`, the smallest that 99.9 % of the tokens do not exceed; `kl`, the mean of
        the k3 estimate of KL(sampler || policy) a token. Nothing where there is no token.
    """
    digits = widest_dtype(log_probs.device)
    drawn, own = (of[response_mask].to(digits) for of in (sampler_log_probs, log_probs))
    if not len(drawn):
        return {}
    ratio = (own - drawn).abs()
    return {
        "log_ratio_max": ratio.max().item(),
        "log_ratio_p999": ratio.kthvalue(math.ceil(0.999 * len(ratio))).values.item(),
        "kl": kl_estimate(drawn[None], own[None], "k3").mean().item(),
    }

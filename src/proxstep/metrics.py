"""What is measured of a policy from its logits: log-probabilities, entropy, divergences.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

import torch

from proxstep.types import Float, Int, Tensor


def token_log_probs(
    logits_BTV: Float[Tensor, "batch tokens vocab"], token_BT: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Return log pi(token) at each position, in nats.

    Args:
        logits_BTV: Logits that predict `token_BT`, already divided by the sampling temperature and
            already shifted.
        token_BT: The tokens.

    Returns:
        Log-probabilities in float32 or better.
    """
    wide_BTV = _wide(logits_BTV)
    chosen_BT = wide_BTV.gather(-1, token_BT[..., None]).squeeze(-1)
    return chosen_BT - wide_BTV.logsumexp(-1)


def entropy(logits_BTV: Float[Tensor, "batch tokens vocab"]) -> Float[Tensor, "batch tokens"]:
    """Return the entropy of the distribution over the vocabulary at each position, in nats."""
    log_prob_BTV = _wide(logits_BTV).log_softmax(-1)
    return -(log_prob_BTV.exp() * log_prob_BTV).sum(-1)


def kl_divergence(
    logits_BTV: Float[Tensor, "batch tokens vocab"],
    other_logits_BTV: Float[Tensor, "batch tokens vocab"],
) -> Float[Tensor, "batch tokens"]:
    """Return KL(p || q) over the vocabulary at each position, in nats; p comes first."""
    log_p_BTV = _wide(logits_BTV).log_softmax(-1)
    log_q_BTV = _wide(other_logits_BTV).log_softmax(-1)
    return (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1)


def kl_from_samples(
    log_prob_BT: Float[Tensor, "batch tokens"], other_log_prob_BT: Float[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Return an unbiased, non-negative estimate of KL(p || q) from tokens that p sampled.

    With r = q / p it is r - 1 - log r at each token, whose expectation under p is KL(p || q).

    Args:
        log_prob_BT: log p of the sampled tokens, in nats.
        other_log_prob_BT: log q of the same tokens.

    Returns:
        One estimate per token, in nats.

    Source: J. Schulman, "Approximating KL divergence" (2020), the estimator k3.
    """
    log_ratio_BT = other_log_prob_BT - log_prob_BT
    return log_ratio_BT.expm1() - log_ratio_BT


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

"""What is added to an objective: an entropy bonus and a penalty for leaving the initial policy.

Both are exact over the vocabulary at each sampled token, and ordinary losses: ISOPO must be off in
their forward and backward.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

from proxstep.masked import masked_sum
from proxstep.metrics import entropy, kl_divergence
from proxstep.types import Bool, Float, Tensor


def regularizer_loss(
    logits_BTV: Float[Tensor, "batch tokens vocab"],
    initial_logits_BTV: Float[Tensor, "batch tokens vocab"] | None,
    response_BT: Bool[Tensor, "batch tokens"],
    *,
    entropy_coef: float,
    kl_coef: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return one microbatch's share of the regularizer's loss, and of its terms.

    With H the entropy of the policy p at a token and q the initial policy:

        L = sum over tokens of (-entropy_coef H + kl_coef KL(p || q)) / num_tokens

    Args:
        logits_BTV: The policy's logits, over the sampling temperature, with their graph.
        initial_logits_BTV: The initial policy's at the same positions; None where kl_coef is 0.
        response_BT: True at completion tokens, aligned with the logits.
        entropy_coef: Reward for a nat of entropy per token.
        kl_coef: Price of a nat of KL divergence per token.
        num_tokens: Completion tokens of the whole optimizer step.

    Returns:
        The loss, and the microbatch's shares of the step's mean entropy and KL divergence in nats
        per token and of the loss; the shares of a step's microbatches sum to the step's values.

    Raises:
        ValueError: If kl_coef is positive and the initial policy's logits are missing.

    Source: the entropy bonus of Williams and Peng (1991); the KL penalty of arXiv 2402.03300, eq.
        3, TRL's `beta` and verl's `kl_loss_coef`.

    Differs: they estimate the divergence from the sampled tokens alone (k3), whose gradient is in
        expectation that of KL(q || p); here it is KL(p || q)'s, without the estimate's variance.
    """
    loss = logits_BTV.new_zeros(())
    terms: dict[str, float] = {}
    if entropy_coef > 0:
        mean_entropy = masked_sum(entropy(logits_BTV), response_BT).sum() / num_tokens
        loss = loss - entropy_coef * mean_entropy
        terms["entropy"] = mean_entropy.item()
    if kl_coef > 0:
        if initial_logits_BTV is None:
            raise ValueError("kl_coef > 0 needs initial_logits_BTV")
        kl_BT = kl_divergence(logits_BTV, initial_logits_BTV)
        mean_kl = masked_sum(kl_BT, response_BT).sum() / num_tokens
        loss = loss + kl_coef * mean_kl
        terms["kl"] = mean_kl.item()
    return loss, {**terms, "loss": loss.item()}

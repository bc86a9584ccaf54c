"""DPPO: a trust region on how much probability a token moved, not on its ratio.

Shapes: B sequences, T token positions. In the paper's symbols: mu, the sampler, is `old_log_probs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_SUM_NORM,
    Aggregation,
    LossAndMetrics,
    aggregate,
    check_inputs,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import bounded, masked_mean, ratio_metrics, token_log_ratio
from proxstep.typing import Bool, Float, Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log_probs, sampler_log_probs) -> one number per token."""


def binary_tv(
    log_probs: Float[Tensor, "batch tokens"], sampler_log_probs: Float[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Return the total variation between (p, 1 - p) and (m, 1 - m), which is |m - p|.

    Args:
        log_probs: log p of each sampled token, in nats, at most 0.
        sampler_log_probs: log m of each sampled token, in nats, at most 0.

    Source: arXiv 2602.04879, equation 13.
    """
    return (log_probs.exp() - sampler_log_probs.exp()).abs()


def binary_kl(
    log_probs: Float[Tensor, "batch tokens"], sampler_log_probs: Float[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Return KL((m, 1 - m) || (p, 1 - p)) in nats: m log(m / p) + (1 - m) log((1 - m) / (1 - p)).

    Args:
        log_probs: log p of each sampled token, in nats, at most 0.
        sampler_log_probs: log m of each sampled token, in nats, at most 0.

    Source: arXiv 2602.04879, equation 14.
    Differs: where 1 - p or 1 - m is 0 its logarithm is that of the smallest number, so that the
    divergence stays finite; verl adds 1e-8 to both everywhere.
    """
    smallest = torch.finfo(log_probs.dtype).tiny
    rest, sampler_rest = -log_probs.expm1(), -sampler_log_probs.expm1()
    rest_log_ratio = sampler_rest.clamp(min=smallest).log() - rest.clamp(min=smallest).log()
    of_token = sampler_log_probs.exp() * (sampler_log_probs - log_probs)
    return of_token + sampler_rest * rest_log_ratio


def dppo(
    divergence: Divergence,
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    divergence_threshold: float,
    clip_ratio_c: float = 20.0,
    # The paper sums over tokens; its authors' script divides that by a constant.
    aggregation: Aggregation = SEQ_MEAN_TOKEN_SUM_NORM,
) -> LossAndMetrics:
    """Return DPPO's objective; the algorithms `dppo-tv` and `dppo-kl` are its partials.

    L = aggregate(-M_bt w_bt A_b log pi(y_bt)), w_bt = stop_gradient(min(rho_bt, C))
    rho_bt = pi(y_bt) / mu(y_bt), D_bt the divergence between mu and pi at the token
    M_bt = 0 where D_bt > threshold and the gradient would move pi further from mu (A > 0 and
    rho > 1, or A < 0 and rho < 1); else 1

    A token that the mask takes out still counts in the aggregation.

    Args:
        divergence: `binary_tv` or `binary_kl`.
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those with which the sampler drew them, in nats; without gradient. A trust
            region around another policy, such as the trainer's own at the start of the update,
            collapses where the two differ (section 5.2).
        advantages: One advantage per sequence.
        response_mask: True at the response's tokens.
        divergence_threshold: delta, the largest divergence that a step away from mu may have; above
            0, infinite for no trust region.
        clip_ratio_c: C, the largest weight of a token; above 0, infinite for none.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The loss and the per-sequence metrics `clip_ratio` (share of tokens without gradient),
        `divergence` (mean over tokens), `ratio` and `kl_old_policy` (nats per token).

    Raises:
        ProxstepError: The tensors do not fit together, or threshold or C is not above 0.

    Source: arXiv 2602.04879, equation 12 (objective and mask) and the appendix's unified gradient
    (the weight); thresholds from its stability test, C from verl 0.9.1. Equation numbers counted
    in the source of version 3.
    Differs: the paper runs C = 5 in its scaling experiments and without it in its stability test,
    and warns of the truncation (section 5.4); 20, the default in verl's code (its configuration
    sets 3), rarely acts. The log-ratio is bounded at 20 nats. The top-k divergences (equations 15
    and 16) need more from the sampler than the token's own probability and are not implemented; the
    paper finds no gain in them.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    for name, value in (
        ("divergence_threshold", divergence_threshold),
        ("clip_ratio_c", clip_ratio_c),
    ):
        if not value > 0:
            raise ProxstepError(f"{name} is {value}; it must be above 0 (infinite for no limit).")
    advantage_B1 = advantages.detach()[:, None]
    log_ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    # Rounding can leave a log-probability above 0.
    divergence_BT = divergence(log_probs.detach().clamp(max=0), old_log_probs.detach().clamp(max=0))
    moves_away_BT = advantage_B1 * log_ratio_BT.detach() > 0
    is_masked_BT = moves_away_BT & (divergence_BT > divergence_threshold)
    weight_BT = bounded(log_ratio_BT.detach()).exp().clamp(max=clip_ratio_c)
    loss_BT = -weight_BT.masked_fill(is_masked_BT, 0.0) * advantage_B1 * log_probs
    metrics = ratio_metrics(log_ratio_BT, response_mask)
    metrics["clip_ratio"] = masked_mean(is_masked_BT.to(log_probs), response_mask)
    metrics["divergence"] = masked_mean(divergence_BT, response_mask)
    return aggregate(loss_BT, response_mask, aggregation), metrics


_KEYS = {
    "divergence_threshold": Key(
        "delta: a token whose divergence from the sampler is above it loses the gradient that "
        "would move it further.",
        gt=0,
    ),
    "clip_ratio_c": Key("C: the tokens' importance weights are truncated at this.", gt=0),
}

DPPO_TV = Algorithm(
    "dppo-tv",
    partial(dppo, binary_tv, divergence_threshold=0.15),
    level="token",
    idle_at_zero=True,
    about="Tokens masked by their total variation from the sampler (arXiv 2602.04879).",
    keys=_KEYS,
    advantage="group-centered",
    on_policy="masks nothing",
    ratio_to_sampler=True,
)
DPPO_KL = dataclasses.replace(
    DPPO_TV,
    name="dppo-kl",
    loss=partial(dppo, binary_kl, divergence_threshold=0.05),
    about="Tokens masked by their KL divergence from the sampler (arXiv 2602.04879).",
)

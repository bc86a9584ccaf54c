"""OPO's adaptive temperature: each sequence's own, from how sure the anchor was and its reward.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from proxstep.algorithms.aggregate import check_positive
from proxstep.algorithms.base import Key
from proxstep.algorithms.preparation import SignalInputs
from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import masked_mean
from proxstep.typing import Bool, Float, Tensor


def entropy_proxy(
    anchor_log_probs: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    log_vocabulary: float,
) -> Float[Tensor, " batch"]:
    """Return how unsure the anchor was of each sequence, from the sampled tokens alone.

    H_b = clamp(-mean_t log pi_k(y_bt) / log V, 0, 1)

    The surprise of a token that the anchor sampled is an unbiased estimate of its entropy at that
    position, so no pass over the vocabulary is needed; the clamp bounds the surprise of tokens that
    are less likely than 1 / V.

    Args:
        anchor_log_probs: The anchor's log-probabilities of the tokens that it sampled, in nats.
        response_mask: True at the response's tokens.
        log_vocabulary: log V in nats, the entropy of the uniform distribution.

    Returns:
        One number in [0, 1] per sequence, without gradient; 0 for a sequence without a token.

    Raises:
        ProxstepError: log_vocabulary is not above 0.

    Source: the normalized entropy of the author's configuration of arXiv 2601.12415.
    """
    check_positive("log_vocabulary", log_vocabulary)
    surprise_B = -masked_mean(anchor_log_probs.detach(), response_mask)
    return (surprise_B / log_vocabulary).clamp(0.0, 1.0)


def adaptive_tau(
    tau: float,
    anchor_entropy_B: Float[Tensor, " batch"],
    confidence_B: Float[Tensor, " batch"],
    reward_signal_B: Float[Tensor, " batch"],
    *,
    entropy_coef: float = 0.2,
    confidence_coef: float = 0.5,
    low: float = 0.2,
    high: float = 1.5,
) -> Float[Tensor, " batch"]:
    """Return a temperature per sequence: higher where the anchor was unsure or confident and wrong.

    tau_b = clamp(tau (1 + a H_b - b confidence_b reward_signal_b), low, high)

    Args:
        tau: The base temperature.
        anchor_entropy_B: Normalized entropy H of the anchor, in [0, 1] (`entropy_proxy`).
        confidence_B: 1 minus the normalized entropy of the current policy, in [0, 1]. For a
            temperature that is fixed for the iteration the current policy is the anchor: 1 - H.
        reward_signal_B: How good the sequence was, in [-1, 1].
        entropy_coef: a, the weight of the anchor's entropy.
        confidence_coef: b, the weight of the confidence.
        low: Smallest temperature, above 0.
        high: Largest temperature.

    Returns:
        The temperature of each sequence, for `escort_weights`.

    Raises:
        ProxstepError: tau or low is not above 0, or high is below low.

    Source: arXiv 2601.12415, section 9.1, which names the range only; rule and coefficients are the
    author's configuration.
    Differs: there the temperature divides the log-ratio; here it divides the advantage (see
    `escort_weights`).
    """
    check_positive("tau", tau)
    check_positive("low", low)
    if high < low:
        raise ProxstepError(f"high is {high}, below low, {low}: give low <= high.")
    factor_B = (
        1 + entropy_coef * anchor_entropy_B - confidence_coef * confidence_B * reward_signal_B
    )
    return (tau * factor_B).clamp(low, high)


def adaptive_temperature(
    inputs: SignalInputs, tau: float, **keywords: float
) -> Float[Tensor, " batch"]:
    """Return `adaptive_tau` of a rollout; before its first update the policy is the old one.

    Args:
        inputs: The rollout, with its old policy.
        tau: The base temperature.
        **keywords: Those of `adaptive_tau`.
    """
    old = inputs.old_policy
    assert old is not None  # the algorithm's reads_old_policy
    entropy_B = entropy_proxy(
        old.log_prob_BT, old.response_BT, log_vocabulary=math.log(old.vocabulary_size)
    ).cpu()
    reward_signal_B = inputs.advantage_B.clamp(-1.0, 1.0)
    return adaptive_tau(tau, entropy_B, 1 - entropy_B, reward_signal_B, **keywords)


TEMPERATURE_KEYS = {
    "adaptive_tau": Key(
        "Gives each sequence its own temperature, from how likely the old policy found its tokens "
        "and from its advantage; tau is the base."
    ),
    "tau_min": Key("Smallest temperature of adaptive_tau.", ge=1e-6),
    "tau_max": Key("Largest temperature of adaptive_tau.", gt=0),
    "tau_entropy_coef": Key(
        "How far the old policy's entropy raises the temperature of adaptive_tau.", ge=0
    ),
    "tau_confidence_coef": Key(
        "How far being confident and wrong raises the temperature of adaptive_tau, and being "
        "confident and right lowers it.",
        ge=0,
    ),
}

_OF_KEY = {
    "tau_min": "low",
    "tau_max": "high",
    "tau_entropy_coef": "entropy_coef",
    "tau_confidence_coef": "confidence_coef",
}


def check_temperature(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a base outside its range, or a range that nothing reads."""
    low, tau, high = options["tau_min"], options["tau"], options["tau_max"]
    if options["adaptive_tau"] and not low <= tau <= high:
        raise ValueError(
            f"objective.tau {tau} is not between objective.tau_min {low} and objective.tau_max "
            f"{high}"
        )
    parameters = inspect.signature(adaptive_tau).parameters
    for key, name in _OF_KEY.items():
        if not options["adaptive_tau"] and options[key] != parameters[name].default:
            raise ValueError(
                f"objective.{key} is of the adaptive temperature: add objective.adaptive_tau "
                "true, or leave it out"
            )

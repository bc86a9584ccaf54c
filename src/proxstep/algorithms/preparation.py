"""From a rollout's advantages to what the loss takes, once for all updates of the rollout.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from proxstep.algorithms import (
    adaptive_tau,
    auto_mu,
    clip_target,
    drive,
    entropy_proxy,
    escort_weights,
    importance_weights,
    regression_target,
    target_shares,
)
from proxstep.config.objectives import OpoSection
from proxstep.logprobs.masked import masked_sum
from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Anchor:
    """The policy before a rollout's first update, as the rollout's completions see it.

    Attributes:
        log_prob_BT: Its log-probabilities of the tokens from the second on, in nats.
        response_BT: True at completion tokens, aligned with them.
        vocabulary_size: Of the policy.
        sampler_log_prob_BT: The log-probabilities with which the tokens were drawn, or None where
            nobody kept them.
    """

    log_prob_BT: Float[Tensor, "batch tokens"]
    response_BT: Bool[Tensor, "batch tokens"]
    vocabulary_size: int
    sampler_log_prob_BT: Float[Tensor, "batch tokens"] | None = None

    def importance(self, cap: float) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
        """Return the truncated importance weights against the sampler, and what they are like."""
        assert self.sampler_log_prob_BT is not None  # rollout.importance_cap keeps them
        weight_B, metrics = importance_weights(
            self.log_prob_BT, self.sampler_log_prob_BT, self.response_BT, cap=cap
        )
        return weight_B.cpu(), metrics


@dataclass(frozen=True)
class Signal:
    """What an objective makes of a rollout's advantages.

    Attributes:
        value_B: What the loss takes as its advantages.
        importance_B: Weight of each sequence's loss, or None for 1.
        hyper: Hyper-parameters of the loss that follow from the rollout; they take the place of the
            recipe's.
        metrics: What was measured.
    """

    value_B: Float[Tensor, " batch"]
    importance_B: Float[Tensor, " batch"] | None = None
    hyper: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def opo_signal(
    section: OpoSection,
    advantage_B: Float[Tensor, " batch"],
    group_B: Int[Tensor, " batch"],
    anchor: Anchor | None,
    importance_B: Float[Tensor, " batch"] | None,
) -> Signal:
    """Return OPO's drive and the curvature that goes with it.

    Args:
        section: The recipe's choices.
        advantage_B: One advantage per sequence.
        group_B: Each sequence's prompt.
        anchor: Needed by an adaptive tau and by an anchor correction other than absorbed.
        importance_B: Truncated importance weights, where the recipe has them.
    """
    tau = _temperature(section, advantage_B, anchor)
    weight_B, metrics = escort_weights(
        advantage_B,
        group_B,
        alpha=section.alpha,
        tau=tau,
        anchor_sequence_log_probs=_sequence_log_probs(anchor),
        lengths=None if anchor is None else anchor.response_BT.sum(dim=1).cpu(),
        anchor_correction=section.anchor_correction,
        normalize=section.normalize,
        importance=importance_B,
    )
    drive_B = drive(
        weight_B,
        group_B,
        kind=section.drive,
        normalize=section.normalize,
        importance=importance_B,
    )
    mu = auto_mu(drive_B) if section.mu == "auto" else section.mu
    metrics |= target_shares(regression_target(drive_B, mu=mu))
    if section.target_min is not None:
        drive_B = clip_target(drive_B, mu=mu, target_min=section.target_min)
    mean_tau = tau.mean().item() if isinstance(tau, Tensor) else tau
    metrics |= {"alpha": section.alpha, "tau": mean_tau, "mu": mu}
    return Signal(drive_B, importance_B, {"mu": mu}, metrics)


def _temperature(section: OpoSection, advantage_B: Tensor, anchor: Anchor | None) -> float | Tensor:
    if not section.adaptive_tau:
        return section.tau
    assert anchor is not None  # Algorithm.needs_anchor
    entropy_B = entropy_proxy(
        anchor.log_prob_BT,
        anchor.response_BT,
        log_vocabulary=math.log(anchor.vocabulary_size),
    ).cpu()
    return adaptive_tau(
        section.tau,
        entropy_B,
        1 - entropy_B,  # before the rollout's first update the current policy is the anchor
        advantage_B.clamp(-1.0, 1.0),
        entropy_coef=section.tau_entropy_coef,
        confidence_coef=section.tau_confidence_coef,
        low=section.tau_min,
        high=section.tau_max,
    )


def _sequence_log_probs(anchor: Anchor | None) -> Tensor | None:
    return None if anchor is None else masked_sum(anchor.log_prob_BT, anchor.response_BT).cpu()


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens among which a model of transformers chooses."""
    return model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]

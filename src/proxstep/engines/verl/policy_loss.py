"""OPO as a policy loss of verl, with a configuration class of its own.

Legend for shape suffixes: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.torch_functional import masked_mean
from verl.workers.config import PolicyLossConfig

from proxstep.algorithms import opo_by_sequence, regression_target, target_shares
from proxstep.config.objectives import OpoSection
from proxstep.engines.fields import OpoKeys, field_of
from proxstep.errors import ProxstepError
from proxstep.typing import Tensor

NAME = "chi2_opo"
"""Our loss and our advantage estimator; verl's own estimator `opo` is another paper's."""

PLACE = "actor_rollout_ref.actor.policy_loss."


@dataclass
class OpoPolicyLossConfig(OpoKeys, PolicyLossConfig):
    """PolicyLossConfig with OPO's keys, those of a recipe (docs/algorithms.md).

    The driver computes the drive of them and the workers the penalty: each key stands here alone.
    """

    loss_mode: str = NAME
    advantage: str = field_of(OpoSection, "advantage")

    def __post_init__(self) -> None:
        if self.loss_mode != NAME:
            raise ProxstepError(
                f"{PLACE}loss_mode is {self.loss_mode!r}, but OpoPolicyLossConfig's is {NAME!r}: "
                f"set {PLACE}loss_mode={NAME}"
            )
        section = self.section()
        if section.mu == "auto":
            raise ProxstepError(
                f"{PLACE}mu is auto, the largest drive of the rollout, of which verl's losses see "
                "a micro-batch: give a number"
            )
        if section.anchor_correction != "absorbed" or section.adaptive_tau:
            name = "adaptive_tau" if section.adaptive_tau else "anchor_correction"
            raise ProxstepError(
                f"{PLACE}{name} needs the anchor's log-probabilities, which verl does not hand to "
                "an advantage estimator: leave it out"
            )

    def section(self) -> OpoSection:
        """Return the keys as a recipe has them.

        Raises:
            ProxstepError: If one of them does not fit, by name.
        """
        return self.opo_section(PLACE)


def check_config(policy_loss: Any) -> OpoPolicyLossConfig:
    """Return a policy loss's configuration as OPO's.

    Raises:
        ProxstepError: If it is another class.
    """
    if not isinstance(policy_loss, OpoPolicyLossConfig):
        target = "proxstep.engines.verl.OpoPolicyLossConfig"
        raise ProxstepError(
            f"{PLACE}_target_ is not {target}, which has {NAME}'s keys: set {PLACE}_target_="
            f"{target}"
        )
    return policy_loss


def opo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return OPO's objective, aggregated by verl.

    L = aggregate(w_b (-drive_b u_b + (mu / 2) u_b^2)), the sequence's value at each of its tokens,
    so that seq-mean-token-mean is the paper's mean over sequences and token-mean weights a sequence
    by its length.

    Args:
        old_log_prob: The anchor's log-probabilities in nats, (batch, tokens).
        log_prob: The policy's.
        advantages: The drive, from the estimator, at each token.
        response_mask: 1 at the response's tokens.
        loss_agg_mode: One of verl's modes.
        config: verl's ActorConfig, with the counts of the whole step in `global_batch_info`.
        rollout_is_weights: verl's importance weights against the sampler, one per sequence but at
            each token; None for 1.

    Returns:
        The loss, and metrics averaged over the sequences that have a response token.

    Raises:
        ProxstepError: If the configuration is not OPO's, or advantages or weights differ within a
            sequence.

    Source: arXiv 2601.12415, equations 10 and 19; see `proxstep.algorithms.opo`.
    """
    section = check_config(config.policy_loss).section()
    response_BT = response_mask.bool()
    drive_B = _at_every_token(
        advantages,
        response_BT,
        f"advantages differ within a response: set algorithm.adv_estimator={NAME}",
    )
    loss_B, metrics = opo_by_sequence(
        log_prob,
        old_log_prob,
        drive_B,
        response_BT,
        mu=float(section.mu),
        surrogate=section.surrogate,
        form=section.form,
        length_normalize=section.length_normalize,
    )
    if rollout_is_weights is not None:
        weight_B = _at_every_token(
            rollout_is_weights,
            response_BT,
            "algorithm.rollout_correction.rollout_is is by token, and OPO has one value for a "
            "sequence: set algorithm.rollout_correction.rollout_is=sequence",
        )
        loss_B = weight_B * loss_B
    loss_BT = loss_B[:, None].expand(response_BT.shape)
    loss = agg_loss(
        loss_mat=loss_BT,
        loss_mask=response_BT,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    divergence = masked_mean((old_log_prob - log_prob).detach(), response_BT)
    measured = _means(metrics, drive_B, response_BT, float(section.mu))
    return loss, {"actor/ppo_kl": divergence.item(), **measured}


def _means(
    metrics: Mapping[str, Tensor], drive_B: Tensor, response_BT: Tensor, mu: float
) -> dict[str, float]:
    """Return the metrics' means over the sequences that have a response token."""
    counted_B = response_BT.any(dim=1)
    if not counted_B.any():  # every micro-batch of every rank must have the same metrics
        counted_B[:1] = True
    measured = {
        name: value_B[counted_B].double().mean().item() for name, value_B in metrics.items()
    }
    measured |= target_shares(regression_target(drive_B[counted_B], mu=mu))
    return {f"actor/objective_{name}": value for name, value in measured.items()}


def _at_every_token(value_BT: Tensor, response_BT: Tensor, otherwise: str) -> Tensor:
    """Return what stands at all response tokens of a sequence, 0 where it has none.

    Raises:
        ProxstepError: If it differs between them.
    """
    first_B1 = response_BT.to(torch.uint8).argmax(dim=1, keepdim=True)
    value_B = value_BT.masked_fill(~response_BT, 0.0).gather(1, first_B1).squeeze(1)
    if ((value_BT != value_B[:, None]) & response_BT).any():
        raise ProxstepError(otherwise)
    return value_B

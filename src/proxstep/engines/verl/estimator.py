"""An algorithm's preparation as an advantage estimator of verl.

It runs on the driver, where a prompt's responses meet.

Legend for shape suffixes: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from proxstep.algorithms import ADVANTAGES, Algorithm, SignalInputs
from proxstep.algorithms.advantages import Groups
from proxstep.engines.verl.policy_loss import PLACE, AlgorithmLossConfig, check_config
from proxstep.engines.verl.seams import BYPASS, find_loss, loss_mode
from proxstep.errors import ProxstepError
from proxstep.typing import Tensor

_SIBLING = "..actor_rollout_ref.actor.policy_loss"
"""Where the loss's keys are from `algorithm`, which is all that verl hands over."""


@cache
def estimator(algorithm: Algorithm) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the estimator of what an algorithm's loss takes for its advantages."""

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: Sequence[Any] | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the algorithm's signal at each response token: as advantages, and as returns.

        A rollout's rewards become advantages and the signal as in the local engine. A prompt none
        of whose responses has a token (verl's padding) and a response that is alone with its prompt
        have signal 0 and are left out of every statistic.

        Args:
            token_level_rewards: In reward units, (batch, tokens); a response's reward is their sum.
            response_mask: 1 at the response's tokens.
            config: verl's `algorithm` section, beside which the policy loss's keys stand.
            index: The prompt of each response.
            others: What verl hands to other estimators.

        Returns:
            The signal twice: verl's returns have a meaning only for a critic.

        Raises:
            ProxstepError: If the policy loss is not the algorithm's, prompts are not known, or the
                signal is not all that the loss would need.
        """
        del others
        if index is None:
            raise ProxstepError(
                f"algorithm.adv_estimator={loss_mode(algorithm)} needs the batch's uid, one per "
                "prompt"
            )
        section = _loss_config(config, algorithm).section()
        if algorithm.ratio_to_sampler and not config.rollout_correction.bypass_mode:
            raise ProxstepError(
                f"{loss_mode(algorithm)} takes its ratios to the policy that sampled, and verl's "
                f"old log-probabilities are not that one's: set {BYPASS}=True"
            )
        reward_B, response_BT = token_level_rewards.sum(dim=1), response_mask.bool()
        group_B = numbered(index).to(reward_B.device)
        kept_B = _compared(group_B, response_BT.any(dim=1))
        signal_B = torch.zeros_like(reward_B)
        with torch.no_grad():
            advantage_B, _ = ADVANTAGES[section.advantage](reward_B[kept_B], group_B[kept_B])
            inputs = SignalInputs(advantage_B, group_B[kept_B])
            signal = algorithm.signal(inputs, section.options())
        lost = find_loss(algorithm, section.options(), signal)
        if lost is not None:
            raise ProxstepError(f"{PLACE}{lost.key or 'loss_mode'}: {lost.reason}")
        signal_B[kept_B] = signal.value_B.to(signal_B)
        signal_BT = signal_B[:, None] * response_BT
        return signal_BT, signal_BT

    return estimate


def numbered(labels: Sequence[Any]) -> Tensor:
    """Return a number for each label, the same for equal ones."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])


def _compared(group_B: Tensor, counted_B: Tensor) -> Tensor:
    """Return which responses enter the statistics; all where that would be none."""
    groups = Groups.from_ids(group_B)
    group_counts_P = groups.sum(counted_B.double()) > 0
    kept_B = (group_counts_P & (groups.size_P > 1))[groups.index_B]
    return kept_B if kept_B.any() else torch.ones_like(kept_B)


def _loss_config(section: Any, algorithm: Algorithm) -> AlgorithmLossConfig:
    """Return the policy loss's configuration, which verl hands to the loss alone.

    Raises:
        ProxstepError: If it is not the algorithm's, or out of reach.
    """
    found = None
    if isinstance(section, DictConfig):
        found = OmegaConf.select(section, _SIBLING)
    if found is None:
        raise ProxstepError(
            f"algorithm.adv_estimator={loss_mode(algorithm)} reads {PLACE.rstrip('.')} beside the "
            "algorithm section, which is not there: hand it verl's whole configuration"
        )
    return check_config(omega_conf_to_dataclass(found), algorithm)

"""A recipe's objective and geometry as functions: rewards to advantages to signal to gradient.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

from typing import Any

import torch

from proxstep.advantages import ADVANTAGES
from proxstep.config import Recipe
from proxstep.isopo import Isopo
from proxstep.losses import LOSSES, Aggregation, drive, escort_weights, sequence_coefficients
from proxstep.objective_sections import OpoSection
from proxstep.types import Bool, Float, Int, Tensor

Metrics = dict[str, Float[Tensor, " batch"]]


class Algorithm:
    """What a recipe's objective section means.

    Args:
        recipe: The recipe; its objective, and max_completion_length for one of the aggregations.
    """

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.objective
        self.objective = LOSSES[section.name]
        self._section = section
        self._hyper = {name: getattr(section, name) for name in self.objective.hyper_parameters}
        self._mode = getattr(section, "loss_agg_mode", self.objective.default_loss_agg_mode)
        self._max_length = recipe.rollout.max_completion_length

    def advantages(
        self, reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
        """Return each sequence's advantage, and what the rewards' spread was."""
        return ADVANTAGES[self._section.advantage](reward_B, group_B)

    @property
    def needs_anchor(self) -> bool:
        """Whether the signal depends on the anchor's log-probabilities."""
        return (
            isinstance(self._section, OpoSection) and self._section.anchor_correction != "absorbed"
        )

    def signal(
        self,
        advantage_B: Float[Tensor, " batch"],
        group_B: Int[Tensor, " batch"],
        anchor_log_prob_B: Float[Tensor, " batch"] | None,
        length_B: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
        """Return what the loss takes as its advantages: for OPO the drive, else the advantages."""
        section = self._section
        if not isinstance(section, OpoSection):
            return advantage_B, {}
        weight_B, metrics = escort_weights(
            advantage_B,
            group_B,
            alpha=section.alpha,
            tau=section.tau,
            anchor_sequence_log_probs=anchor_log_prob_B,
            lengths=length_B,
            anchor_correction=section.anchor_correction,
        )
        return drive(weight_B, group_B, kind=section.drive), metrics

    def backward(
        self,
        log_prob_BT: Float[Tensor, "batch tokens"],
        old_log_prob_BT: Float[Tensor, "batch tokens"],
        signal_B: Float[Tensor, " batch"],
        response_BT: Bool[Tensor, "batch tokens"],
        *,
        num_sequences: int,
        num_tokens: int,
        isopo: Isopo | None,
        extra_loss: Float[Tensor, ""] | None,
        sequence_ids: Int[Tensor, "batch positions"],
        completion_mask: Bool[Tensor, "batch positions"],
        groups: Int[Tensor, " batch"],
        sequence_keys: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Accumulate one microbatch's gradient.

        Args:
            log_prob_BT: The policy's log-probabilities in nats, with their graph.
            old_log_prob_BT: Those of the policy that sampled.
            signal_B: What `signal` returned.
            response_BT: True at completion tokens, aligned with the log-probabilities.
            num_sequences: Sequences of the whole optimizer step.
            num_tokens: Completion tokens of the whole optimizer step.
            isopo: The geometry, or None for the plain gradient.
            extra_loss: Differentiated together with the objective, where there is no geometry.
            sequence_ids: The sequence of each input position, -1 for padding.
            completion_mask: True at completion positions of the input.
            groups: Each sequence's prompt.
            sequence_keys: Each sequence's number among all of the rollout.

        Returns:
            The microbatch's share of the step's loss, and per-sequence metrics.
        """
        inputs = (log_prob_BT, old_log_prob_BT, signal_B, response_BT)
        options: dict[str, Any] = {
            **self._hyper,
            "aggregation": Aggregation(
                self._mode,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                max_length=self._max_length,
            ),
        }
        if isopo is None:
            loss, metrics = self.objective.loss(*inputs, **options)
            (loss if extra_loss is None else loss + extra_loss).backward()
            return loss.detach(), metrics
        coefficient_B, loss, metrics = sequence_coefficients(self.objective, *inputs, **options)
        with isopo.microbatch(
            sequence_ids,
            coefficient_B,
            completion_mask,
            groups=groups.to(coefficient_B.device),
            sequence_keys=sequence_keys,
        ) as microbatch:
            microbatch.objective(log_prob_BT, response_BT).backward()
        return loss, metrics


def make_isopo(recipe: Recipe, model: torch.nn.Module) -> Isopo | None:
    """Install the recipe's geometry on a model; None where it has none."""
    geometry = recipe.geometry
    if geometry.rule == "none":
        return None
    return Isopo(
        model,
        geometry.to_rule(),
        other_parameters=geometry.other_parameters,
        fisher=geometry.fisher,
        num_overlap_positions=geometry.num_overlap_positions,
        overlap_positions=geometry.overlap_positions,
        overlap_source=geometry.overlap_source,
        fisher_denominator=geometry.fisher_denominator,
        decay=geometry.decay,
        seed=recipe.seed,
        memory_budget=geometry.memory_mib * 2**20,
    )

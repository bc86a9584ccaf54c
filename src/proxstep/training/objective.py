"""A recipe's objective and geometry as functions: rewards to advantages to signal to gradient.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from proxstep.algorithms import LOSSES, Aggregation, sequence_coefficients, tv_bound
from proxstep.algorithms.advantages import ADVANTAGES
from proxstep.algorithms.preparation import Anchor, Signal, opo_signal
from proxstep.config.objectives import OpoSection
from proxstep.config.recipe import Recipe
from proxstep.config.sections import GeometrySection
from proxstep.isopo import Isopo
from proxstep.typing import Bool, Float, Int, Tensor

_LEAST_IMPORTANCE = 0.1

Metrics = dict[str, Float[Tensor, " batch"]]


class Algorithm:
    """What a recipe's objective section means.

    Args:
        recipe: The recipe; its objective, and of the rollout what a loss depends on.
    """

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.objective
        self.objective = LOSSES[section.name]
        self._section = section
        self._hyper = {name: getattr(section, name) for name in self.objective.hyper_parameters}
        self._mode = getattr(section, "loss_agg_mode", self.objective.default_loss_agg_mode)
        self._max_length = recipe.rollout.max_completion_length
        self._importance_cap = recipe.rollout.importance_cap

    def advantages(
        self, reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
        """Return each sequence's advantage, and what the rewards' spread was."""
        return ADVANTAGES[self._section.advantage](reward_B, group_B)

    @property
    def needs_anchor(self) -> bool:
        """Whether the signal depends on the anchor's log-probabilities."""
        section = self._section
        own = isinstance(section, OpoSection) and (
            section.anchor_correction != "absorbed" or section.adaptive_tau
        )
        return own or self._importance_cap is not None

    def signal(
        self,
        advantage_B: Float[Tensor, " batch"],
        group_B: Int[Tensor, " batch"],
        anchor: Anchor | None,
    ) -> Signal:
        """Return what the loss takes of a rollout: for OPO the drive, else the advantages.

        Args:
            advantage_B: One advantage per sequence.
            group_B: Each sequence's prompt.
            anchor: The policy before the first update; where `needs_anchor`, not None.
        """
        importance_B, measured = None, {}
        if self._importance_cap is not None:
            assert anchor is not None
            importance_B, measured = anchor.importance(self._importance_cap)
        if not isinstance(self._section, OpoSection):
            return Signal(advantage_B, importance_B, metrics=measured)
        signal = opo_signal(self._section, advantage_B, group_B, anchor, importance_B)
        return dataclasses.replace(signal, metrics=signal.metrics | measured)

    def bounds(self, measured: Mapping[str, Any]) -> dict[str, float]:
        """Return what follows from a step's means over sequences, and from none of them alone."""
        chi_square = measured.get("objective/chi_square")
        return {} if chi_square is None else {"objective/tv_bound": tv_bound(chi_square)}

    def warning(self, measured: Mapping[str, Any]) -> str | None:
        """Return what a step's measurements warn of, if anything."""
        section, mean = self._section, measured.get("objective/importance_mean")
        if mean is not None and mean < _LEAST_IMPORTANCE:
            return (
                f"rollout.importance_cap: the mean importance weight is {mean:.2g}, and the loss "
                "shrinks with it: the sampler and the anchor are far apart. Raise rollout.top_p "
                "and lift rollout.top_k, whose cuts multiply over a completion's tokens, or leave "
                "rollout.importance_cap out"
            )
        if not isinstance(section, OpoSection) or section.anchor_correction != "sequence":
            return None
        size = measured.get("objective/effective_sample_size_min")
        if size is None or size >= 2:
            return None
        return (
            "objective.anchor_correction sequence: one completion has most of its prompt's weight "
            f"(objective/effective_sample_size_min is {size:.2f}): the least likely one, right or "
            "wrong. Use absorbed or length, or raise objective.alpha"
        )

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
        importance_B: Float[Tensor, " batch"] | None,
        hyper: Mapping[str, float],
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Accumulate one microbatch's gradient.

        Args:
            log_prob_BT: The policy's log-probabilities in nats, with their graph.
            old_log_prob_BT: Those of the policy that sampled.
            signal_B: The value of what `signal` returned.
            response_BT: True at completion tokens, aligned with the log-probabilities.
            num_sequences: Sequences of the whole optimizer step.
            num_tokens: Completion tokens of the whole optimizer step.
            isopo: The geometry, or None for the plain gradient.
            extra_loss: Differentiated together with the objective, where there is no geometry.
            sequence_ids: The sequence of each input position, -1 for padding.
            completion_mask: True at completion positions of the input.
            groups: Each sequence's prompt.
            sequence_keys: Each sequence's number among all of the rollout.
            importance_B: Weight of each sequence, from `signal`.
            hyper: Hyper-parameters that follow from the rollout, from `signal`.

        Returns:
            The microbatch's share of the step's loss, and per-sequence metrics.
        """
        inputs = (log_prob_BT, old_log_prob_BT, signal_B, response_BT)
        options = self._options(num_sequences, num_tokens, importance_B, hyper)
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

    def _options(
        self,
        num_sequences: int,
        num_tokens: int,
        importance_B: Tensor | None,
        hyper: Mapping[str, float],
    ) -> dict[str, Any]:
        """Return the loss's keyword arguments for one microbatch."""
        aggregation = Aggregation(
            self._mode,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_length=self._max_length,
            sequence_weights=importance_B,
        )
        return {**self._hyper, **hyper, "aggregation": aggregation}


def make_isopo(recipe: Recipe, model: torch.nn.Module) -> Isopo | None:
    """Install the recipe's geometry on a model; None where it has none."""
    if recipe.geometry.rule == "none":
        return None
    return install_geometry(recipe.geometry, model, recipe.seed)


def install_geometry(section: GeometrySection, model: torch.nn.Module, seed: int) -> Isopo:
    """Install a geometry section's rule on a model, with the section's other keys."""
    return Isopo(
        model,
        section.to_rule(),
        other_parameters=section.other_parameters,
        fisher=section.fisher,
        num_overlap_positions=section.num_overlap_positions,
        overlap_positions=section.overlap_positions,
        overlap_source=section.overlap_source,
        fisher_denominator=section.fisher_denominator,
        decay=section.decay,
        seed=seed,
        memory_budget=section.memory_mib * 2**20,
    )

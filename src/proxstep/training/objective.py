"""A recipe's objective and geometry as functions: rewards to advantages to signal to gradient.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from proxstep.algorithms import ADVANTAGES, Aggregation, OldPolicy, Signal, SignalInputs
from proxstep.algorithms.aggregate import coefficients_of
from proxstep.algorithms.safeguards import tv_bound
from proxstep.config.geometry import GeometrySection
from proxstep.config.recipe import Recipe
from proxstep.isopo import Isopo
from proxstep.typing import Bool, Float, Int, Tensor

_LEAST_IMPORTANCE = 0.1

Metrics = dict[str, Float[Tensor, " batch"]]


class Objective:
    """What a recipe's objective section means.

    Args:
        recipe: The recipe; its objective, and of the rollout what a loss depends on.

    Attributes:
        algorithm: Its algorithm.
        reads_old_policy: Whether the signal depends on the old policy's log-probabilities.
    """

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.objective
        self.algorithm, keys = section.algorithm, section.options()
        self._prepare = self.algorithm.preparation(keys)
        self._keys = self.algorithm.loss_options(keys)
        self._advantage, self._mode = ADVANTAGES[section.advantage], section.loss_agg_mode
        self._max_length = recipe.rollout.max_completion_length
        self._importance_cap = recipe.rollout.importance_cap
        own = self.algorithm.reads_old_policy(keys)
        self.reads_old_policy = own or self._importance_cap is not None

    def advantages(
        self, reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
        """Return each sequence's advantage, and what the rewards' spread was."""
        return self._advantage(reward_B, group_B)

    def signal(
        self,
        advantage_B: Float[Tensor, " batch"],
        group_B: Int[Tensor, " batch"],
        old_policy: OldPolicy | None,
    ) -> Signal:
        """Return what the loss takes of a rollout: for OPO the drive, else the advantages.

        Args:
            advantage_B: One advantage per sequence.
            group_B: Each sequence's prompt.
            old_policy: The policy before the first update; where `reads_old_policy`, not None.
        """
        importance_B, measured = None, {}
        if self._importance_cap is not None:
            assert old_policy is not None
            importance_B, measured = old_policy.importance(self._importance_cap)
        inputs = SignalInputs(advantage_B, group_B, old_policy, importance_B)
        signal = self._prepare(inputs)
        return dataclasses.replace(signal, metrics=signal.metrics | measured)

    def bounds(self, measured: Mapping[str, Any]) -> dict[str, float]:
        """Return what follows from a step's means over sequences, and from none of them alone."""
        chi_square = measured.get("objective/chi_square")
        return {} if chi_square is None else {"objective/tv_bound": tv_bound(chi_square)}

    def warning(self, measured: Mapping[str, Any]) -> str | None:
        """Return what a step's measurements warn of, if anything."""
        mean = measured.get("objective/importance_mean")
        if mean is None or mean >= _LEAST_IMPORTANCE:
            return None
        return (
            f"rollout.importance_cap: the mean importance weight is {mean:.2g}, and the loss "
            "shrinks with it: the sampler and the old policy are far apart. Raise rollout.top_p "
            "and lift rollout.top_k, whose cuts multiply over a completion's tokens, or leave "
            "rollout.importance_cap out"
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
            loss, metrics = self.algorithm.loss(*inputs, **options)
            (loss if extra_loss is None else loss + extra_loss).backward()
            return loss.detach(), metrics
        coefficient_B, loss, metrics = coefficients_of(
            self.algorithm.loss, self.algorithm.name, *inputs, **options
        )
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
        return {**self._keys, **hyper, "aggregation": aggregation}


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

"""How an algorithm enters verl: its names there, and what verl's seams cannot carry.

verl computes advantages on its driver, from rewards and prompts alone, and the loss on its workers,
from the advantages and a micro-batch's log-probabilities. What an algorithm's preparation makes of
a rollout besides one number for each sequence has no way from the one to the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from proxstep.algorithms import Algorithm, Signal, SignalInputs
from proxstep.algorithms.base import Options

LIBRARY = "proxstep.engines.verl"
"""What `actor_rollout_ref.model.external_lib` is to name."""

BYPASS = "algorithm.rollout_correction.bypass_mode"
"""With it verl's old log-probabilities are those with which the rollout drew its tokens."""


class Obstacle(NamedTuple):
    """Why verl cannot compute an algorithm: the key at fault, or None for all of it."""

    key: str | None
    reason: str


def loss_mode(algorithm: Algorithm) -> str:
    """Return the algorithm's name among verl's policy losses and advantage estimators.

    verl's own estimator `opo` is another paper's (arXiv 2505.23585).
    """
    return "chi2_opo" if algorithm.name == "opo" else f"proxstep_{algorithm.name}"


def config_name(algorithm: Algorithm) -> str:
    """Return the name of the class that holds the algorithm's keys in verl's configuration."""
    return algorithm.name.title().replace("-", "").replace("_", "") + "PolicyLossConfig"


def find_obstacle(algorithm: Algorithm, options: Options) -> Obstacle | None:
    """Return why verl cannot compute an algorithm with these values of all its keys, if so."""
    if algorithm.reads_old_policy(options):
        reason = (
            "the preparation reads the old policy's log-probabilities, which verl hands to no "
            "advantage estimator"
        )
        defaults = algorithm.defaults
        for key, default in defaults.items():
            alone = algorithm.reads_old_policy(defaults | {key: options[key]})
            if alone and not algorithm.reads_old_policy(defaults):
                return Obstacle(key, f"{reason}: use {_shown(default)}")
        return Obstacle(None, f"{reason}: use the local engine")
    return find_loss(algorithm, options, algorithm.signal(_probe(None), options))


def find_loss(algorithm: Algorithm, options: Options, signal: Signal) -> Obstacle | None:
    """Return what of a signal would not reach verl's loss, if anything.

    The signal is the preparation's, of a rollout without importance weights.
    """
    if signal.importance_B is not None:
        reason = "the preparation weighs the sequences, and verl's losses get no such weights"
        return Obstacle(None, f"{reason}: use the local engine")
    for key, value in signal.hyper.items():
        if key not in options or options[key] != value:
            reason = "it follows from the rollout, of which verl's losses see a micro-batch"
            if key in options and options[key] != algorithm.defaults[key]:
                return Obstacle(key, f"{reason}: give a value, such as {algorithm.defaults[key]}")
            return Obstacle(None, f"{reason} ({key}): use the local engine")
    return None


def reads_importance(algorithm: Algorithm, options: Options) -> bool:
    """Whether the preparation looks at importance weights, which no estimator of verl gets."""
    plain, weighted = (
        algorithm.signal(_probe(weight_B), options).value_B
        for weight_B in (None, torch.tensor([0.5, 1.0, 1.5, 1.0]))
    )
    return not torch.equal(plain, weighted)


def _probe(importance_B: torch.Tensor | None) -> SignalInputs:
    """Return a rollout of two prompts."""
    advantage_B, group_B = torch.tensor([1.0, -1.0, 3.0, -3.0]), torch.tensor([0, 0, 1, 1])
    return SignalInputs(advantage_B, group_B, importance_B=importance_B)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

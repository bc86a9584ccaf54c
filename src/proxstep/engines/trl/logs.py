"""TRL's logs under the names of metrics.jsonl.

Shapes: B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from proxstep.algorithms.advantages import ADVANTAGES
from proxstep.config.recipe import Recipe
from proxstep.engines.trl.translation import PUNISHMENT
from proxstep.training.batch import informative_groups

NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "kl": "regularizer/kl",
    "completions/mean_length": "completions_mean_length",
    "completions/max_length": "completions_max_length",
    "completions/clipped_ratio": "completions_clipped_ratio",
    "clip_ratio/region_mean": "objective/clip_ratio",
    "cispo_clip_ratio": "objective/clip_ratio",
}
"""TRL's name of a metric, and ours."""
OURS = ("objective/", "geometry/", "kl_budget/")
"""Beginnings of names that our trainers log under ours already."""


def record_of(
    recipe: Recipe,
    logs: Sequence[Mapping[str, Any]],
    rewards: Mapping[str, Sequence[float]],
    advantages: Sequence[float],
) -> dict[str, Any]:
    """Return one rollout step's record.

    Args:
        recipe: The recipe.
        logs: What TRL logged at each of the step's updates.
        rewards: The rewards of the step's completions by function, as TRL keeps them: a prompt's
            next to one another, NaN where a function does not apply.
        advantages: Their advantages.
    """
    found: dict[str, list[float]] = {}
    for log in logs:
        for name, value in log.items():
            ours = name if name.startswith(OURS) else NAMES.get(name)
            if ours is not None and value is not None:
                found.setdefault(ours, []).append(value)
    record: dict[str, Any] = {name: sum(values) / len(values) for name, values in found.items()}
    if "learning_rate" in found:
        record["learning_rate"] = found["learning_rate"][-1]
    record["completions_max_length"] = int(max(found["completions_max_length"]))
    record |= _of_rewards(recipe, rewards)
    spread = max(advantages) - min(advantages)
    record["advantage_range"] = spread
    if spread > 0 and "grad_norm" in record:
        record["grad_response_efficiency"] = record["grad_norm"] / (spread / 2)
    return record | {"generation_batches": 1, "skipped": 0}


def _of_rewards(recipe: Recipe, rewards: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return what is measured of a step's rewards; `reward` is without what is added for length."""
    names = [name for name in rewards if name != PUNISHMENT]
    weights = recipe.task.reward_weights or [1.0] * len(names)
    value_FB = torch.tensor([list(rewards[name]) for name in names], dtype=torch.float64)
    weighted_FB = value_FB * torch.tensor(weights, dtype=torch.float64)[:, None]
    reward_B = weighted_FB.nansum(dim=0).masked_fill(value_FB.isnan().all(dim=0), math.nan)
    added_B = reward_B
    measured: dict[str, Any] = {f"rewards/{name}": _mean(rewards[name]) for name in names}
    if PUNISHMENT in rewards:
        punishment_B = torch.tensor(list(rewards[PUNISHMENT]), dtype=torch.float64)
        punishment_B = punishment_B * recipe.rollout.overlong_penalty
        measured["rewards/overlong"] = punishment_B.mean().item()
        added_B = reward_B + punishment_B
    size = recipe.rollout.num_generations
    group_B = torch.arange(len(reward_B)) // size
    finite_B = added_B.isfinite()
    if finite_B.any():
        _, spread = ADVANTAGES["group-centered"](added_B[finite_B], group_B[finite_B])
        measured |= {name: spread[name] for name in ("reward_std", "frac_reward_zero_std")}
    informative = informative_groups(reward_B, group_B)
    return measured | {
        "reward": _mean(reward_B.tolist()),
        "frac_invalid_reward": 1 - reward_B.isfinite().double().mean().item(),
        "frac_informative_groups": len(informative) / (len(reward_B) // size),
    }


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None

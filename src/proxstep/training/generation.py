"""The completions of one step with their rewards: a generation batch, or as many as it takes.

Legend for shape suffixes: B sequences, P groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.algorithms.advantages import Groups
from proxstep.config.recipe import Recipe
from proxstep.rewards import overlong_punishment
from proxstep.runs.clock import Clock
from proxstep.training.models import autocast
from proxstep.training.prompts import Prompts, batch_rows
from proxstep.training.rollout import Completions, joined, sample
from proxstep.typing import Float, Int, Tensor


@dataclass(frozen=True)
class Graded:
    """Completions with their rewards.

    Attributes:
        completions: The completions.
        reward_B: Weighted sum of the reward functions, in float64; NaN where there is none that
            float32 can hold.
        group_B: Each completion's prompt, counted from 0.
        per_function: For each reward function's name its rewards; None where it does not apply.
    """

    completions: Completions
    reward_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"]
    per_function: dict[str, list[float | None]]

    @property
    def num_groups(self) -> int:
        """Prompts that were sampled, whatever became of their completions."""
        return int(self.group_B.max()) + 1

    def describe(self) -> dict[str, Any]:
        """Return what is measured of all completions, those that teach nothing included."""
        lengths = self.completions.lengths().double()
        finite = self.reward_B[self.reward_B.isfinite()]
        informative = informative_groups(self.reward_B, self.group_B)
        measured = {
            "reward": finite.mean().item() if len(finite) else None,
            "frac_invalid_reward": 1 - len(finite) / len(self.reward_B),
            "frac_informative_groups": len(informative) / self.num_groups,
            "completions_mean_length": lengths.mean().item(),
            "completions_max_length": int(lengths.max()),
            "completions_clipped_ratio": self.completions.truncated_B.double().mean().item(),
        }
        for name, values in self.per_function.items():
            given = [value for value in values if value is not None and math.isfinite(value)]
            measured[f"rewards/{name}"] = sum(given) / len(given) if given else None
        return measured


def generate(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    first_batch: int,
    clock: Clock,
) -> tuple[Graded, int]:
    """Sample and grade a step's completions.

    With dynamic sampling, batches of prompts follow one another until there are `num_prompts`
    groups whose rewards differ, or `dynamic_sampling_max_batches` were sampled.

    Args:
        recipe: The recipe.
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: The training prompts.
        first_batch: How many batches of prompts the run sampled before.
        clock: Measures the phases.

    Returns:
        All completions, and the number of batches.

    Source: arXiv 2503.14476, section 3.2; verl's `filter_groups`.

    Differs: verl stops with an error where the batches do not suffice.
    """
    section = recipe.rollout
    parts: list[Graded] = []
    found = 0
    while len(parts) < (section.dynamic_sampling_max_batches or 1) and found < section.num_prompts:
        batch = first_batch + len(parts)
        parts.append(_generation_batch(recipe, model, tokenizer, prompts, batch, clock))
        found += len(informative_groups(parts[-1].reward_B, parts[-1].group_B))
    return _joined(parts, tokenizer.pad_token_id), len(parts)


def informative_groups(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
) -> Int[Tensor, " groups"]:
    """Return the groups whose finite rewards are not all equal in float32, in ascending order.

    >>> rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, float("nan"), 1.0])
    >>> informative_groups(rewards, torch.tensor([0, 0, 1, 1, 2, 2])).tolist()
    [1]
    """
    finite_B = reward_B.isfinite()
    reward_B, group_B = reward_B[finite_B].float(), group_B[finite_B]
    groups = Groups.from_ids(group_B)
    return group_B.unique()[groups.max(reward_B) != groups.min(reward_B)]


def shortage(recipe: Recipe, measured: Mapping[str, Any]) -> str | None:
    """Return what to tell about a step for which dynamic sampling found too few groups, or None."""
    section, batches = recipe.rollout, measured["generation_batches"]
    found = round(measured["frac_informative_groups"] * batches * section.num_prompts)
    if section.dynamic_sampling_max_batches is None or found >= section.num_prompts:
        return None
    rest = "the step learns from those alone" if found else "the step is skipped"
    return (
        f"generation batches: {batches}, prompts whose rewards differ: {found} instead of "
        f"{section.num_prompts}, and {rest}: raise "
        "rollout.dynamic_sampling_max_batches, or take prompts that are neither too easy nor too "
        "hard. It may happen again; watch frac_informative_groups"
    )


def overlong(recipe: Recipe, completions: Completions) -> Float[Tensor, " batch"] | None:
    """Return what the completions' lengths add to their rewards; None where nothing does."""
    section = recipe.rollout
    if section.overlong_buffer is None:
        return None
    punishments = overlong_punishment(
        completions.lengths().tolist(),
        max_length=section.max_completion_length,
        buffer=section.overlong_buffer,
        penalty=section.overlong_penalty,
    )
    return torch.tensor(punishments, dtype=torch.float64)


def _generation_batch(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    batch: int,
    clock: Clock,
) -> Graded:
    """Sample and grade `num_generations` completions of each prompt of one batch."""
    section = recipe.rollout
    rows = batch_rows(len(prompts), section.num_prompts, batch, recipe.seed)
    repeated = [row for row in rows for _ in range(section.num_generations)]
    with clock.phase("rollout"), autocast(recipe, model):
        completions = sample(
            model,
            tokenizer,
            [prompts.tokens(row) for row in repeated],
            max_new_tokens=section.max_completion_length,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            with_log_probs=recipe.keeps_sampler,
        )
    with clock.phase("reward"):
        table = prompts.grade(repeated, completions.texts(tokenizer))
    reward_B = torch.tensor(table.total, dtype=torch.float64)
    group_B = torch.arange(len(rows)).repeat_interleave(section.num_generations)
    usable_B = reward_B.float().isfinite()
    reward_B = reward_B.masked_fill(~usable_B, math.nan)
    return Graded(completions, reward_B, group_B, table.per_function)


def _joined(parts: Sequence[Graded], pad_token: int) -> Graded:
    """Return several batches as one, the groups counted on."""
    offset = 0
    groups = []
    for part in parts:
        groups.append(part.group_B + offset)
        offset += part.num_groups
    return Graded(
        joined([part.completions for part in parts], pad_token),
        torch.cat([part.reward_B for part in parts]),
        torch.cat(groups),
        {
            name: [value for part in parts for value in part.per_function[name]]
            for name in parts[0].per_function
        },
    )

"""One step's experience: completions, their rewards, and what the objective makes of them.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.algorithm import Algorithm
from proxstep.clock import Clock
from proxstep.config import Recipe
from proxstep.data import Prompts, step_rows
from proxstep.evaluation import completion_log_probs
from proxstep.masked import masked_sum
from proxstep.models import autocast
from proxstep.rollout import Completions, sample
from proxstep.types import Float, Int, Tensor


@dataclass(frozen=True)
class Batch:
    """Completions that have a reward, ready for the update.

    Attributes:
        completions: The completions.
        signal_B: What the objective takes as its advantages.
        group_B: Each completion's prompt, counted from 0.
        index_B: Each completion's number among all of the step.
        old_log_prob_BT: Log-probabilities under the policy that sampled, or None where the
            update's single pass computes the same.
    """

    completions: Completions
    signal_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"]
    index_B: Int[Tensor, " batch"]
    old_log_prob_BT: Float[Tensor, "batch tokens"] | None

    def __len__(self) -> int:
        return len(self.completions)

    def minibatches(self, number: int) -> Iterator[Batch]:
        """Yield that many parts, each of whole groups, in order."""
        for groups in self.group_B.unique().chunk(number):
            yield self.rows(torch.isin(self.group_B, groups).nonzero().squeeze(1))

    def microbatches(self, size: int | None) -> Iterator[Batch]:
        """Yield parts of at most `size` rows, in order, without columns of padding.

        A prompt's completions stay together wherever they fit: the trainer owns this composition,
        which the natural rule depends on.
        """
        for rows in _whole_groups(self.group_B, size or len(self)):
            yield self.rows(rows).trimmed()

    def rows(self, index: Tensor) -> Batch:
        """Return the chosen rows."""
        on_device = index.to(self.signal_B.device)
        old = self.old_log_prob_BT
        return Batch(
            self.completions.rows(on_device),
            self.signal_B[on_device],
            self.group_B[index],
            self.index_B[index],
            None if old is None else old[on_device],
        )

    def trimmed(self) -> Batch:
        """Return the same without the columns that are padding in every row."""
        columns = self.completions.used_columns()
        old = self.old_log_prob_BT
        return Batch(
            self.completions.columns(columns),
            self.signal_B,
            self.group_B,
            self.index_B,
            None if old is None else old[:, columns.start : columns.stop - 1],
        )


def collect(
    recipe: Recipe,
    algorithm: Algorithm,
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    step: int,
    clock: Clock,
) -> tuple[Batch | None, dict[str, Any]]:
    """Sample and grade one step's completions.

    Completions without a finite reward are left out, and so are groups that keep fewer than two.

    Args:
        recipe: The recipe.
        algorithm: Its objective.
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: The training prompts.
        step: From 0; it decides which prompts are drawn.
        clock: Measures the phases.

    Returns:
        The batch, or None where nothing is left to learn from, and what was measured.
    """
    section = recipe.rollout
    rows = step_rows(len(prompts), section.num_prompts, step, recipe.seed)
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
        )
    with clock.phase("reward"):
        table = prompts.grade(repeated, completions.texts(tokenizer))
    reward_B = torch.tensor(table.total, dtype=torch.float64)
    group_B = torch.arange(len(rows)).repeat_interleave(section.num_generations)
    measured = _describe(completions, reward_B)
    for name, values in table.per_function.items():
        given = [value for value in values if value is not None and math.isfinite(value)]
        measured[f"rewards/{name}"] = sum(given) / len(given) if given else None
    kept = _with_reward(reward_B, group_B, minimum=min(2, section.num_generations))
    if not len(kept):
        return None, measured
    completions = completions.rows(kept.to(completions.token_BT.device))
    batch, more = _batch(
        recipe, algorithm, model, completions, reward_B[kept], group_B[kept], clock
    )
    return batch, measured | more


def _batch(
    recipe: Recipe,
    algorithm: Algorithm,
    model: nn.Module,
    completions: Completions,
    reward_B: Tensor,
    group_B: Tensor,
    clock: Clock,
) -> tuple[Batch, dict[str, Any]]:
    """Return the batch of graded completions, and what was measured of advantages and signal."""
    advantage_B, spread = algorithm.advantages(reward_B.float(), group_B)
    update = recipe.update
    old_log_prob_BT = anchor_B = None
    if update.num_minibatches * update.num_iterations > 1 or algorithm.needs_anchor:
        with clock.phase("log_probs"), autocast(recipe, model):
            old_log_prob_BT = completion_log_probs(
                model,
                completions,
                recipe.rollout.temperature,
                update.microbatch_size or len(completions),
                recipe.model.head,
            )
        anchor_B = masked_sum(old_log_prob_BT, completions.response_BT[:, 1:]).cpu()
    signal_B, more = algorithm.signal(advantage_B, group_B, anchor_B, completions.lengths().cpu())
    measured = {name: spread[name] for name in ("frac_reward_zero_std", "reward_std")}
    measured["advantage_range"] = (advantage_B.max() - advantage_B.min()).item()
    measured |= {f"objective/{name}": value for name, value in more.items()}
    on_device = signal_B.to(completions.token_BT.device)
    return Batch(
        completions, on_device, group_B, torch.arange(len(group_B)), old_log_prob_BT
    ), measured


def _whole_groups(group_B: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the rows of as many groups as fit; a group that is larger than size is split."""
    gathered: list[int] = []
    for group in group_B.unique():
        for row in (group_B == group).nonzero().squeeze(1).split(size):
            if gathered and len(gathered) + len(row) > size:
                yield torch.tensor(gathered)
                gathered = []
            gathered += row.tolist()
    yield torch.tensor(gathered)


def _with_reward(reward_B: Tensor, group_B: Tensor, minimum: int) -> Tensor:
    """Return the rows whose reward is finite, in groups that keep at least `minimum` of them."""
    finite_B = reward_B.isfinite()
    left = torch.zeros(int(group_B.max()) + 1, dtype=torch.long)
    left = left.index_add_(0, group_B, finite_B.long())
    return (finite_B & (left[group_B] >= minimum)).nonzero().squeeze(1)


def _describe(completions: Completions, reward_B: Tensor) -> dict[str, Any]:
    lengths = completions.lengths().double()
    finite = reward_B[reward_B.isfinite()]
    return {
        "reward": finite.mean().item() if len(finite) else None,
        "frac_invalid_reward": 1 - len(finite) / len(reward_B),
        "completions_mean_length": lengths.mean().item(),
        "completions_max_length": int(lengths.max()),
        "completions_clipped_ratio": completions.truncated_B.double().mean().item(),
    }

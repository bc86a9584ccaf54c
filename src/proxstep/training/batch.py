"""One step's batch: completions are sampled and graded, and what the update learns from is chosen.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from proxstep.algorithms import OldPolicy
from proxstep.algorithms.advantages import Groups
from proxstep.config.recipe import Recipe
from proxstep.config.sections import UpdateSection
from proxstep.rewards import overlong_punishment
from proxstep.training.objective import Objective
from proxstep.training.prompts import Prompts, batch_rows
from proxstep.training.regularizers import reward_penalty
from proxstep.training.rollout import (
    Completions,
    Cut,
    autocast,
    completion_log_probs,
    joined,
    rows_by_tokens,
    vocabulary_size,
)
from proxstep.training.sampler import Sampler
from proxstep.typing import Float, Int, Tensor

Phase = Callable[[str], AbstractContextManager[None]]
"""A context that measures the time of a phase, by its name."""


@dataclass(frozen=True)
class Batch:
    """Completions that have a reward, ready for the update.

    Attributes:
        completions: The completions.
        signal_B: What the objective takes as its advantages.
        group_B: Each completion's prompt, counted from 0.
        index_B: Each completion's number among all of the step.
        old_log_prob_BT: Log-probabilities under the old policy, or with which the tokens were drawn
            where the algorithm's ratios are to the sampler; None where the update's single pass
            computes the same.
        importance_B: Weight of each completion's loss, or None for 1.
        hyper: Hyper-parameters of the loss that follow from the rollout, the same in all its parts.
    """

    completions: Completions
    signal_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"]
    index_B: Int[Tensor, " batch"]
    old_log_prob_BT: Float[Tensor, "batch tokens"] | None
    importance_B: Float[Tensor, " batch"] | None = None
    hyper: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def minibatches(self, number: int) -> Iterator[Batch]:
        """Yield that many parts of nearly equal size, each of whole groups; fewer if need be."""
        for groups in self.group_B.unique().tensor_split(number):
            if len(groups):
                yield self.rows(torch.isin(self.group_B, groups).nonzero().squeeze(1))

    def microbatches(self, update: UpdateSection) -> Iterator[Batch]:
        """Yield the parts of a forward and backward each, without columns of padding.

        By number they keep the order, and a prompt's completions stay together wherever they fit:
        the trainer owns this composition, which the natural rule depends on. By tokens, the longest
        come first.
        """
        if update.microbatch_tokens is not None:
            parts = iter(rows_by_tokens(self.completions, update.microbatch_tokens))
        else:
            parts = _whole_groups(self.group_B, update.microbatch_size or len(self))
        for rows in parts:
            yield self.rows(rows).trimmed()

    def with_signal(self) -> Batch:
        """Return the rows whose signal is not exactly 0; the first row where there is none."""
        rows = self.signal_B.cpu().nonzero().squeeze(1)
        return self.rows(rows if len(rows) else torch.arange(1))

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
            None if self.importance_B is None else self.importance_B[on_device],
            self.hyper,
        )

    def trimmed(self) -> Batch:
        """Return the same without the columns that are padding in every row."""
        columns = self.completions.used_columns()
        old = self.old_log_prob_BT
        return replace(
            self,
            completions=self.completions.columns(columns),
            old_log_prob_BT=None if old is None else old[:, columns.start : columns.stop - 1],
        )


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
        lengths = self.completions.lengths().cpu().double()
        finite = self.reward_B[self.reward_B.isfinite()]
        informative = informative_groups(self.reward_B, self.group_B)
        measured = {
            "reward": finite.mean().item() if len(finite) else None,
            "frac_invalid_reward": 1 - len(finite) / len(self.reward_B),
            "frac_informative_groups": len(informative) / self.num_groups,
            "completions_mean_length": lengths.mean().item(),
            "completions_max_length": int(lengths.max()),
            "completions_clipped_ratio": self.completions.truncated_B.cpu().double().mean().item(),
        }
        for name, values in self.per_function.items():
            given = [value for value in values if value is not None and math.isfinite(value)]
            measured[f"rewards/{name}"] = sum(given) / len(given) if given else None
        return measured


def collect(
    recipe: Recipe,
    objective: Objective,
    model: nn.Module,
    sampler: Sampler,
    tokenizer: Any,
    prompts: Prompts,
    first_prompt: int,
    phase: Phase,
    initial: nn.Module | None = None,
) -> tuple[Batch | None, dict[str, Any]]:
    """Sample and grade one step's completions, and choose those that the update learns from.

    Completions without a finite reward are left out, and so are groups that keep fewer than two.
    Dynamic sampling keeps the first `num_prompts` groups whose rewards, before anything is added
    to them, differ. A truncated completion that the recipe masks counts in its group's advantages
    and in an objective's weights of the rollout, and is left out after that.

    Which prompts are drawn follows from `first_prompt`, the number of those that the run drew
    before. `initial` is the initial policy, where a KL penalty in the reward needs it; None for a
    model whose adapters can be switched off.

    Returns:
        The batch, or None where nothing is left to learn from, and what was measured.
    """
    graded, num_batches = generate(recipe, sampler, tokenizer, prompts, first_prompt, phase)
    measured = {**graded.describe(), "generation_batches": num_batches}
    reward_B = graded.reward_B
    if (punishment_B := overlong(recipe, graded.completions)) is not None:
        measured["rewards/overlong"] = punishment_B.mean().item()
        reward_B = reward_B + punishment_B
    kept = _chosen(recipe, graded)
    if not len(kept):
        return None, measured
    completions = graded.completions.rows(kept.to(graded.completions.token_BT.device))
    reward_B, group_B, log_prob_BT = reward_B[kept], graded.group_B[kept], None
    if recipe.regularizer.in_reward:
        with phase("log_probs"):
            log_prob_BT = _log_probs(recipe, model, completions)
            penalty_B = reward_penalty(recipe, model, initial, log_prob_BT, completions).cpu()
        measured["rewards/kl"] = penalty_B.double().mean().item()
        reward_B = reward_B + penalty_B
    batch, more = _batch(
        recipe, objective, model, completions, reward_B, group_B, phase, log_prob_BT
    )
    measured |= more
    if not recipe.rollout.mask_truncated_completions:
        return batch, measured
    truncated_B = completions.truncated_B.cpu()
    measured["frac_masked_completions"] = truncated_B.double().mean().item()
    left = (~truncated_B).nonzero().squeeze(1)
    return batch.rows(left) if len(left) else None, measured


def _chosen(recipe: Recipe, graded: Graded) -> Tensor:
    """Return the rows of the completions whose rewards become advantages."""
    section = recipe.rollout
    kept = with_reward(graded.reward_B, graded.group_B, minimum=min(2, section.num_generations))
    if len(kept) < 2:  # nothing to be compared with
        return kept[:0]
    if section.dynamic_sampling_max_batches is None:
        return kept
    informative = informative_groups(graded.reward_B, graded.group_B)[: section.num_prompts]
    return kept[torch.isin(graded.group_B[kept], informative)]


def _batch(
    recipe: Recipe,
    objective: Objective,
    model: nn.Module,
    completions: Completions,
    reward_B: Tensor,
    group_B: Tensor,
    phase: Phase,
    log_prob_BT: Tensor | None,
) -> tuple[Batch, dict[str, Any]]:
    """Return the batch of graded completions, and what was measured of advantages and signal."""
    # Rewards are equal if float32 says so; in float64 the squares of large ones are finite.
    advantage_B, spread = objective.advantages(reward_B.float().double(), group_B)
    advantage_B = advantage_B.float()
    update = recipe.update
    old_log_prob_BT = old_policy = None
    if objective.reads_old_policy or recipe.rollout.engine == "vllm":
        if log_prob_BT is None:
            with phase("log_probs"):
                log_prob_BT = _log_probs(recipe, model, completions)
        old_policy = OldPolicy(
            log_prob_BT,
            completions.response_BT[:, 1:],
            vocabulary_size(model),
            completions.sampler_log_prob_BT,
        )
    signal = objective.signal(advantage_B, group_B, old_policy)
    if objective.algorithm.ratio_to_sampler:
        old_log_prob_BT = completions.sampler_log_prob_BT
    elif objective.reads_old_policy or update.num_updates > 1:
        old_log_prob_BT = log_prob_BT
        if old_log_prob_BT is None:
            needed_B = signal.value_B != 0 if recipe.leaves_out_idle else group_B >= 0
            with phase("log_probs"):
                old_log_prob_BT = _some_log_probs(recipe, model, completions, needed_B.cpu())
    measured = {name: spread[name] for name in ("frac_reward_zero_std", "reward_std")}
    if old_policy is not None:
        measured |= {f"sampler/{name}": value for name, value in old_policy.mismatch().items()}
    measured["advantage_range"] = (advantage_B.max() - advantage_B.min()).item()
    if recipe.leaves_out_idle:
        measured["frac_left_out_sequences"] = (signal.value_B == 0).cpu().double().mean().item()
    measured |= {f"objective/{name}": value for name, value in signal.metrics.items()}
    device = completions.token_BT.device
    importance_B = signal.importance_B
    return Batch(
        completions,
        signal.value_B.to(device),
        group_B,
        torch.arange(len(group_B)),
        old_log_prob_BT,
        None if importance_B is None else importance_B.to(device),
        signal.hyper,
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


def with_reward(reward_B: Tensor, group_B: Tensor, minimum: int) -> Tensor:
    """Return the rows whose reward is finite, in groups that keep at least `minimum` of them."""
    finite_B = reward_B.isfinite()
    left = torch.zeros(int(group_B.max()) + 1, dtype=torch.long)
    left = left.index_add_(0, group_B, finite_B.long())
    return (finite_B & (left[group_B] >= minimum)).nonzero().squeeze(1)


def _log_probs(recipe: Recipe, model: nn.Module, completions: Completions) -> Tensor:
    """Return the sampling policy's log-probabilities of the tokens from the second on."""
    with autocast(recipe, model):
        return completion_log_probs(
            model,
            completions,
            recipe.rollout.temperature,
            Cut.of(recipe.update),
            recipe.model.head,
        )


def _some_log_probs(
    recipe: Recipe, model: nn.Module, completions: Completions, needed_B: Tensor
) -> Tensor:
    """Return the same as `_log_probs` in the rows that are needed, and 0 in the others."""
    if needed_B.all():
        return _log_probs(recipe, model, completions)
    token_BT = completions.token_BT
    log_prob_BT = torch.zeros(token_BT[:, 1:].shape, device=token_BT.device)
    if needed_B.any():
        needed_B = needed_B.to(token_BT.device)
        log_prob_BT[needed_B] = _log_probs(recipe, model, completions.rows(needed_B))
    return log_prob_BT


def generate(
    recipe: Recipe,
    sampler: Sampler,
    tokenizer: Any,
    prompts: Prompts,
    first_prompt: int,
    phase: Phase,
) -> tuple[Graded, int]:
    """Return a step's completions, graded, and from how many batches of prompts they are.

    With dynamic sampling, batches of prompts follow one another until there are `num_prompts`
    groups whose rewards differ, or `dynamic_sampling_max_batches` were sampled.

    Source: arXiv 2503.14476, section 3.2; verl's `filter_groups`.

    Differs: verl stops with an error where the batches do not suffice.
    """
    section = recipe.rollout
    parts: list[Graded] = []
    found = 0
    while len(parts) < (section.dynamic_sampling_max_batches or 1) and found < section.num_prompts:
        first = first_prompt + len(parts) * section.num_prompts
        parts.append(_generation_batch(recipe, sampler, tokenizer, prompts, first, phase))
        found += len(informative_groups(parts[-1].reward_B, parts[-1].group_B))
    return _joined(parts, tokenizer.pad_token_id), len(parts)


def _generation_batch(
    recipe: Recipe,
    sampler: Sampler,
    tokenizer: Any,
    prompts: Prompts,
    first_prompt: int,
    phase: Phase,
) -> Graded:
    """Sample and grade `num_generations` completions of each prompt of one batch."""
    section = recipe.rollout
    rows = _next_rows(len(prompts), section.num_prompts, first_prompt, recipe.seed)
    with phase("rollout"):
        completions = sampler([prompts.tokens(row) for row in rows])
    repeated = [row for row in rows for _ in range(section.num_generations)]
    with phase("reward"):
        truncated = completions.truncated_B.tolist()
        table = prompts.grade(repeated, completions.texts(tokenizer), truncated)
    reward_B = torch.tensor(table.total, dtype=torch.float64)
    group_B = torch.arange(len(rows)).repeat_interleave(section.num_generations)
    usable_B = reward_B.float().isfinite()
    reward_B = reward_B.masked_fill(~usable_B, math.nan)
    return Graded(completions, reward_B, group_B, table.per_function)


def _next_rows(num_rows: int, number: int, first: int, seed: int) -> list[int]:
    """Return the rows of as many prompts, from the place of the first in the order of all on."""
    batch, skipped = divmod(first, number)
    rows = batch_rows(num_rows, number, batch, seed)
    if skipped:  # the run was resumed with another number of prompts
        rows = rows[skipped:] + batch_rows(num_rows, number, batch + 1, seed)[:skipped]
    return rows


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

"""Advantages: each sequence's reward against those of its group, the completions of one prompt.

Shapes: B sequences, P groups. Groups are arbitrary integers, may differ in size and come in any
order.

Every function subtracts the group's smallest reward before it averages. That changes nothing on
paper; in floating point it makes a group of equal rewards exactly zero, and the result independent
of a constant added to the rewards. An algorithm's own kind stands in its file, with the same
decorator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from proxstep.algorithms.preparation import Signal, SignalInputs
from proxstep.errors import ProxstepError
from proxstep.typing import Float, Int, Tensor

AdvantageFunction = Callable[..., tuple[Tensor, dict[str, float]]]
"""(reward_B, group_B) -> (advantage_B, metrics)."""

ADVANTAGES: dict[str, AdvantageFunction] = {}
"""Every kind of advantage by name; `advantage` fills it."""

NONNEGATIVE: set[str] = set()
"""The kinds that refuse a reward below 0."""


def advantage(
    name: str, *, nonnegative: bool = False
) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Return a decorator that adds a function to `ADVANTAGES`, and perhaps to `NONNEGATIVE`.

    Raises:
        ProxstepError: The name is taken.
    """
    if name in ADVANTAGES:
        raise ProxstepError(f"advantage {name}: the name is taken")

    def register(function: AdvantageFunction) -> AdvantageFunction:
        ADVANTAGES[name] = function
        if nonnegative:
            NONNEGATIVE.add(name)
        return function

    return register


def compares_completions(name: str) -> bool:
    """Whether a kind of advantage compares the completions of a prompt, of which it needs two."""
    return name != "batch-normalized"


@dataclass(frozen=True)
class Groups:
    """Which group each sequence belongs to, with the groups renumbered 0 ... P-1.

    Attributes:
        index_B: Each sequence's group, in 0 ... P-1.
        size_P: Number of sequences in each group, at least 1.
    """

    index_B: Int[Tensor, " batch"]
    size_P: Int[Tensor, " groups"]

    @classmethod
    def from_ids(cls, group_B: Int[Tensor, " batch"]) -> Groups:
        """Return the groups of arbitrary integer labels."""
        _, index_B, size_P = group_B.unique(return_inverse=True, return_counts=True)
        return cls(index_B, size_P)

    @classmethod
    def whole_batch(cls, group_B: Int[Tensor, " batch"]) -> Groups:
        """Return one group that holds every sequence, whatever its label."""
        return cls.from_ids(torch.zeros_like(group_B))

    def sum(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " groups"]:
        """Return each group's sum."""
        return value_B.new_zeros(len(self.size_P)).index_add(0, self.index_B, value_B)

    def mean(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " groups"]:
        """Return each group's mean."""
        return self.sum(value_B) / self.size_P

    def max(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " groups"]:
        """Return each group's largest value."""
        lowest_P = value_B.new_full((len(self.size_P),), -torch.inf)
        return lowest_P.scatter_reduce(0, self.index_B, value_B, "amax")

    def min(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " groups"]:
        """Return each group's smallest value."""
        return -self.max(-value_B)

    def centered(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return each value minus its group's mean, exactly 0 in a group of equal values."""
        above_lowest_B = value_B - self.min(value_B)[self.index_B]
        return above_lowest_B - self.mean(above_lowest_B)[self.index_B]

    def std(self, value_B: Float[Tensor, " batch"]) -> Float[Tensor, " groups"]:
        """Return each group's unbiased standard deviation; 0 for a group of one."""
        squares_P = self.sum(self.centered(value_B).square())
        return (squares_P / (self.size_P - 1).clamp(min=1)).sqrt()


def check_finite(name: str, value_B: Float[Tensor, " batch"]) -> None:
    """Raise ProxstepError naming the first NaN or infinity of the argument `name`."""
    bad_N = (~value_B.isfinite()).nonzero().flatten()
    if len(bad_N):
        first = int(bad_N[0])
        raise ProxstepError(
            f"{name}[{first}] is {value_B[first].item()}; every value must be finite "
            f"({len(bad_N)} of {len(value_B)} are not). Leave such a completion out of the batch."
        )


@advantage("group-zscore")
def group_zscore(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"], *, eps: float = 1e-6
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return each reward's z-score in its group.

    A_b = (r_b - mean_g) / (std_g + eps), with the unbiased standard deviation (n - 1) and 0 where
    all rewards of the group are equal.

    Args:
        reward_B: One reward per sequence, in reward units.
        group_B: The group (prompt) of each sequence.
        eps: Numerical guard, in reward units: a spread well below it is treated as none.

    Returns:
        The advantages (in standard deviations) and the metrics `frac_reward_zero_std`,
        `reward_std`, `num_groups`.

    Raises:
        ProxstepError: A group has one sequence, the batch is empty or a reward is not finite.

    Source: arXiv 2402.03300, section 4.1.2.
    Differs: the paper does not say which standard deviation; TRL and verl use the unbiased one, and
    so do we.

    >>> reward_B, group_B = torch.tensor([1.0, 0.0, 0.1, 0.1]), torch.tensor([7, 7, 3, 3])
    >>> advantage_B, metrics = group_zscore(reward_B, group_B)
    >>> advantage_B.tolist()[2:], metrics["frac_reward_zero_std"]
    ([0.0, 0.0], 0.5)
    """
    groups = checked_groups(reward_B, group_B)
    check_pairs("group-zscore", groups)
    return _zscore(reward_B, groups, eps), spread_metrics(reward_B, groups)


@advantage("group-centered")
def group_centered(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return each reward minus its group's mean.

    A_b = r_b - mean_g

    Args:
        reward_B: One reward per sequence, in reward units.
        group_B: The group (prompt) of each sequence; a group of one has advantage 0.

    Returns:
        The advantages (in reward units) and the metrics `frac_reward_zero_std`, `reward_std`,
        `num_groups`.

    Raises:
        ProxstepError: The batch is empty or a reward is not finite.

    Source: arXiv 2503.20783 (Dr. GRPO), section 3.2.
    """
    groups = checked_groups(reward_B, group_B)
    return groups.centered(reward_B), spread_metrics(reward_B, groups)


@advantage("leave-one-out")
def leave_one_out(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return each reward minus the mean of the others of its group.

    A_b = r_b - sum_{c != b} r_c / (n - 1) = (r_b - mean_g) n / (n - 1), for a group of n sequences.

    Args:
        reward_B: One reward per sequence, in reward units.
        group_B: The group (prompt) of each sequence.

    Returns:
        The advantages (in reward units) and the metrics `frac_reward_zero_std`, `reward_std`,
        `num_groups`.

    Raises:
        ProxstepError: A group has one sequence, the batch is empty or a reward is not finite.

    Source: arXiv 2402.14740 (RLOO).
    """
    groups = checked_groups(reward_B, group_B)
    check_pairs("leave-one-out", groups)
    size_B = groups.size_P.to(reward_B)[groups.index_B]
    advantage_B = groups.centered(reward_B) * size_B / (size_B - 1)
    return advantage_B, spread_metrics(reward_B, groups)


@advantage("batch-normalized")
def batch_normalized(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"], *, eps: float = 1e-6
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return each reward's z-score in the whole batch.

    A_b = (r_b - mean) / (std + eps) over all sequences, with the unbiased standard deviation.

    Args:
        reward_B: One reward per sequence, in reward units.
        group_B: The group (prompt) of each sequence; only the metrics depend on it.
        eps: Numerical guard, in reward units: a spread well below it is treated as none.

    Returns:
        The advantages (in standard deviations) and the metrics `frac_reward_zero_std`,
        `reward_std`, `num_groups`.

    Raises:
        ProxstepError: The batch has fewer than two sequences or a reward is not finite.

    Source: arXiv 2501.03262 (REINFORCE++), the global advantage normalization.
    """
    groups = checked_groups(reward_B, group_B)
    if len(reward_B) < 2:
        raise ProxstepError(
            "batch-normalized advantages need at least two sequences in the batch, got 1: "
            "raise num_generations or the number of prompts."
        )
    advantage_B = _zscore(reward_B, Groups.whole_batch(group_B), eps)
    return advantage_B, spread_metrics(reward_B, groups)


def _zscore(
    value_B: Float[Tensor, " batch"], groups: Groups, eps: float
) -> Float[Tensor, " batch"]:
    return groups.centered(value_B) / (groups.std(value_B) + eps)[groups.index_B]


def spread_metrics(reward_B: Float[Tensor, " batch"], groups: Groups) -> dict[str, float]:
    """Return how far the rewards of a group are apart: the metrics of every kind of advantage."""
    is_flat_P = groups.max(reward_B) == groups.min(reward_B)
    return {
        "frac_reward_zero_std": is_flat_P.cpu().double().mean().item(),
        "reward_std": groups.std(reward_B).mean().item(),
        "num_groups": float(len(groups.size_P)),
    }


def checked_groups(reward_B: Tensor, group_B: Tensor) -> Groups:
    """Return the groups, or raise ProxstepError for rewards that have no advantages."""
    for name, value in (("reward_B", reward_B), ("group_B", group_B)):
        if not isinstance(value, Tensor):
            raise ProxstepError(f"{name} is {type(value).__name__}; it must be a tensor.")
    if group_B.is_floating_point() or group_B.is_complex():
        raise ProxstepError(f"group_B is {group_B.dtype}; it must be integers.")
    if reward_B.ndim != 1 or reward_B.shape != group_B.shape:
        raise ProxstepError(
            "reward_B and group_B must be vectors of one entry per sequence, got shapes "
            f"{tuple(reward_B.shape)} and {tuple(group_B.shape)}."
        )
    if not len(reward_B):
        raise ProxstepError("reward_B is empty: advantages need at least one sequence.")
    if not reward_B.is_floating_point():
        raise ProxstepError(f"reward_B is {reward_B.dtype}: pass reward_B.float().")
    check_finite("reward_B", reward_B)
    return Groups.from_ids(group_B)


def check_pairs(name: str, groups: Groups) -> None:
    """Raise ProxstepError where a group has one sequence, which has nothing to be compared with."""
    num_single = int((groups.size_P == 1).sum())
    if num_single:
        raise ProxstepError(
            f"{name} compares the completions of a group, but {num_single} of "
            f"{len(groups.size_P)} groups have only one: set num_generations to 2 or more, or "
            "choose batch-normalized."
        )


def plain_signal(inputs: SignalInputs) -> Signal:
    """Return the advantages as they are: the preparation of an algorithm that has none."""
    return Signal(inputs.advantage_B, inputs.importance_B)

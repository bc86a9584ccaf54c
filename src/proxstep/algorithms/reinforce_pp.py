"""REINFORCE++ and its variant with a baseline: advantages normalized over the whole batch.

Shapes: B sequences, P groups.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from proxstep.algorithms.advantages import (
    Groups,
    advantage,
    check_pairs,
    checked_groups,
    spread_metrics,
)
from proxstep.algorithms.aggregate import TOKEN_MEAN
from proxstep.algorithms.base import Algorithm
from proxstep.algorithms.grpo import CLIP_KEYS, grpo
from proxstep.typing import Float, Int, Tensor


@advantage("group-centered-batch-scaled")
def group_centered_batch_scaled(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"], *, eps: float = 1e-6
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return each reward minus its group's mean, over the whole batch's spread around those means.

    A_b = (r_b - mean_g) / (std_c (r_c - mean_g(c)) + eps), the unbiased standard deviation over
    all sequences c of the batch. The mean over the batch is 0 already.

    Args:
        reward_B: One reward per sequence, in reward units.
        group_B: The group (prompt) of each sequence.
        eps: Numerical guard, in reward units: a spread well below it is treated as none.

    Returns:
        The advantages (in standard deviations) and the metrics `frac_reward_zero_std`,
        `reward_std`, `num_groups`.

    Raises:
        ProxstepError: A group has one sequence, the batch is empty or a reward is not finite.

    Source: arXiv 2501.03262 (version 9), the variant with a baseline; verl 0.9.1's
    `reinforce_plus_plus_baseline`. The paper's equation numbers are not checked.
    Differs: each sequence counts once, as in ms-swift; verl takes mean and deviation over tokens,
    so that long sequences count more and the mean is not 0.
    """
    groups = checked_groups(reward_B, group_B)
    check_pairs("group-centered-batch-scaled", groups)
    centered_B = groups.centered(reward_B)
    std = Groups.whole_batch(group_B).std(centered_B)
    return centered_B / (std + eps), spread_metrics(reward_B, groups)


REINFORCE_PLUS_PLUS = Algorithm(
    "reinforce-plus-plus",
    partial(grpo, aggregation=TOKEN_MEAN),
    level="token",
    idle_at_zero=True,
    about="Token ratios, clipped; advantages normalized over the batch (arXiv 2501.03262).",
    keys=CLIP_KEYS,
    advantage="batch-normalized",
    on_policy="clips nothing",
    source="arXiv 2501.03262, abstract, and verl 0.9.1's examples, which pair both estimators with "
    "PPO's ratio and clip. Which aggregation version 9 has is not checked, and a secondary text "
    "has no clip at all; token-mean is verl's default.",
)
REINFORCE_PLUS_PLUS_BASELINE = dataclasses.replace(
    REINFORCE_PLUS_PLUS,
    name="reinforce-plus-plus-baseline",
    about="REINFORCE++ with the prompt's mean as the baseline (arXiv 2501.03262).",
    advantage="group-centered-batch-scaled",
)

"""MaxRL: REINFORCE whose advantage is the reward over the group's mean, minus 1.

Shapes: B sequences, P groups.
"""

from __future__ import annotations

import dataclasses

from proxstep.algorithms.advantages import advantage, check_pairs, checked_groups, spread_metrics
from proxstep.algorithms.reinforce import REINFORCE
from proxstep.errors import ProxstepError
from proxstep.typing import Float, Int, Tensor


@advantage("maxrl")
def maximum_likelihood(
    reward_B: Float[Tensor, " batch"], group_B: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return each reward's relative distance from its group's mean.

    A_b = (r_b - mean_g) / mean_g; 0 where all rewards of the group are 0.

    For rewards of 0 and 1 it weights a prompt of success rate p like 1 / p: the gradient of
    sum_{k <= n} -(1 - p)^k / k, which is the expected reward for n = 1 and log p, maximum
    likelihood, for n to infinity. One success among n has advantage n - 1, its failures -1.

    Args:
        reward_B: One reward per sequence, 0 or more.
        group_B: The group (prompt) of each sequence.

    Returns:
        The advantages (in mean rewards) and the metrics `frac_reward_zero_std`, `reward_std`,
        `num_groups`.

    Raises:
        ProxstepError: A reward is negative or not finite, a group has one sequence or the batch is
            empty.

    Source: arXiv 2602.02710, algorithm 1 and the estimator with its control variate (labels
    eq:cond-est and eq:final-estimator in its source; the printed numbers are not checked).
    Differs: none. In theory a group without a success keeps its control variate and so the
    estimate its unbiasedness; the paper's algorithm drops it, and so do we. Its authors' code
    divides by mean + 1e-6 instead.

    >>> import torch
    >>> advantage_B, _ = maximum_likelihood(
    ...     torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    ... )
    >>> advantage_B.tolist()
    [3.0, -1.0, -1.0, -1.0, 0.0, 0.0]
    """
    groups = checked_groups(reward_B, group_B)
    check_pairs("maxrl", groups)
    if reward_B.min() < 0:
        raise ProxstepError(
            f"reward_B[{int(reward_B.argmin())}] is {reward_B.min().item():g}, and maxrl divides "
            "by the group's mean reward: rewards must be 0 or more. Shift them, take the penalty "
            "(overlong, KL) out of the reward, or choose another advantage."
        )
    mean_P = groups.mean(reward_B)
    mean_P = mean_P.masked_fill(mean_P == 0, 1.0)  # all rewards are 0, and so is their distance
    return groups.centered(reward_B) / mean_P[groups.index_B], spread_metrics(reward_B, groups)


MAXRL = dataclasses.replace(
    REINFORCE,
    name="maxrl",
    about="REINFORCE on the reward over the prompt's mean (arXiv 2602.02710).",
    advantage="maxrl",
)

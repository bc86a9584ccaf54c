"""Rewards that come with what the reward function measured besides."""

from __future__ import annotations


class MeasuredRewards(list[float]):
    """A reward function's list of B rewards, with other values of each completion.

    To whoever knows only lists it is a list; `score_completions` reports the rest.

    Args:
        rewards: B rewards.
        measured: By name, B values, reported as rewards/FUNCTION/NAME.

    >>> MeasuredRewards([1.0, 0.0], {"ungraded": [0.0, 1.0]})
    [1.0, 0.0]
    """

    def __init__(self, rewards: list[float], measured: dict[str, list[float]]) -> None:
        super().__init__(rewards)
        self.measured = measured

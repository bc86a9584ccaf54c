"""Reward functions: graders, loading by name, weighted sums. Standard library only."""

from proxstep.rewards.answers import boxed_answer, final_number
from proxstep.rewards.functions import (
    MeasuredRewards,
    completion_text,
    exact_match,
    math_verify,
    numeric_answer,
)
from proxstep.rewards.scoring import (
    BUILTIN_REWARDS,
    RewardFunction,
    RewardTable,
    check_rewards,
    load_reward,
    overlong_punishment,
    reward_columns,
    reward_name,
    score_completions,
)

__all__ = [
    "BUILTIN_REWARDS",
    "MeasuredRewards",
    "RewardFunction",
    "RewardTable",
    "boxed_answer",
    "check_rewards",
    "completion_text",
    "exact_match",
    "final_number",
    "load_reward",
    "math_verify",
    "numeric_answer",
    "overlong_punishment",
    "reward_columns",
    "reward_name",
    "score_completions",
]

"""Reward functions: graders, loading by name, weighted sums. Standard library only."""

from proxstep.rewards.boxed import boxed_answer
from proxstep.rewards.functions import completion_text, exact_match, numeric_answer
from proxstep.rewards.mathematics import math_verify
from proxstep.rewards.measured import MeasuredRewards
from proxstep.rewards.numeric import final_number
from proxstep.rewards.overlong import overlong_punishment
from proxstep.rewards.registry import BUILTIN_REWARDS, RewardFunction, load_reward, reward_name
from proxstep.rewards.scoring import RewardTable, check_rewards, score_completions

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
    "reward_name",
    "score_completions",
]

"""Reward functions: graders, loading by name, weighted sums. Standard library only."""

from proxstep.rewards.answers import boxed_answer, final_number, reference_number
from proxstep.rewards.baselines import Baselines, Guess, Narrowness, narrowness
from proxstep.rewards.code_tests import (
    CODE_REWARDS,
    problem_of,
    run_code_tests,
    run_code_tests_without_sandbox,
)
from proxstep.rewards.countdown import countdown
from proxstep.rewards.functions import (
    NOT_A_NUMBER,
    MeasuredRewards,
    completion_text,
    exact_match,
    last_item,
    math_verify,
    numeric_answer,
    stated_answer,
    stated_number,
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
    told_of_truncation,
)

__all__ = [
    "BUILTIN_REWARDS",
    "CODE_REWARDS",
    "NOT_A_NUMBER",
    "Baselines",
    "Guess",
    "MeasuredRewards",
    "Narrowness",
    "RewardFunction",
    "RewardTable",
    "boxed_answer",
    "check_rewards",
    "completion_text",
    "countdown",
    "exact_match",
    "final_number",
    "last_item",
    "load_reward",
    "math_verify",
    "narrowness",
    "numeric_answer",
    "overlong_punishment",
    "problem_of",
    "reference_number",
    "reward_columns",
    "reward_name",
    "run_code_tests",
    "run_code_tests_without_sandbox",
    "score_completions",
    "stated_answer",
    "stated_number",
    "told_of_truncation",
]

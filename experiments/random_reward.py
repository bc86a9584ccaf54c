"""A control: rewards that know nothing. What a policy gains from them is not learned from rewards.

proxstep train recipes/arithmetic.yaml --algorithm reinforce --output_dir runs/control \
      --task.rewards "[exact_match, experiments/random_reward.py:coin]" \
      --task.reward_weights "[0.0, 1.0]"
"""

from __future__ import annotations

import random
from typing import Any


def coin(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Return 0 or 1 at random for each completion, the same for the same batch of completions."""
    del prompts, columns
    draw = random.Random(repr(completions))
    return [float(draw.random() < 0.5) for _ in completions]

"""A recipe's reward functions as verl calls them: for one completion at a time, in its workers."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

from proxstep.rewards import RewardFunction, load_reward, score_completions


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    rewards: list[str],
    weights: list[float],
    **more: Any,
) -> dict[str, float]:
    """Return a completion's reward and its parts, in reward units.

    The names are verl's, and `extra_info` is what `prompt_files` wrote: under "example" the prompt
    and the other columns, as JSON. `rewards` are specifications, with a weight for each.

    Returns:
        "score", the weighted sum, 0 where no function gives a finite number (verl has no place for
        a completion without a reward); "acc", the first function's value, the validation score;
        "invalid_reward", 1 where there was none; and each function's value by its name.
    """
    del data_source, more
    example = json.loads(extra_info["example"])
    prompt = example["prompt"]
    answer: Any = solution_str
    if not isinstance(prompt, str):
        answer = [{"role": "assistant", "content": solution_str}]
    columns = {name: [value] for name, value in example["columns"].items()}
    table = score_completions(
        _functions(tuple(rewards)),
        list(weights),
        [prompt],
        [answer],
        {"answer": [ground_truth], **columns},
    )
    total = table.total[0]
    parts = {name: _number(values[0]) for name, values in table.per_function.items()}
    return {
        "score": total if math.isfinite(total) else 0.0,
        "acc": next(iter(parts.values())),
        "invalid_reward": float(not math.isfinite(total)),
        **{f"rewards/{name}": value for name, value in parts.items()},
    }


def _number(reward: float | None) -> float:
    return reward if reward is not None and math.isfinite(reward) else 0.0


@cache
def _functions(specifications: tuple[str, ...]) -> tuple[RewardFunction, ...]:
    return tuple(load_reward(specification) for specification in specifications)

"""Rewards of a batch from several weighted reward functions."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from proxstep.errors import ProxstepError, did_you_mean
from proxstep.rewards.code_tests import (
    check_run_code_tests,
    run_code_tests,
    run_code_tests_without_sandbox,
)
from proxstep.rewards.countdown import countdown
from proxstep.rewards.functions import (
    MeasuredRewards,
    check_math_verify,
    exact_match,
    last_item,
    math_verify,
    numeric_answer,
    stated_answer,
)
from proxstep.rewards.modules import load_module
from proxstep.rewards.returns import awaited, checked_rewards


class Answered(Protocol):
    """What of an example reward functions receive: its reference answer, and its other columns."""

    @property
    def answer(self) -> str: ...  # noqa: D102

    @property
    def columns(self) -> Mapping[str, Any]: ...  # noqa: D102


class RewardFunction(Protocol):
    """A function from completions to rewards, with TRL's signature; None means "does not apply".

    It may be async, and it may return an array or a tensor.
    """

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        """Return one reward, or None, per completion.

        Args:
            prompts: One per completion.
            completions: Texts, or lists of chat messages.
            **columns: The rows' other columns, a list each.
        """
        ...


BUILTIN_REWARDS: dict[str, RewardFunction] = {
    "numeric_answer": numeric_answer,
    "exact_match": exact_match,
    "stated_answer": stated_answer,
    "last_item": last_item,
    "countdown": countdown,
    "math_verify": math_verify,
    "run_code_tests": run_code_tests,
    "run_code_tests_without_sandbox": run_code_tests_without_sandbox,
}
"""The rewards that a recipe may name, by name."""
# What must hold here before a reward can be used.
_NEEDS = {"math_verify": check_math_verify, "run_code_tests": check_run_code_tests}


def load_reward(spec: str) -> RewardFunction:
    """Return the reward function that a specification names.

    Args:
        spec: A key of `BUILTIN_REWARDS`, or "path/to/file.py:function" (relative to the working
            directory, or absolute), or "package.module:function".

    Returns:
        The function.

    Raises:
        ProxstepError: Nothing of that name exists, it cannot be imported, or it is not callable;
            or what it needs is not there.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in BUILTIN_REWARDS:
            raise ProxstepError(
                f"reward {spec!r} is unknown{did_you_mean(spec, BUILTIN_REWARDS)}; use one of "
                f"{', '.join(BUILTIN_REWARDS)}, or FILE.py:FUNCTION, or PACKAGE.MODULE:FUNCTION"
            )
        _NEEDS.get(spec, lambda: None)()
        return BUILTIN_REWARDS[spec]
    if not place or not name:
        raise ProxstepError(
            f"reward {spec!r} is incomplete; write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"
        )
    module = load_module(place, f"reward {spec!r}")
    function = getattr(module, name, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ProxstepError(
            f"reward {spec!r}: {place} has no function {name!r}{did_you_mean(name, public)}; "
            "name a function that it defines"
        )
    if not callable(function):
        raise ProxstepError(
            f"reward {spec!r} is a {type(function).__name__}; name a function f(prompts, "
            "completions, **columns)"
        )
    return cast(RewardFunction, function)


def reward_name(function: RewardFunction) -> str:
    """Return the name under which a reward function is reported.

    Args:
        function: Any reward function.

    >>> reward_name(numeric_answer)
    'numeric_answer'
    """
    return getattr(function, "__name__", type(function).__name__)


def reward_columns(examples: Sequence[Answered]) -> dict[str, list[Any]]:
    """Return the columns that reward functions receive for a batch of examples.

    Args:
        examples: B examples.

    Returns:
        `answer` and every column of any example, B values each; None where an example lacks it.

    >>> from proxstep.tasks import Example
    >>> reward_columns([Example("1+1=", "2"), Example("2+2=", "4", columns={"level": 1})])
    {'answer': ['2', '4'], 'level': [None, 1]}
    """
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return {"answer": [example.answer for example in examples], **columns}


def apart(value: Any) -> Any:
    """Return a value with lists and dictionaries of its own, down to what is neither.

    Each reward function gets its arguments so: what it changes in them stays its own.

    >>> shared = {"content": "?"}
    >>> [first, second] = apart([shared, shared])
    >>> first == second == shared, first is second or first is shared
    (True, False)
    """
    if isinstance(value, dict):
        return {key: apart(each) for key, each in value.items()}
    return [apart(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class RewardTable:
    """The rewards of B completions.

    Attributes:
        per_function: For each function's name, B rewards; None where the function does not apply.
            After a function's rewards, what else it measured, as FUNCTION/NAME.
        total: B weighted sums over the functions that apply. NaN, which means no reward, where none
            applies or one is not finite.
    """

    per_function: dict[str, list[float | None]]
    total: list[float]


def score_completions(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    prompts: list[Any],
    completions: list[Any],
    columns: dict[str, list[Any]],
    truncated: Sequence[bool] | None = None,
) -> RewardTable:
    """Return every function's rewards and their weighted sum, which leaves None out, as TRL's does.

    Args:
        functions: At least one; each is called as f(prompts=..., completions=..., **columns), with
            lists of its own.
        weights: One finite weight per function.
        prompts: B strings or lists of chat messages.
        completions: B strings or lists of chat messages.
        columns: Further columns by name, B values each.
        truncated: B times whether the completion was cut off at the length limit; None for never.
            It goes to the functions that have a parameter of that name.

    Returns:
        The rewards.

    Raises:
        ProxstepError: The arguments do not fit together, a function does not accept the columns, or
            what it returns, or what is awaited of it, is not B numbers or None.
    """
    names = _checked_names(functions, weights)
    for column, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(completions):
            raise ProxstepError(
                f"column {column!r} has {len(values)} values for {len(completions)} completions; "
                "give one each"
            )
    cut = [False] * len(completions) if truncated is None else list(truncated)
    per_function: dict[str, list[float | None]] = {}
    for name, function in zip(names, functions, strict=True):
        call = _bind(name, function, *apart([prompts, completions, columns, cut]))
        rewards = awaited(function(*call.args, **call.kwargs))
        per_function[name] = checked_rewards(name, rewards, len(completions))
        if isinstance(rewards, MeasuredRewards):
            for key, values in rewards.measured.items():
                per_function[f"{name}/{key}"] = checked_rewards(name, values, len(completions))
    total = [
        _weighted_sum(rewards, weights)
        for rewards in zip(*(per_function[name] for name in names), strict=True)
    ]
    return RewardTable(per_function, total)


def check_rewards(
    functions: Sequence[RewardFunction], weights: Sequence[float], columns: Iterable[str]
) -> None:
    """Refuse reward functions that cannot be called on the data, without calling them.

    Args:
        functions: At least one.
        weights: One finite weight per function.
        columns: Names of the data's columns, besides prompts and completions.

    Raises:
        ProxstepError: The names are not distinct, the weights do not fit, or a function does not
            accept the columns.
    """
    names = _checked_names(functions, weights)
    for name, function in zip(names, functions, strict=True):
        _bind(name, function, [], [], {column: [] for column in columns}, [])


def told_of_truncation(
    reward: Callable[..., list[Any]], max_completion_length: int
) -> Callable[..., list[Any]]:
    """Return a reward function that takes `truncated`, told of it by the completions' lengths.

    Args:
        reward: The function.
        max_completion_length: In tokens. A completion of so many counts as cut off: TRL hands out
            the tokens as `completion_ids`, but not which of them end a completion.

    Returns:
        The function for TRL, under the same name.
    """

    @functools.wraps(reward)
    def told(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[Any]:
        truncated = [len(ids) >= max_completion_length for ids in completion_ids]
        return reward(completion_ids=completion_ids, truncated=truncated, **columns)

    return told


def overlong_punishment(
    lengths: Iterable[int], *, max_length: int, buffer: int, penalty: float = 1.0
) -> list[float]:
    """Return what is added to the reward of each completion for its length.

        0                                             where length <= max_length - buffer
        -penalty (length - max_length + buffer) / buffer   from there to max_length
        -penalty                                      beyond

    A completion that was cut off has max_length tokens, and so the whole penalty.

    Args:
        lengths: Of the completions, in tokens, end token included.
        max_length: Longest allowed completion, in tokens.
        buffer: Tokens before max_length over which the punishment grows; 1 to max_length.
        penalty: The largest punishment, in reward units.

    Returns:
        One number for each completion, from -penalty to 0, in reward units.

    Raises:
        ProxstepError: If the buffer does not lie in 1 to max_length.

    Source: arXiv 2503.14476, equation 13 (L_cache is the buffer); verl's `overlong_buffer`.

    Differs: the equation's largest punishment is 1; verl's `penalty_factor` is `penalty`.

    >>> overlong_punishment([4, 6, 7, 8], max_length=8, buffer=4)
    [0.0, -0.5, -0.75, -1.0]
    """
    if not 1 <= buffer <= max_length:
        raise ProxstepError(
            f"the overlong buffer is {buffer} tokens; it must be 1 to {max_length}, the longest "
            "completion"
        )
    over = (min(max(length - max_length + buffer, 0), buffer) for length in lengths)
    return [-penalty * tokens / buffer if tokens else 0.0 for tokens in over]


def _checked_names(functions: Sequence[RewardFunction], weights: Sequence[float]) -> list[str]:
    """Return the functions' names; raise where they are not distinct or the weights do not fit."""
    if not functions:
        raise ProxstepError(
            "no reward function is given; name at least one, such as numeric_answer"
        )
    if len(weights) != len(functions) or not all(map(math.isfinite, weights)):
        raise ProxstepError(
            f"{len(functions)} reward functions have the weights {list(weights)}; "
            "give one finite weight each"
        )
    names = [reward_name(function) for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise ProxstepError(f"two reward functions are named {name!r}; rename one of them")
    return names


def _bind(
    name: str,
    function: RewardFunction,
    prompts: list[Any],
    completions: list[Any],
    columns: dict[str, list[Any]],
    truncated: list[bool],
) -> inspect.BoundArguments:
    """Return the arguments of one call; raise where the function does not accept them."""
    try:
        signature = inspect.signature(function)
        more = {"truncated": truncated} if "truncated" in signature.parameters else {}
        return signature.bind(prompts=prompts, completions=completions, **columns, **more)
    except (TypeError, ValueError) as error:  # ValueError: a built-in without a signature
        raise ProxstepError(
            f"reward function {name!r} does not accept the data's columns "
            f"({', '.join(columns) or 'none'}): {error}; it must be f(prompts, completions, "
            "**columns)"
        ) from error


def _weighted_sum(rewards: Sequence[float | None], weights: Sequence[float]) -> float:
    """Return the weighted sum over the rewards that are not None, or NaN where it is not finite."""
    terms = [
        weight * reward
        for weight, reward in zip(weights, rewards, strict=True)
        if reward is not None
    ]
    total = sum(terms)
    return total if terms and math.isfinite(total) else math.nan

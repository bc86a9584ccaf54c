"""The guard's verdict on histories that are made by hand."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from proxstep.runs.guard import Series, after_returns, signs, verdict

STEPS = 20


def history(steps: int = STEPS, *, noise: float = 0.02, seed: int = 0, **fields: Any) -> list[Any]:
    """A run's rows: each field goes in a straight line from its first value to its last.

    Fields that are not given are those of a run that learns.
    """
    learning: dict[str, Any] = {
        "reward": (0.3, 0.6),
        "reward_std": (0.3, 0.3),
        "entropy": (0.5, 0.25),
        "grad_norm": (1.0, 0.8),
        "frac_reward_zero_std": (0.3, 0.4),
        "completions_clipped_ratio": (0.0, 0.0),
        "learning_rate": (1e-3, 1e-3),
    }
    draw = random.Random(seed)
    rows: list[Any] = [{"step": 0, "score": 0.3, "kl_initial_policy": 0.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "score": None, "num_sequences": 128 * step}
        for name, (first, last) in {**learning, **fields}.items():
            value = first + (last - first) * (step - 1) / (steps - 1)
            row[name] = value * (1 + draw.gauss(0, noise))
        if step % 4 == 0 and "score" not in fields:
            row["score"] = 0.3 + 0.3 * step / steps
        rows.append(row)
    return rows


def jump(rows: list[Any], at: int, **values: float) -> list[Any]:
    """The same rows, with other values from a step on."""
    return [{**row, **values} if row["step"] >= at else row for row in rows]


def test_a_run_that_learns() -> None:
    found = verdict(history())
    assert (found.state, found.remedy, found.step) == ("learning", "", STEPS)
    assert "the reward went from 0.3" in found.reason
    assert "the validation score from 0.3 to 0.6" in found.reason


def test_a_run_that_has_learned_all_is_no_collapse() -> None:
    """Low entropy, equal rewards and small gradients together are what success looks like."""
    rows = history(reward=(0.3, 1.0), entropy=(0.5, 0.01), grad_norm=(1.0, 0.01))
    rows = jump(rows, 12, frac_reward_zero_std=1.0, reward=1.0, entropy=0.01)
    assert {sign.kind for sign in signs(rows)} == {"entropy", "equal"}
    assert verdict(rows).state == "learning"


def test_too_large_steps() -> None:
    rows = jump(history(), 10, reward=0.02, entropy=2.1, grad_norm=9.0)
    found = verdict(rows)
    assert found.state == "collapsing"
    assert "the reward fell from 0.4" in found.reason
    assert " to 2.1 nats a token in 19 steps" in found.reason
    assert "lower optimizer.learning_rate to a third (it was 0.001" in found.remedy
    assert "or set update.kl_budget" in found.remedy
    budget = {"kl_budget/predicted": 0.1, "kl_budget/scale": 0.5}
    assert "halve update.kl_budget" in verdict(jump(rows, 1, **budget)).remedy
    loose = verdict(jump(rows, 1, **budget | {"kl_budget/scale": 1.0})).remedy
    assert loose.endswith("lower optimizer.learning_rate to a third (it was 0.001 at most)")


def test_the_rate_that_is_lowered_is_the_peak_and_not_what_a_schedule_ends_with() -> None:
    rows = history(reward=(0.3, 0.3), learning_rate=(1e-3, 0.0), noise=0.0)
    found = verdict(jump(rows, 15, reward=0.0, entropy=2.0))
    assert "to a third (it was 0.001 at most)" in found.remedy


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"entropy": 0.05, "reward": 0.0}, "optimizer.learning_rate"),
        ({"grad_norm": 9.0, "reward": 0.0}, "optimizer.learning_rate"),
        ({"kl_initial_policy": 3.0, "reward": 0.0}, "optimizer.learning_rate"),
        ({"objective/kl_old_policy": 0.5, "reward": 0.0}, "the old policy is too old"),
        ({"score": 0.02, "entropy": 0.05}, "not what the score grades"),
        ({"score": 0.02, "frac_reward_zero_std": 0.99}, "learned by heart"),
        ({"completions_clipped_ratio": 0.9, "reward": 0.0}, "rollout.overlong_buffer"),
        ({"geometry/ntk_effective_rank": 1.1, "reward": 0.0}, "optimizer.learning_rate"),
        ({"geometry/max_grad_share": 0.95, "reward": 0.0}, "optimizer.learning_rate"),
        ({"geometry/noise_scale": 9e5, "reward": 0.0}, "optimizer.learning_rate"),
        ({"kl_budget/realized": 0.9, "reward": 0.0}, "halve update.kl_budget"),
    ],
)
def test_every_pair_of_signs_has_its_remedy(values: dict[str, float], remedy: str) -> None:
    whole = {"geometry/ntk_effective_rank": 12.0, "objective/kl_old_policy": 0.001}
    whole |= {"geometry/max_grad_share": 0.2, "geometry/noise_scale": 300.0}
    if "kl_budget/realized" in values:
        whole |= {"kl_budget/predicted": 0.1, "kl_budget/scale": 0.5, "kl_budget/realized": 0.03}
    rows = jump(history(), 1, **whole)
    assert verdict(rows).state == "learning"
    found = verdict(jump(rows, 14, **values))
    assert found.state == "collapsing"
    assert remedy in found.remedy


def test_a_sudden_collapse_is_none_of_the_score_alone() -> None:
    """One evaluation is a sign, and three rewards: at the first alarm the newest one must do."""
    rows = jump(history(), 16, reward=0.0, score=0.02, kl_initial_policy=3.0)[:17]
    assert {sign.kind for sign in signs(rows)} == {"score", "drift"}
    assert verdict(rows).remedy.startswith("the steps are too large; lower ")


def test_a_wrong_sign_is_named_first_where_all_rewards_are_equal_as_well() -> None:
    rows = history(reward=(-0.3, 0.0))
    rows = jump(rows, 10, reward=0.0, score=0.0, frac_reward_zero_std=1.0, kl_initial_policy=1.0)
    remedy = verdict(rows).remedy
    assert 0 < remedy.index("the sign of rewards/") < remedy.index("learned by heart")


def test_rewards_that_neither_rise_nor_fall_are_first_of_all_those_of_another_policy() -> None:
    rows = jump(history(reward=(0.3, 0.3)), 10, score=0.0, kl_initial_policy=1.0)
    remedy = verdict(rows).remedy
    assert remedy.startswith("the completions are not the newest policy's, or the steps are too")
    assert "lower optimizer.learning_rate" in remedy
    assert "the sign of rewards/" in remedy


def test_an_entropy_that_rises_is_no_harm_where_reward_and_score_rise() -> None:
    """A policy that begins narrow and learns to look around."""
    rows = history(reward=(0.3, 0.8), entropy=(0.05, 0.17))
    rows = jump(rows, 15, kl_initial_policy=0.6)
    assert {sign.kind for sign in signs(rows)} == {"entropy", "drift"}
    assert verdict(rows).state == "learning"
    assert verdict(jump(rows, 20, score=0.25)).state == "collapsing"
    assert verdict(history(reward=(0.3, 0.3), entropy=(0.05, 0.17))).state == "not learning"


def scored(scores: Sequence[float], error: float | None = None) -> list[Any]:
    """The rows of a run that is evaluated at every fifth step, far from the initial policy."""
    rows = jump(history(score=(0.0, 0.0)), 0, score=math.nan, kl_initial_policy=0.6)
    for place, score in enumerate(scores):
        rows[5 * place] |= {"score": score, "score_standard_error": error}
    return rows


def test_a_few_prompts_of_the_validation_are_no_collapse() -> None:
    few = [4 / 128, 5 / 128, 6 / 128, 3 / 128]
    assert verdict(scored(few, error=0.018)).state == "learning"
    assert verdict(scored([100 * s for s in few], error=0.018)).state == "collapsing"


def test_scores_below_0_are_held_against_the_lowest() -> None:
    assert verdict(scored([-0.4, -0.3, -0.1, -1.0])).state == "collapsing"
    assert verdict(scored([-0.4, -0.3, -0.1, -0.2])).state == "learning"
    assert verdict(scored([0.3, 0.4, 0.5, 0.3])).state == "learning"
    assert verdict(scored([0.3, 0.4, 0.5, 0.2])).state == "collapsing"


@pytest.mark.parametrize(
    "values",
    [{"reward": 0.0}, {"entropy": 0.01}, {"grad_norm": 50.0}, {"kl_initial_policy": 3.0}],
)
def test_one_sign_alone_is_no_collapse(values: dict[str, float]) -> None:
    rows = jump(history(), 14, **values)
    assert len(signs(rows)) == 1
    assert verdict(rows).state != "collapsing"


def test_two_bad_steps_are_no_collapse_and_three_are() -> None:
    bad = {"reward": 0.0, "grad_norm": 9.0}
    rows = jump(history(), STEPS - 1, **bad)
    assert signs(rows) == []
    assert verdict(jump(history(), STEPS - 2, **bad)).state == "collapsing"
    assert {sign.kind for sign in signs(rows, window=1)} == {"reward", "gradient"}


def test_a_collapse_in_the_first_step_is_seen() -> None:
    rows = jump(history(), 2, reward=0.0, entropy=3.0)[:5]
    assert verdict(rows).state == "collapsing"


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_sign(seed: int) -> None:
    """Rewards that scatter by 15 % a step around one level."""
    rows = history(60, noise=0.15, seed=seed, reward=(0.3, 0.3))
    for end in range(2, len(rows)):
        assert verdict(rows[:end]).state != "collapsing"


def plateau(num_prompts: int, steps: int, seed: int, **fields: float) -> list[Any]:
    """A run's rows: rewards are 0 or 1, the mean rises to 0.6 in a fifth of the steps and stays."""
    draw = random.Random(seed)
    rows: list[Any] = [{"step": 0, "kl_initial_policy": 0.0}]
    for step in range(1, steps + 1):
        level = 0.3 + 0.3 * min(1.0, 5 * step / steps)
        chances = [draw.betavariate(level, 1 - level) for _ in range(num_prompts)]
        rewards = [statistics.mean(draw.random() < p for _ in range(8)) for p in chances]
        spreads = [math.sqrt(mean * (1 - mean) * 8 / 7) for mean in rewards]
        row = {"step": step, "entropy": 0.5, **(fields if 5 * step > steps else {})}
        row |= {"reward": statistics.mean(rewards), "reward_std": statistics.mean(spreads)}
        rows.append(row)
    return rows


@pytest.mark.parametrize("num_prompts", [8, 16, 64])
@pytest.mark.parametrize("field", [{"entropy": 0.12}, {"kl_initial_policy": 0.8}])
def test_a_long_healthy_run_gives_hardly_an_alarm(
    num_prompts: int, field: dict[str, float]
) -> None:
    """One sign is there for good; of hundreds of rewards some are low by chance."""
    rows = plateau(num_prompts, 400, seed=1, **field)
    states = [verdict(rows[:end]).state for end in range(100, len(rows) + 1)]
    assert states.count("collapsing") <= 3


def test_a_long_run_that_collapses_gives_one() -> None:
    rows = jump(plateau(16, 400, seed=1, kl_initial_policy=0.8), 390, reward=0.1)
    assert verdict(rows[:393]).state == "collapsing"


@pytest.mark.parametrize("shift", [-5.0, 3.0])
def test_rewards_of_any_origin(shift: float) -> None:
    rows = jump(history(), 14, reward=0.0, grad_norm=9.0)
    for row in rows[1:]:
        row["reward"] += shift
    assert verdict(rows).state == "collapsing"


@pytest.mark.parametrize(
    ("rows", "reason", "remedy"),
    [
        ([], "0 steps are too few", ""),
        (history()[:4], "3 steps are too few", ""),
        (
            history(reward=(0.0, 0.0), frac_reward_zero_std=(0.97, 0.97)),
            "in 97% of the groups all rewards are equal",
            "neither too easy nor too hard",
        ),
        (
            jump(history(reward=(0.3, 0.3)), 1, kl_initial_policy=1e-5),
            "1e-05 nats a token from the initial one",
            "float32",
        ),
        (
            history(reward=(0.3, 0.3), **{"geometry/noise_scale": (9e5, 9e5)}),
            "completions, and a step has 128",
            "rollout.num_prompts",
        ),
        (history(reward=(0.3, 0.3)), "a step's noise is 0.0", "more rollout.num_prompts"),
        (
            jump(history(), 20, score=0.1),
            "the validation score fell from 0.54 to 0.1, and the reward went from",
            "not what the score grades",
        ),
    ],
    ids=["nothing", "short", "equal", "still", "noisy", "noise", "other score"],
)
def test_not_learning_and_why(rows: Sequence[Any], reason: str, remedy: str) -> None:
    found = verdict(rows)
    assert found.state == "not learning"
    assert reason in found.reason
    assert remedy in found.remedy
    assert str(found).startswith(f"not learning: {found.reason}")


def test_rewards_whose_spread_nobody_measured_can_fall_too() -> None:
    """As in the rows of verl."""
    rows = [{k: v for k, v in row.items() if k != "reward_std"} for row in history()]
    assert verdict(jump(rows, 14, entropy=0.05)).state == "learning"
    assert verdict(jump(rows, 14, entropy=0.05, reward=0.42)).state == "learning"
    found = verdict(jump(rows, 14, entropy=0.05, reward=0.2))
    assert found.state == "collapsing"
    assert "the reward fell from 0.4" in found.reason


def test_rewards_that_are_missing_for_three_steps_are_told() -> None:
    missing: dict[str, Any] = {"reward": None, "skipped": 1, "frac_invalid_reward": 1.0}
    assert verdict(jump(history(), STEPS - 1, **missing)).state == "learning"
    found = verdict(jump(history(), STEPS - 2, **missing))
    assert str(found).startswith(f"not learning: no reward since step {STEPS - 2}: look at rewards")


def test_what_is_not_finite_or_missing_is_left_out() -> None:
    rows = history()
    rows[5]["reward"], rows[6]["reward"], rows[7]["grad_norm"] = math.nan, None, math.inf
    assert verdict(rows).state == "learning"
    assert len(Series.of(rows, "reward").values) == STEPS - 2


def test_a_long_run_is_held_against_its_beginning_and_its_last_hundreds_of_steps() -> None:
    rows = history(2_000, reward=(0.6, 0.6), entropy=(0.3, 0.3))
    rows = [row | {"entropy": 0.5} if row["step"] == 1 else row for row in rows]
    assert verdict(jump(rows, 1_990, reward=0.0, entropy=0.1)).state == "collapsing"
    assert signs(jump(rows, 1_990, entropy=0.9)) == []


def test_the_noise_is_that_of_one_value() -> None:
    draw = random.Random(0)
    values = tuple(0.01 * i + draw.gauss(0, 0.3) for i in range(4_000))
    assert Series(values).noise == pytest.approx(0.3, rel=0.1)
    assert Series(()).noise == 0.0


def test_what_was_undone_is_not_judged() -> None:
    rows = jump(history(), 10, reward=0.0, entropy=3.0)
    kept = after_returns(rows, [{"from": 15, "to": 9}])
    assert [row["step"] for row in kept] == [*range(10), *range(16, STEPS + 1)]

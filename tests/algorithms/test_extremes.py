"""Bad input and numerical extremes, for every objective: an error that says why, or a counted skip.

What must hold in any case: the parameters stay finite, and are the same to the bit where there was
nothing to learn. A step with nothing left to learn from is skipped, so that not even momentum
moves them. A step whose gradient is zero, as that of equal rewards, is an ordinary one: on a fresh
optimizer it moves nothing, while momentum from before would.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import made_trainer, with_reward
from tests.selection import slow

from proxstep.algorithms import ALGORITHMS
from proxstep.errors import ProxstepError
from proxstep.training import sampler
from proxstep.training.generation import sample
from proxstep.training.rollout import Completions
from proxstep.training.trainer import Trainer

EVERY = [*ALGORITHMS, "isopo+opo"]
SOME = ["reinforce", "grpo", "gspo", "dapo", "cispo", "dro", "opo", "isopo+opo"]
"""Where the trainer alone decides what happens."""
FEW = ["reinforce", "gspo", "isopo+opo"]
"""One of each kind of loss: without a ratio, with one, and under a geometry."""
TWICE = {"num_minibatches": 2}
SMALL = {"num_prompts": 2, "num_generations": 4, "max_completion_length": 3}
Reward = Callable[..., list[Any]]


def fast_few(names: list[str]) -> list[Any]:
    return [*FEW, *slow(*(name for name in names if name not in FEW))]


def graded(value: Callable[[int], Any]) -> Reward:
    """A reward function of a completion's number in its batch."""
    return lambda prompts, completions, **columns: [value(i) for i in range(len(prompts))]


spread = graded(lambda index: float(index % 3))


def trainer(folder: Path, algorithm: str, **changes: Any) -> Trainer:
    changes = {"update": TWICE, "rollout": SMALL, **changes}
    return made_trainer(folder, algorithm, **changes)


def state(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def check_finite(made: Trainer, record: dict[str, Any]) -> None:
    """Parameters, and everything that was measured."""
    assert all(value.isfinite().all() for value in made.model.state_dict().values())
    assert all(math.isfinite(value) for value in record.values() if value is not None)


def unchanged(made: Trainer, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def check_skipped(made: Trainer) -> dict[str, Any]:
    """Take a step that must be skipped, on an optimizer that has momentum."""
    before, optimizer = state(made), copy.deepcopy(made.optimizer.state_dict())
    updates, rate = made.num_updates, made.schedule.get_last_lr()
    assert updates > 0
    record = made._train_step()
    assert record["skipped"] == 1
    assert "grad_norm" not in record
    assert made.num_updates == updates
    assert made.schedule.get_last_lr() == rate
    assert unchanged(made, before)
    for number, slots in made.optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, optimizer["state"][number][name])
    return record


def cut(monkeypatch: pytest.MonkeyPatch, change: Callable[[Completions], Completions]) -> None:
    """Change what is sampled from now on."""
    monkeypatch.setattr(sampler, "sample", lambda *a, **options: change(sample(*a, **options)))


# Rewards


UNUSABLE = {
    "none": lambda index: None,
    "nan": lambda index: math.nan,
    "inf": lambda index: math.inf,
    "minus inf": lambda index: -math.inf,
    "beyond float32": lambda index: 1e300 * (-1) ** index,
    "one a group": lambda index: 1.0 if index % 4 == 0 else None,
    "an integer beyond floats": lambda index: 10**400,
}


@pytest.mark.parametrize("algorithm", fast_few(SOME))
def test_rewards_that_are_no_numbers_skip_the_step(tmp_path: Path, algorithm: str) -> None:
    made = with_reward(trainer(tmp_path, algorithm), spread)
    assert made._train_step()["skipped"] == 0
    for name, value in UNUSABLE.items():
        record = check_skipped(with_reward(made, graded(value)))
        invalid = 0.75 if name == "one a group" else 1.0
        assert record["frac_invalid_reward"] == invalid, name
    before = state(made)
    record = with_reward(made, spread)._train_step()
    assert record["skipped"] == 0
    assert not unchanged(made, before)
    check_finite(made, record)


def test_one_completion_left_in_all_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    alone = {"num_prompts": 8, "num_generations": 1, "max_completion_length": 3}
    objective = {"advantage": "batch-normalized"}
    made = trainer(tmp_path, "reinforce", rollout=alone, objective=objective)
    with_reward(made, spread)
    made._train_step()
    with_reward(made, graded(lambda index: 1.0 if index == 0 else None))
    check_skipped(made)


@pytest.mark.parametrize("algorithm", EVERY)
def test_a_few_of_them_are_left_out(tmp_path: Path, algorithm: str) -> None:
    """The last completion of each group has none; each group's is missing in a way of its own."""
    bad = (None, math.nan, math.inf, -math.inf, 1e300, 10**400)
    reward = graded(lambda index: bad[index // 4] if index % 4 == 3 else float(index % 4))
    made = trainer(tmp_path, algorithm, rollout={**SMALL, "num_prompts": len(bad)})
    before = state(with_reward(made, reward))
    record = made._train_step()
    assert record["skipped"] == 0
    assert record["frac_invalid_reward"] == 0.25
    assert record["reward"] == 1.0
    check_finite(made, record)
    assert not unchanged(made, before)


@pytest.mark.parametrize("algorithm", fast_few(EVERY))
def test_equal_rewards_move_nothing(tmp_path: Path, algorithm: str) -> None:
    made = trainer(tmp_path, algorithm, update={**TWICE, "num_iterations": 2})
    before = state(made)
    for number, value in enumerate((0.1, 1e30 if algorithm == "maxrl" else -1e30)):
        record = with_reward(made, graded(lambda index, value=value: value))._train_step()
        assert record["skipped"] == 0
        assert record["frac_reward_zero_std"] == 1.0
        assert record["grad_norm"] == 0.0
        assert made.num_updates == 4 * (number + 1)
        assert unchanged(made, before)


@pytest.mark.parametrize("algorithm", fast_few(SOME))
def test_rewards_of_any_size(tmp_path: Path, algorithm: str) -> None:
    """The default advantages do not depend on it, down to where their guard sees no spread."""
    ranges = []
    for size in (1e-30, 1.0, 1e30):
        made = trainer(tmp_path / str(size), algorithm)
        record = with_reward(made, graded(lambda index, s=size: s * (index % 4)))._train_step()
        assert record["skipped"] == 0
        check_finite(made, record)
        ranges.append(record["advantage_range"])
    assert ranges[0] < 1e-20
    assert ranges[2] == pytest.approx(ranges[1], rel=1e-4)


@pytest.mark.parametrize("returned", ["text", [1.0], [1j] * 8, [[1.0]] * 8])
def test_what_is_no_list_of_numbers_is_an_error(tmp_path: Path, returned: Any) -> None:
    made = with_reward(trainer(tmp_path, "grpo"), lambda prompts, completions, **columns: returned)
    before = state(made)
    with pytest.raises(ProxstepError, match=r"^reward function '<lambda>' returned "):
        made._train_step()
    assert unchanged(made, before)


# Completions


@pytest.mark.parametrize("algorithm", SOME)
def test_completions_of_one_token(tmp_path: Path, algorithm: str) -> None:
    rollout = {**SMALL, "max_completion_length": 1}
    made = with_reward(trainer(tmp_path, algorithm, rollout=rollout), spread)
    before = state(made)
    record = made._train_step()
    assert record["completions_max_length"] == 1
    check_finite(made, record)
    assert not unchanged(made, before)


@pytest.mark.parametrize("algorithm", SOME)
def test_empty_completions(tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token at once: a text without a character, of one token."""
    texts: list[str] = []

    def watched(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        texts.extend(completions)
        return spread(prompts=prompts, completions=completions)

    made = with_reward(trainer(tmp_path, algorithm), watched)

    def emptied(drawn: Completions) -> Completions:
        column = drawn.response_BT.int().argmax(dim=1, keepdim=True)
        first = torch.zeros_like(drawn.response_BT).scatter(1, column, True)
        return dataclasses.replace(
            drawn,
            token_BT=drawn.token_BT.masked_fill(first, made.tokenizer.eos_token_id),
            attention_BT=drawn.attention_BT & (~drawn.response_BT | first),
            response_BT=first,
            truncated_B=torch.zeros_like(drawn.truncated_B),
        )

    cut(monkeypatch, emptied)
    record = made._train_step()
    assert texts == [""] * 8
    assert record["completions_mean_length"] == 1.0
    check_finite(made, record)


@pytest.mark.parametrize("algorithm", SOME)
def test_truncated_completions(
    tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them: an ordinary step unless they are masked, then a skip."""
    made = with_reward(trainer(tmp_path, algorithm), spread)

    def truncated(drawn: Completions) -> Completions:
        return dataclasses.replace(drawn, truncated_B=torch.ones_like(drawn.truncated_B))

    cut(monkeypatch, truncated)
    record = made._train_step()
    assert record["skipped"] == 0
    assert record["completions_clipped_ratio"] == 1.0
    check_finite(made, record)
    masked = made.recipe.rollout.model_copy(update={"mask_truncated_completions": True})
    made.recipe = made.recipe.model_copy(update={"rollout": masked})
    record = check_skipped(made)
    assert record["frac_masked_completions"] == 1.0


@pytest.mark.parametrize("algorithm", SOME)
def test_a_minibatch_whose_completions_are_all_masked(
    tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none: minibatches are made of what is left."""
    rollout = {**SMALL, "mask_truncated_completions": True}
    made = with_reward(trainer(tmp_path, algorithm, rollout=rollout), spread)

    def in_the_last_group(drawn: Completions) -> Completions:
        return dataclasses.replace(drawn, truncated_B=torch.arange(8) < 4)

    cut(monkeypatch, in_the_last_group)
    record = made._train_step()
    assert record["skipped"] == 0
    assert made.num_updates == 1  # one group is one minibatch
    check_finite(made, record)

"""DAPO's mechanisms of the rollout: dynamic sampling, overlong shaping and masking."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import (
    Silent,
    assert_same_records,
    collected,
    made_trainer,
    tiny_recipe,
    with_reward,
)
from tests.selection import slow

from proxstep.config.loading import load_recipe
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import lifecycle
from proxstep.training.batch import Batch, informative_groups
from proxstep.training.prompts import Prompts, batch_rows
from proxstep.training.rollout import Completions, joined
from proxstep.training.trainer import Trainer

PROMPTS, GENERATIONS = 4, 4


def differs(prompt: str) -> bool:
    """Whether the completions of a prompt get different rewards in these tests."""
    return sum(map(ord, prompt)) % 3 == 0


def some_differ(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(i % 2) if differs(prompt) else 0.5 for i, prompt in enumerate(prompts)]


def by_index(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(i % 3) for i in range(len(prompts))]


def all_equal(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.5] * len(prompts)


REWARD_FILE = """
def some_differ(prompts, completions, **columns):
    return [
        float(sum(map(ord, completion)) % 7) if sum(map(ord, prompt)) % 3 == 0 else 0.5
        for prompt, completion in zip(prompts, completions)
    ]
"""


def rollout(**changes: Any) -> dict[str, Any]:
    return {"num_prompts": PROMPTS, "num_generations": GENERATIONS, **changes}


def prompts_of(made: Trainer, batch: Batch) -> list[str]:
    """Each group's prompt, in order."""
    grid = batch.completions
    is_prompt_BT = grid.attention_BT & ~grid.response_BT
    found = []
    for group in batch.group_B.unique():
        texts = {
            made.tokenizer.decode(grid.token_BT[row][is_prompt_BT[row]])
            for row in (batch.group_B == group).nonzero().flatten()
        }
        assert len(texts) == 1
        found += texts
    return found


def in_order(made: Trainer, first_batch: int, num_batches: int) -> list[str]:
    """The prompts that these batches draw."""
    examples, recipe = made.train_prompts.examples, made.recipe
    rows = [
        row
        for batch in range(first_batch, first_batch + num_batches)
        for row in batch_rows(len(examples), recipe.rollout.num_prompts, batch, recipe.seed)
    ]
    return [str(examples[row].prompt) for row in rows]


# Dynamic sampling


@pytest.mark.parametrize("first_batch", [0, 1, 7, 100])
def test_a_step_learns_from_the_first_prompts_whose_rewards_differ(
    tmp_path: Path, first_batch: int
) -> None:
    made = made_trainer(tmp_path, rollout=rollout(dynamic_sampling_max_batches=20))
    batch, measured = collected(with_reward(made, some_differ), first_batch)
    assert batch is not None
    number, drawn = 0, []
    while sum(map(differs, drawn)) < PROMPTS:
        number += 1
        drawn = in_order(made, first_batch, number)
    informative = [prompt for prompt in drawn if differs(prompt)]
    assert prompts_of(made, batch) == informative[:PROMPTS]
    assert len(batch) == PROMPTS * GENERATIONS
    assert (batch.signal_B.abs() > 0.1).all()
    assert number > 1
    assert measured["generation_batches"] == number
    assert measured["frac_informative_groups"] == len(informative) / len(drawn)
    assert measured["frac_reward_zero_std"] == 0.0
    of_all = [reward for p in drawn for reward in some_differ([p] * GENERATIONS, [])]
    assert measured["reward"] == pytest.approx(sum(of_all) / len(of_all))


def test_without_it_one_batch_is_taken_as_it_is(tmp_path: Path) -> None:
    made = made_trainer(tmp_path, rollout=rollout())
    batch, measured = collected(with_reward(made, some_differ))
    assert batch is not None
    drawn = in_order(made, 0, 1)
    assert prompts_of(made, batch) == drawn
    assert measured["generation_batches"] == 1
    assert measured["frac_informative_groups"] == sum(map(differs, drawn)) / PROMPTS


@pytest.mark.parametrize(
    ("num_prompts", "num_generations"), [(4, 2), (4, 8), (2, 4), (3, 4), (5, 3), (16, 2)]
)
def test_a_resumed_run_with_batches_of_another_size_goes_on_with_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_prompts: int, num_generations: int
) -> None:
    """It took those that as many of the new batches would have come to."""
    drawn: list[int] = []
    tokens = Prompts.tokens

    def watched(self: Prompts, row: int) -> list[int]:
        drawn.append(row)
        return tokens(self, row)

    before = made_trainer(tmp_path)
    changed = {"num_prompts": num_prompts, "num_generations": num_generations}
    after = made_trainer(tmp_path, rollout=changed)
    monkeypatch.setattr(Prompts, "tokens", watched)
    for _ in range(3):
        before._train_step()
    after.restore(before._state())
    for _ in range(2):
        after._train_step()
    number = 3 * 4 + 2 * num_prompts
    assert drawn == batch_rows(len(after.train_prompts), number, 0, after.recipe.seed)
    assert after.num_sequences == 3 * 16 + 2 * num_prompts * num_generations


def test_no_prompt_is_drawn_twice_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def watched(num_rows: int, num_per_batch: int, batch: int, seed: int) -> list[int]:
        drawn.append(batch)
        return batch_rows(num_rows, num_per_batch, batch, seed)

    monkeypatch.setattr("proxstep.training.batch.batch_rows", watched)
    made = made_trainer(tmp_path, rollout=rollout(dynamic_sampling_max_batches=8))
    with_reward(made, some_differ)
    batches = sum(made._train_step()["generation_batches"] for _ in range(4))
    assert batches > 4
    assert drawn == list(range(batches))
    assert made.num_sequences == batches * PROMPTS * GENERATIONS


def test_a_step_learns_from_what_there_is_and_says_so_once(tmp_path: Path) -> None:
    made = made_trainer(
        tmp_path, rollout=rollout(dynamic_sampling_max_batches=2), update={"num_minibatches": 4}
    )
    with_reward(made, some_differ)
    taken = [made._train_step() for _ in range(5)]
    assert {record["generation_batches"] for record in taken} == {2}
    found = [round(record["frac_informative_groups"] * 2 * PROMPTS) for record in taken]
    assert 0 == min(found) < max(found) < PROMPTS
    assert [record["skipped"] for record in taken] == [int(number == 0) for number in found]
    assert made.num_updates == sum(found)  # a minibatch has at least one group
    assert isinstance(made.progress, Silent)
    note, *others = made.progress.notes
    assert all("were cut off" in other for other in others)
    assert note.startswith(f"generation batches: 2, prompts whose rewards differ: {found[0]} ")
    assert ("the step learns from those alone" if found[0] else "the step is skipped") in note
    assert "raise rollout.dynamic_sampling_max_batches" in note


def test_a_step_without_any_such_prompt_changes_nothing(tmp_path: Path) -> None:
    made = made_trainer(tmp_path, rollout=rollout(dynamic_sampling_max_batches=3))
    with_reward(made, some_differ)._train_step()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    record = with_reward(made, all_equal)._train_step()
    assert record["skipped"] == 1
    assert record["frac_informative_groups"] == 0.0
    assert record["generation_batches"] == 3
    assert "grad_norm" not in record
    assert made.num_updates == 1
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_groups_are_judged_by_their_finite_rewards() -> None:
    nan, inf = float("nan"), float("inf")
    reward = torch.tensor(
        [1.0, 1.0, 0.0, 1.0, nan, 1.0, nan, nan, inf, 2.0, 0.1 + 0.2, 0.3, 1.0, nan, 2.0],
        dtype=torch.float64,
    )
    group = torch.tensor([5, 5, 9, 9, 2, 2, 3, 3, 4, 4, 6, 6, 7, 7, 7])
    assert informative_groups(reward, group).tolist() == [7, 9]
    assert informative_groups(reward[6:8], group[6:8]).tolist() == []


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["dapo", *slow("isopo")])
def test_resuming_repeats_the_run_to_the_bit(tmp_path: Path, algorithm: str) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD_FILE)
    changes: dict[str, Any] = {
        "steps": 4,
        "task": {"rewards": [f"{reward}:some_differ"]},
        "rollout": rollout(
            dynamic_sampling_max_batches=6,
            mask_truncated_completions=True,
            overlong_buffer=2,
            max_completion_length=6,
        ),
        "update": {"num_minibatches": 2},
        "regularizer": {"kl_coef": 0.2, "kl_in": "reward", "kl_estimator": "k1"},
        "logging": {"checkpoint_every": 2},
        "evaluation": {"every": 4, "num_probe_prompts": 3},
    }

    class Killed(Silent):
        def record(self, record: Any) -> None:
            if record["step"] == 3:
                raise KeyboardInterrupt

    lifecycle.train(tiny_recipe(tmp_path / "whole", algorithm, **changes), Silent())
    cut = tiny_recipe(tmp_path / "cut", algorithm, **changes)
    assert lifecycle.train(cut, Killed()) == "interrupted"
    assert lifecycle.resume(tmp_path / "cut", Silent()) == "finished"
    first, second = records(tmp_path / "whole"), records(tmp_path / "cut")
    assert len(first) == len(second) == 5
    assert max(record["generation_batches"] for record in first[1:3]) > 1
    assert any(record["frac_masked_completions"] for record in first[1:])
    assert_same_records(first, second)
    a, b = (
        load_file(latest_checkpoint(tmp_path / name) / "model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def grid(width: int, longest: int, seed: int) -> Completions:
    """Three completions, with a log-probability for each token that names its place."""
    generator = torch.Generator().manual_seed(seed)
    column, row = torch.arange(width + longest), torch.arange(3)[:, None]
    prompt = torch.randint(1, width + 1, (3, 1), generator=generator)
    length = torch.randint(1, longest + 1, (3, 1), generator=generator)
    prompt[0], length[0] = width, longest
    response = (column >= width) & (column < width + length)
    drawn = (100.0 * row + column - width).masked_fill(~response, 0.0)
    return Completions(
        torch.randint(1, 9, (3, width + longest), generator=generator),
        response | ((column < width) & (column >= width - prompt)),
        response,
        length[:, 0] == longest,
        drawn[:, 1:],
    )


@pytest.mark.parametrize("sizes", [[(3, 4)], [(3, 4), (5, 2)], [(1, 6), (4, 1), (2, 3)]])
def test_batches_of_different_widths_become_one_grid(sizes: list[tuple[int, int]]) -> None:
    parts = [grid(width, longest, seed) for seed, (width, longest) in enumerate(sizes)]
    whole = joined(parts, pad_token=0)
    assert len(whole) == 3 * len(parts)
    start = max(width for width, _ in sizes)
    assert whole.token_BT.shape[1] == start + max(longest for _, longest in sizes)
    assert whole.sampler_log_prob_BT is not None
    for number, part in enumerate(parts):
        rows = whole.rows(torch.arange(3 * number, 3 * number + 3))
        assert torch.equal(rows.truncated_B, part.truncated_B)
        assert part.sampler_log_prob_BT is not None
        assert rows.sampler_log_prob_BT is not None
        for row in range(3):
            for mask in ("attention_BT", "response_BT"):
                ours, theirs = getattr(rows, mask)[row], getattr(part, mask)[row]
                assert torch.equal(rows.token_BT[row][ours], part.token_BT[row][theirs])
            assert rows.response_BT[row].nonzero()[0] == start
            ours, theirs = rows.response_BT[row, 1:], part.response_BT[row, 1:]
            assert torch.equal(
                rows.sampler_log_prob_BT[row][ours], part.sampler_log_prob_BT[row][theirs]
            )
        assert (rows.token_BT[:, : start - sizes[number][0]] == 0).all()


# Overlong shaping and masking


def uneven(made: Trainer) -> Trainer:
    """The same trainer, whose policy ends about every third completion at each token."""
    model: Any = made.model
    head = model.get_output_embeddings()
    is_end = torch.zeros(head.out_features)
    is_end[made.tokenizer.eos_token_id] = 1.0
    own = head.forward

    def ending_often(hidden: torch.Tensor) -> torch.Tensor:
        logits = own(hidden)
        return logits + 2.0 * is_end

    head.forward = ending_often
    return made


def test_the_punishment_is_added_before_the_advantages(tmp_path: Path) -> None:
    made = made_trainer(
        tmp_path,
        objective={"advantage": "group-centered"},
        rollout=rollout(max_completion_length=6, overlong_buffer=4, overlong_penalty=0.5),
    )
    batch, measured = collected(with_reward(uneven(made), all_equal))
    assert batch is not None
    length_B = batch.completions.lengths()
    assert len(length_B.unique()) > 2
    punishment_B = -0.5 * (length_B - 2).clamp(min=0) / 4
    assert (punishment_B[batch.completions.truncated_B] == -0.5).all()
    grouped = punishment_B.view(PROMPTS, GENERATIONS)
    expected_B = (grouped - grouped.mean(dim=1, keepdim=True)).flatten()
    assert torch.allclose(batch.signal_B, expected_B, atol=1e-6)
    assert measured["rewards/overlong"] == pytest.approx(punishment_B.mean().item())
    assert measured["reward"] == 0.5
    assert made._evaluate()["score"] is not None


def test_the_validation_score_is_not_shaped(tmp_path: Path) -> None:
    """A fresh policy's completions are all too long."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def half(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n"
    )
    made = made_trainer(
        tmp_path / "run",
        task={"rewards": [f"{reward}:half"]},
        rollout=rollout(max_completion_length=2, overlong_buffer=2),
    )
    assert collected(made)[1]["rewards/overlong"] < -0.4
    made.folder.path.mkdir()
    assert made._evaluate()["score"] == 0.5


def with_truncation(folder: Path, algorithm: str, **changes: Any) -> Trainer:
    made = made_trainer(
        folder,
        algorithm,
        rollout=rollout(max_completion_length=6, mask_truncated_completions=True),
        **changes,
    )
    return with_reward(uneven(made), by_index)


@pytest.mark.parametrize(
    "algorithm", ["reinforce", "grpo", "gspo", "dapo", "cispo", "dro", "opo", "isopo+opo"]
)
def test_a_masked_completion_counts_in_its_group_alone(tmp_path: Path, algorithm: str) -> None:
    made = with_truncation(tmp_path, algorithm)
    batch, measured = collected(made)
    plain = made.recipe.rollout.model_copy(update={"mask_truncated_completions": False})
    made.recipe = made.recipe.model_copy(update={"rollout": plain})
    whole, unmasked = collected(made)
    assert batch is not None
    assert whole is not None
    left = ~whole.completions.truncated_B
    assert 0 < left.sum() < len(left)
    assert measured["frac_masked_completions"] == pytest.approx(1 - left.double().mean().item())
    assert "frac_masked_completions" not in unmasked
    assert torch.equal(batch.signal_B, whole.signal_B[left])
    assert torch.equal(batch.group_B, whole.group_B[left])
    assert not batch.completions.truncated_B.any()


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "gspo", "dapo", "opo", "isopo+opo"])
def test_the_gradient_is_that_of_an_emptied_mask(tmp_path: Path, algorithm: str) -> None:
    """Leaving a completion out and emptying its response mask, as TRL does, are the same."""
    gradients = []
    for name in ("left out", "emptied"):
        made = with_truncation(tmp_path / name, algorithm)
        batch, _ = collected(made)
        if name == "emptied":
            plain = made.recipe.rollout.model_copy(update={"mask_truncated_completions": False})
            made.recipe = made.recipe.model_copy(update={"rollout": plain})
            batch, _ = collected(made)
            assert batch is not None
            grid = batch.completions
            response_BT = grid.response_BT & ~grid.truncated_B[:, None]
            emptied = dataclasses.replace(grid, response_BT=response_BT)
            batch = dataclasses.replace(batch, completions=emptied)
        assert batch is not None
        made._accumulate(batch, {}, measure_entropy=False)
        gradients.append([p.grad for p in made.model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).norm() <= 2e-4 * theirs.norm()


# The recipe that has all of it


def test_the_recipe_of_dapo_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "dapo.yaml"
    recipe = load_recipe(path)
    assert recipe.algorithm == "dapo"
    assert recipe.objective.name == "dapo"
    assert recipe.objective.clip_ratio_high > recipe.objective.clip_ratio_low
    assert recipe.objective.loss_agg_mode == "token-mean"
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD_FILE)
    small = load_recipe(
        path,
        [
            ("steps", "2"),
            ("output_dir", str(tmp_path / "run")),
            ("model.warmup_score", "0.0"),
            ("task.difficulty", "1"),
            ("task.num_validation", "6"),
            ("task.rewards", f"['{reward}:some_differ']"),
            ("rollout.num_prompts", "8"),
            ("evaluation.num_probe_prompts", "3"),
        ],
    )
    assert lifecycle.train(small, Silent()) == "finished"
    _, *steps = records(tmp_path / "run")
    assert len(steps) == 2
    for record in steps:
        assert record["skipped"] == 0
        assert record["generation_batches"] > 1
        assert record["frac_masked_completions"] > 0
        assert record["rewards/overlong"] < 0
        assert record["num_updates"] > 0
        assert record["objective/clip_ratio"] is not None

from __future__ import annotations

import pytest
import torch

from proxstep.config.sections import EMBEDDED_MODELS, EMBEDDED_TASKS
from proxstep.training import demo_model
from proxstep.training.cache import cache_folder
from proxstep.training.demo_model import (
    LESSONS,
    SIZES,
    Lesson,
    build_embedded_model,
    ensure_embedded_model,
)


def test_the_tokenizer_reads_every_character_and_gives_it_back() -> None:
    tokenizer, model = build_embedded_model()
    text = "0123456789+-*="
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert model.config.vocab_size == len(tokenizer)
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 0.9e6


@pytest.mark.slow
def test_it_is_built_once_and_cached() -> None:
    reports = []
    folder = ensure_embedded_model(1, 0.05, reports.append)
    assert folder.parent == cache_folder()
    assert reports[0] == "warming the embedded model up for difficulty 1, once, to 5%"
    assert len(reports) > 1
    written = folder.stat().st_mtime
    assert ensure_embedded_model(1, 0.05) == folder
    assert folder.stat().st_mtime == written


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_embedded_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_size_and_task_of_the_recipe_has_its_own() -> None:
    assert tuple(SIZES) == EMBEDDED_MODELS
    assert tuple(sorted(LESSONS)) == EMBEDDED_TASKS


@pytest.mark.parametrize("task", EMBEDDED_TASKS)
def test_a_task_has_its_own_characters(task: str) -> None:
    tokenizer, _ = build_embedded_model(task=task)
    ids = tokenizer(LESSONS[task].alphabet)["input_ids"]
    assert len(set(ids)) == len(LESSONS[task].alphabet)
    assert tokenizer.unk_token_id not in ids


def test_the_large_one() -> None:
    _, model = build_embedded_model(task="sums", name="embedded-large")
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 10e6


def test_a_lesson_of_fixed_length(monkeypatch: pytest.MonkeyPatch) -> None:
    habits, sums = [], LESSONS["sums"]

    def habit(example, rng) -> str:
        habits.append(example.prompt)
        return sums.habit(example, rng)

    lesson = Lesson(sums.alphabet, habit, batch_size=2, num_steps=51)
    monkeypatch.setitem(demo_model.LESSONS, "sums", lesson)
    folder = ensure_embedded_model(3, 0.6, task="sums")
    assert folder.name.endswith("sums-steps51")
    assert len(set(habits)) == len(habits) == 2 * 51
    assert ensure_embedded_model(1, 0.5, task="sums") == folder  # it has no difficulty
    assert ensure_embedded_model(1, 0.0, task="sums") != folder

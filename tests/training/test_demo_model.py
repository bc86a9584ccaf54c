from __future__ import annotations

import pytest
import torch

from proxstep.training.cache import cache_folder
from proxstep.training.demo_model import (
    build_embedded_model,
    ensure_embedded_model,
    is_cached,
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
    assert is_cached(1, 0.05)
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

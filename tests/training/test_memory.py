"""The estimate of a run's memory, against the card that a recipe needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from proxstep.config.loading import load_recipe
from proxstep.training.memory import estimate_memory

ROOT = Path(__file__).parents[2]
CARD = 80e9

QWEN3_0_6B = Qwen3Config(  # as its config.json has them
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("algorithm", ["isopo", "isopo-figure4", "reinforce", "grpo"])
def test_the_papers_recipe_fits_the_card_it_is_for(algorithm: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / "gsm8k-isopo.yaml", [("algorithm", algorithm)])
    estimate = estimate_memory(recipe, QWEN3_0_6B)
    assert estimate.weights == pytest.approx(596_049_920 * 4)
    assert estimate.peak < CARD

"""The estimate of a run's memory, against the card that a recipe needs."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own count")
def test_the_estimate_is_near_what_a_run_takes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.training.memory_case", str(tmp_path), "opo"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    estimated, measured = map(float, done.stdout.split()[-2:])
    assert estimated == pytest.approx(measured, rel=0.15)

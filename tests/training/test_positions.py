"""Models with a table of positions: contexts that do not fit are refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import models
from tests.engine import Silent, tiny_recipe
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from proxstep.config.sections import Lora
from proxstep.engines.trl import launch
from proxstep.errors import ProxstepError
from proxstep.training import lifecycle
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.models import load_model, load_tokenizer, quiet_transformers
from proxstep.training.positions import num_learned_positions

TOLD = (
    "the longest prompt has 4 tokens, and with rollout.max_completion_length 5 that is more than "
    "the 8 positions of model.name"
)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A GPT-2 of eight positions; sums of two digits are four tokens."""
    quiet_transformers()
    tokenizer, _ = build_embedded_model()
    end = tokenizer.eos_token_id
    small: Any = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": end, "eos_token_id": end}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **small, **ends))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def recipe_from(source: str, folder: Path, length: int) -> Any:
    task = {"name": "arithmetic", "difficulty": 1, "num_validation": 6}
    rollout = {"num_prompts": 4, "num_generations": 4, "max_completion_length": length}
    return tiny_recipe(folder, steps=1, model={"name": source}, rollout=rollout, task=task)


def test_what_does_not_fit_is_refused_before_the_run(source: str, tmp_path: Path) -> None:
    for begin in (lifecycle.train, launch.train):
        with pytest.raises(ProxstepError, match=TOLD):
            begin(recipe_from(source, tmp_path / "run", 5), Silent())
        assert not (tmp_path / "run").exists()
    with pytest.raises(ProxstepError, match=TOLD):
        lifecycle.evaluate(recipe_from(source, tmp_path / "run", 5), None, Silent())


def test_what_fits_to_the_last_position_runs(source: str, tmp_path: Path) -> None:
    assert lifecycle.train(recipe_from(source, tmp_path / "run", 4), Silent()) == "finished"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_which_models_have_a_table(source: str) -> None:
    cpu = torch.device("cpu")
    assert num_learned_positions(load_model(source, "float32", cpu)) == 8
    lora = Lora(rank=2, target_modules=["c_attn"])
    assert num_learned_positions(load_model(source, "float32", cpu, lora)) == 8
    small: Any = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    words = len(load_tokenizer(source))
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=words, num_hidden_layers=1, max_position_embeddings=9, **small)
    )
    assert num_learned_positions(opt) == 9
    assert num_learned_positions(models.qwen3(True, words)) is None

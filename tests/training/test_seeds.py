"""Nothing random comes from outside of the seed: every option of the model, walked twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.engine import Silent, records, spread_reward, tiny_recipe
from tests.selection import slow

from proxstep.config.sections import Lora, ModelSection
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import lifecycle
from proxstep.training.demo_model import build_embedded_model

OPTIONS: list[dict[str, Any]] = [
    {"name": "LOCAL"},
    {"dtype": "bfloat16"},
    {"autocast": "bfloat16"},
    {"head": "chunked"},
    {"warmup_score": 0.0},
    {"lora": {"rank": 2}},
    {"lora": {"rank": 3, "alpha": 8, "dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}},
    {"lora": {"rank": 2, "dropout": 0.1}, "autocast": "bfloat16"},
]


WARM_UP = {"warmup_solutions", "warmup_learning_rate"}
"""What makes the model that all seeds begin with; test_warmup.py has them."""


def test_every_option_is_walked() -> None:
    walked = {key for option in OPTIONS for key in option}
    assert walked == set(ModelSection.model_fields) - WARM_UP
    lora = {key for option in OPTIONS for key in option.get("lora", {})}
    assert lora == set(Lora.model_fields)


def trained(folder: Path, seed: int, option: dict[str, Any], elsewhere: int) -> dict[str, Any]:
    """Train one step, with all generators elsewhere before; return weights and measurements."""
    random.seed(elsewhere)
    np.random.seed(elsewhere)
    torch.manual_seed(elsewhere)
    if "name" not in option:
        option = {"warmup_score": 0.0, **option}
    else:
        option = {"warmup_score": 0.6, "name": str(folder.parent / "model")}
        tokenizer, model = build_embedded_model()
        for part in (tokenizer, model):
            part.save_pretrained(option["name"])  # type: ignore[operator]
    recipe = tiny_recipe(
        folder, seed=seed, steps=1, model=option, task=spread_reward(folder.parent)
    )
    lifecycle.train(recipe, Silent())
    (file,) = latest_checkpoint(folder).glob("*model.safetensors")
    measured = records(folder)
    for record in measured:
        for name in [key for key in record if key.startswith(("seconds", "elapsed"))]:
            del record[name]
    return {"records": measured, **load_file(file)}


FAST = ({"name": "LOCAL"}, OPTIONS[-1])
"""A model of one's own, and adapters with dropout under autocast."""


@pytest.mark.parametrize("option", [*FAST, *slow(*(o for o in OPTIONS if o not in FAST))], ids=str)
def test_the_same_seed_is_the_same_run(tmp_path: Path, option: dict[str, Any]) -> None:
    first = trained(tmp_path / "first", 3, option, elsewhere=1)
    second = trained(tmp_path / "second", 3, option, elsewhere=2)
    assert first.pop("records") == second.pop("records")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = trained(tmp_path / "other", 4, option, elsewhere=1)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_the_warm_up_is_the_same_for_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    for elsewhere in (1, 2):
        monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / str(elsewhere)))
        torch.manual_seed(elsewhere)
        random.seed(elsewhere)
        recipe = tiny_recipe(tmp_path / "run", model={"warmup_score": 0.01})
        sources.append(Path(lifecycle.model_source(recipe, print)) / "model.safetensors")
    assert sources[0].read_bytes() == sources[1].read_bytes()

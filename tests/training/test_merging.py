"""Runs that begin with adapters: the policy has what those learned, and so has what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine import Silent, spread_reward, tiny_recipe

from proxstep.config.sections import Lora
from proxstep.engines.trl.script import script
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import lifecycle
from proxstep.training.memory import config_of
from proxstep.training.models import load_adapters, load_model, quiet_transformers
from proxstep.training.source import model_source

CPU = torch.device("cpu")
TOKEN_BT = torch.arange(2, 12).reshape(2, 5)


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is in the cache, and dependencies warn one another, as in a session."""
    monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / "cache"))
    quiet_transformers()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKEN_BT).logits


def recipe_from(name: Any, folder: Path, **changes: Any) -> Any:
    model = {"name": str(name), **changes.pop("model", {})}
    if model["name"] == "embedded":
        model["warmup_score"] = 0.0
    return tiny_recipe(folder, steps=1, model=model, task=spread_reward(folder.parent), **changes)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A checkpoint of a run with LoRA."""
    changes: Any = {"model": {"lora": {"rank": 2}}, "optimizer": {"learning_rate": 0.1}}
    recipe = recipe_from("embedded", tmp_path / "run", **changes)
    lifecycle.train(recipe, Silent())
    return latest_checkpoint(tmp_path / "run")


def test_a_run_begins_with_what_adapters_learned(tmp_path: Path, adapters: Path) -> None:
    """Merged, whether adapters are trained on top or all weights: the reference of a KL as well."""
    embedded = model_source(recipe_from("embedded", tmp_path / "run"), print)
    bare = load_model(embedded, "float32", CPU)
    before = logits_of(bare)
    learned = logits_of(load_adapters(bare, adapters))
    assert (learned - before).abs().max() > 0.1
    source = model_source(recipe_from(adapters, tmp_path / "next"), print)
    assert source == model_source(recipe_from(adapters, tmp_path / "next"), pytest.fail)
    whole = load_model(source, "float32", CPU)
    assert all(p.requires_grad for p in whole.parameters())
    torch.testing.assert_close(logits_of(whole), learned, rtol=0, atol=1e-5)
    on_top: Any = load_model(source, "float32", CPU, Lora(rank=2))
    torch.testing.assert_close(logits_of(on_top), learned, rtol=0, atol=1e-5)
    with on_top.disable_adapter():
        torch.testing.assert_close(logits_of(on_top), learned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_what_a_run_from_adapters_saves_is_the_sum_of_both(
    tmp_path: Path, adapters: Path, lora: dict[str, int] | None
) -> None:
    """Its checkpoint names the merged model as its base, not the bare one."""
    changes: Any = {"model": {"lora": lora}, "optimizer": {"learning_rate": 1e-9}}
    recipe = recipe_from(adapters, tmp_path / "next", **changes)
    assert lifecycle.train(recipe, Silent()) == "finished"
    last = latest_checkpoint(tmp_path / "next")
    found = load_model(model_source(recipe_from(last, tmp_path / "third"), print), "float32", CPU)
    wanted = load_model(model_source(recipe, print), "float32", CPU)
    torch.testing.assert_close(logits_of(found), logits_of(wanted), rtol=0, atol=1e-5)


def test_other_adapters_in_the_same_folder_are_merged_anew(tmp_path: Path, adapters: Path) -> None:
    recipe = recipe_from(adapters, tmp_path / "next")
    first = model_source(recipe, print)
    weights = adapters / "adapter_model.safetensors"
    changed = {name: 2 * value for name, value in load_file(weights).items()}
    save_file(changed, weights)
    assert model_source(recipe, print) != first


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    base = model_source(recipe_from("embedded", tmp_path / "run"), print)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load_model(base, "float32", CPU), config).save_pretrained(tmp_path / "soft")
    expected = "soft: adapters of the kind PROMPT_TUNING cannot be merged with their base"
    with pytest.raises(ProxstepError, match=expected):
        model_source(recipe_from(tmp_path / "soft", tmp_path / "next"), print)


def test_adapters_that_were_not_merged_are_refused(adapters: Path) -> None:
    """Such as those of the hub, of which nothing is known before they are loaded."""
    with pytest.raises(ProxstepError, match="these are adapters, which are merged with their base"):
        load_model(str(adapters), "float32", CPU)


@pytest.mark.parametrize("text", ["{", "{}", '{"peft_type": "LORA"}'])
def test_a_damaged_configuration_is_told(tmp_path: Path, adapters: Path, text: str) -> None:
    (adapters / "adapter_config.json").write_text(text)
    with pytest.raises(ProxstepError, match=r"its adapter_config.json (cannot be read|names no)"):
        model_source(recipe_from(adapters, tmp_path / "next"), print)


def test_other_parts_know_what_adapters_become(tmp_path: Path, adapters: Path) -> None:
    recipe = recipe_from(adapters, tmp_path / "next")
    assert config_of(recipe).vocab_size == config_of(recipe_from("embedded", tmp_path)).vocab_size
    written = script(recipe)
    assert "model = str(ensure_merged(" in "".join(written.split("\n    "))
    assert f'name="{adapters}"' in written

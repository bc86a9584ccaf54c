"""Loading models, tokenizers and adapters from local folders, and what is said where that fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import tiny_recipe
from tests.models import tiny_gpt2

from proxstep.config.sections import Lora
from proxstep.errors import ProxstepError
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.models import (
    load_adapters,
    load_model,
    load_tokenizer,
    pick_device,
    quiet_transformers,
)
from proxstep.training.source import model_source

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Dependencies warn one another, as in a session."""
    quiet_transformers()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "saved"
    tokenizer, model = build_embedded_model()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


# Devices


def test_auto_picks_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop's mps by name alone: nothing was tried on it."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps").type == "mps"
    for cuda, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        assert pick_device("auto").type == expected


def test_a_device_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ProxstepError, match="device cuda:2 is not available here; use auto or cpu"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "meta", "xpu"):
        with pytest.raises(ProxstepError, match=f"device {name} is not available here"):
            pick_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "CPU", "cpu, please"])
def test_a_device_must_be_a_device(name: str) -> None:
    with pytest.raises(ProxstepError, match=f"device '{name}' is not one of auto, cpu, cuda"):
        pick_device(name)


# Tokenizers


def test_a_tokenizer_pads_on_the_left(copied: Path) -> None:
    tokenizer = load_tokenizer(str(copied))
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    changes = json.loads((copied / "tokenizer_config.json").read_text())
    changes |= {"padding_side": "right", "pad_token": None}
    (copied / "tokenizer_config.json").write_text(json.dumps(changes))
    tokenizer = load_tokenizer(str(copied))
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(copied: Path) -> None:
    tokenizer, _ = build_embedded_model()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copied)
    with pytest.raises(ProxstepError, match="has no end-of-sequence token, so no completion could"):
        load_tokenizer(str(copied))


# Models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_comes_in_the_type_asked_for(saved: Path, dtype: str) -> None:
    model = load_model(str(saved), dtype, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_architecture_loads_too(tmp_path: Path) -> None:
    tiny_gpt2(dtype=torch.float32).save_pretrained(tmp_path)  # type: ignore[operator]
    model = load_model(str(tmp_path), "float32", CPU)
    assert type(model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_alone_are_trainable(saved: Path, targets: str | list[str]) -> None:
    model = load_model(str(saved), "float32", CPU, Lora(rank=2, target_modules=targets))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert ("up_proj" in adapted) == (targets == "all-linear")


@pytest.mark.parametrize("targets", [["zzz"], "zzz"])
def test_adapters_that_fit_nothing_are_refused(saved: Path, targets: str | list[str]) -> None:
    with pytest.raises(ProxstepError, match=r"model\.lora: Target modules .*zzz.* not found"):
        load_model(str(saved), "float32", CPU, Lora(target_modules=targets))


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_model(name, "float32", CPU)])
@pytest.mark.parametrize("name", ["./none", "/no/such", "a/b/c", "empty", "../x", ""])
def test_a_path_that_holds_no_model_is_no_hub_name(
    load: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert callable(load)
    with pytest.raises(ProxstepError) as caught:
        load(name)
    assert str(caught.value) == (
        f"model.name {name}: no config.json there; give a folder that save_pretrained wrote, or a "
        "hub name"
    )


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.safetensors", None, "Error no file named model.safetensors"),
        ("config.json", '{"model_type": "t5"}', "Unrecognized configuration class"),
        ("config.json", '{"model_type": "no-such-type"}', "no-such-type"),
        ("config.json", "{", "not a valid JSON file"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(
    copied: Path, file: str, content: str | None, reason: str
) -> None:
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_text(content)
    with pytest.raises(ProxstepError) as caught:
        load_model(str(copied), "float32", CPU)
    message = str(caught.value)
    assert message.startswith(f"model.name {copied}: no causal language model could be loaded (")
    assert reason in message
    assert message.endswith("check the name and the network, or give a local folder")
    assert "\n" not in message


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="would ask the hub")
def test_a_name_that_the_hub_does_not_know() -> None:
    with pytest.raises(ProxstepError, match=r"model\.name nobody/nothing: no tokenizer could be"):
        load_tokenizer("nobody/nothing")


# Where a recipe's model is


def test_the_source_is_the_name_or_the_embedded_models_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    named = tiny_recipe(tmp_path / "run", model={"name": str(saved)})
    assert model_source(named, notes.append) == str(saved)
    monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / "cache"))
    source = Path(model_source(tiny_recipe(tmp_path / "run"), notes.append))
    assert source.parent == tmp_path / "cache"
    assert load_tokenizer(str(source)).decode(load_tokenizer(str(source))("1+2=")["input_ids"])
    assert load_model(str(source), "float32", CPU).config.model_type == "qwen3"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [source.name]
    assert notes == []  # nothing to warm up, nothing to say


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("./none", "./none"),
        ("../x/", "../x/"),
        ("who/what", "who/what"),
        ("~/x", "HOME/x"),
        ("~nobody-here/x", "~nobody-here/x"),
    ],
)
def test_a_path_stays_a_path(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its dot, ./none would be a name of the hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tiny_recipe(tmp_path / "run", model={"name": name})
    assert model_source(recipe, pytest.fail) == source.replace("HOME", str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_weights_that_do_not_fit_or_are_cut_off_are_refused(copied: Path, file: str) -> None:
    if file == "config.json":
        text = (copied / file).read_text()
        assert '"hidden_size": 128' in text
        (copied / file).write_text(text.replace('"hidden_size": 128', '"hidden_size": 64'))
    else:
        (copied / file).write_bytes((copied / file).read_bytes()[:1000])
    with pytest.raises(ProxstepError, match=f"model.name {copied}: no causal language model could"):
        load_model(str(copied), "float32", CPU)


def test_weights_that_are_missing_are_named(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProxstepError) as caught:
        load_model(str(copied), "float32", CPU)
    message = str(caught.value)
    assert message.startswith(f"model.name {copied}: 1 of its weights are missing, such as {name}")


@pytest.mark.parametrize("content", ["{}", "{", None])
def test_a_damaged_tokenizer_is_refused(copied: Path, content: str | None) -> None:
    (copied / "tokenizer.json").unlink()
    if content is not None:
        (copied / "tokenizer.json").write_text(content)
    with pytest.raises(ProxstepError, match=f"model.name {copied}: "):
        load_tokenizer(str(copied))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapters_are_refused(saved: Path, tmp_path: Path, file: str) -> None:
    adapted: Any = load_model(str(saved), "float32", CPU, Lora(rank=2))
    adapted.save_pretrained(tmp_path)
    load_adapters(load_model(str(saved), "float32", CPU), tmp_path)
    (tmp_path / file).write_bytes(b"{")
    with pytest.raises(ProxstepError, match=f"model.name {tmp_path}: no adapter could be loaded"):
        load_adapters(load_model(str(saved), "float32", CPU), tmp_path)

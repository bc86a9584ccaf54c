"""Commands run in an empty folder that holds tiny.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxstep.training import lifecycle
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.models import quiet_transformers
from tests.cli.command_case import TINY

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local models over arithmetic's characters: with a chat template, without, without an end."""
    quiet_transformers()
    folder = tmp_path_factory.mktemp("models")
    for name in ("plain", "chat", "endless", "headless", "encoder"):
        tokenizer, model = build_embedded_model()
        if name == "chat":
            tokenizer.chat_template = TEMPLATE
        if name == "endless":
            tokenizer.eos_token = None
        tokenizer.save_pretrained(folder / name)
        model.config.save_pretrained(folder / name)
        if name in ("plain", "chat"):
            model.save_pretrained(folder / name)  # type: ignore[operator]
        if name == "encoder":
            (folder / name / "config.json").write_text('{"model_type": "t5"}')
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Work in an empty folder that holds tiny.yaml, a recipe of two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXSTEP_CACHE", str(cache))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test where a model is loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail(f"load_model was called with {arguments} {options}")

    monkeypatch.setattr(lifecycle, "load_model", refuse)

"""A hub that does not answer is not waited for. No test here touches the network."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
from huggingface_hub import constants

from proxstep import hub
from proxstep.cli import main
from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError
from proxstep.tasks.data import load_hub_rows
from proxstep.training.memory import config_of
from proxstep.training.models import load_model, load_tokenizer

NAME = "nobody/nothing"
LOADERS: dict[str, Callable[[], Any]] = {
    "tokenizer": lambda: load_tokenizer(NAME),
    "model": lambda: load_model(NAME, "float32", torch.device("cpu")),
    "configuration": lambda: config_of(
        resolve({"algorithm": "grpo", "model": {"name": NAME}}, {}, "test")
    ),
    "data": lambda: load_hub_rows(NAME, None, "train"),
}


def raising(error: OSError) -> Callable[..., Any]:
    def asked(*_: Any, **__: Any) -> Any:
        raise error

    return asked


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is wanted and whose name nobody knows."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", raising(socket.gaierror("no such name")))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("what", LOADERS)
def test_what_is_not_in_the_cache_is_an_error_at_once(what: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ProxstepError, match=r"couldn't find them in the cached|Couldn't reach"):
        LOADERS[what]()
    assert time.monotonic() - begun < 10  # seconds; the hub's own client takes over 20
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("silent")
def test_a_printed_command_of_a_hub_model_fails_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    begun = time.monotonic()
    words = ["--model.name", NAME, "--output_dir", str(tmp_path / "run")]
    words += ["--engine", "verl", "--print-command"]
    assert main(["train", "arithmetic-isopo", *words]) == 2
    assert time.monotonic() - begun < 10  # seconds
    said = capsys.readouterr().err
    assert said.startswith(f"error: model.name {NAME}: no tokenizer could be loaded")
    assert said.endswith("check the name and the network, or give a local folder\n")


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (None, True),
        (HTTPError("", 403, "no", {}, None), True),  # type: ignore[arg-type]
        (URLError(SSLCertVerificationError("of a proxy")), True),
        (URLError(socket.gaierror("no such name")), False),
        (TimeoutError("timed out"), False),
    ],
)
def test_any_answer_is_one(
    monkeypatch: pytest.MonkeyPatch, error: OSError | None, answers: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    given = (lambda *_, **__: socket.socket()) if error is None else raising(error)
    monkeypatch.setattr(hub, "urlopen", given)
    assert hub.hub_answers() is answers
    with hub.hub_or_cache(NAME):
        assert constants.HF_HUB_OFFLINE is not answers
    assert not constants.HF_HUB_OFFLINE


def test_a_path_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "urlopen", raising(OSError("asked")))
    with hub.hub_or_cache(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE

"""The CPU platform: loading it, what it changes, and verl's FSDP2 engine on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.verl import cpu_ranks
from tests.verl.cpu import device, patches
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform import get_platform
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.utils.tokenizer import continuous_token_wiring
from verl.utils.tokenizer.continuous_token import (
    ContinuousTokenBuilder,
    QwenContinuousTokenBuilder,
)

from proxstep.training.demo_model import build_embedded_model

pytestmark = [pytest.mark.verl, pytest.mark.filterwarnings("default")]

MODULE = "tests.verl.cpu"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer, model = build_embedded_model()
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def test_the_environment_variable_is_enough() -> None:
    code = "import verl.utils.device as d; print(d.get_device_name(), d.get_nccl_backend())"
    done = python(code, VERL_USE_EXTERNAL_MODULES=MODULE)
    assert done.stdout.split() == ["cpu", "gloo"], done.stderr


def test_loading_too_late_is_refused() -> None:
    code = f"from verl.plugin.platform import get_platform; get_platform(); import {MODULE}"
    done = python(code)
    assert "ProxstepError" in done.stderr
    assert f"VERL_USE_EXTERNAL_MODULES={MODULE}" in done.stderr.splitlines()[-1]


def test_verl_s_own_platform_stays_without_the_plugin() -> None:
    code = (
        "import torch, proxstep, verl.workers.rollout.base as b; "
        "from torch.distributed.fsdp import CPUOffloadPolicy as P; "
        "print(('cpu', 'async') in b._ROLLOUT_REGISTRY, P().pin_memory)"
    )
    assert python(code).stdout.split() == ["False", "True"]


def test_the_platform_is_registered_by_name() -> None:
    assert type(get_platform()) is PlatformRegistry.get("cpu")
    assert torch.ones(1).to(get_platform().current_device()).device.type == "cpu"


def test_memory_is_the_process_s() -> None:
    held = torch.ones(2**24)
    assert 2**26 < device.memory_allocated() <= device.max_memory_allocated()
    available, total = device.mem_get_info()
    assert device.memory_allocated() < total
    assert 0 < available < total
    assert len(held) == 2**24


def test_patches_are_made_once() -> None:
    before = (torch.distributed.init_process_group, continuous_token_wiring.__dict__.copy())
    patches.apply()
    assert torch.distributed.init_process_group is before[0]
    assert continuous_token_wiring.__dict__ == before[1]


def test_other_backends_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    if torch.distributed.is_initialized():  # by another file's tests
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="cpu:gloo,cpu:mpi"):
        torch.distributed.init_process_group("cpu:gloo,cpu:mpi", rank=0, world_size=1)


def test_no_memory_is_pinned() -> None:
    assert not CPUOffloadPolicy(pin_memory=True).pin_memory


@pytest.mark.parametrize("knows_chatml", [True, False])
def test_a_tokenizer_without_chatml_takes_the_default_builder(knows_chatml: bool) -> None:
    tokenizer, _ = build_embedded_model()
    if knows_chatml:
        tokenizer.add_tokens(["\n", "<|im_end|>"])
    builder = continuous_token_wiring.create_continuous_token_builder(
        tokenizer, hf_model_type="qwen3"
    )
    wanted = QwenContinuousTokenBuilder if knows_chatml else ContinuousTokenBuilder
    assert type(builder) is wanted


def test_verl_looks_for_completions_often() -> None:
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    patches.look_for_completions_often()
    buffer = object.__new__(ReplayBuffer)
    buffer.poll_interval = 2.0
    began = time.monotonic()
    now = time.time()
    assert buffer._wait_for_next_poll("train", now) == now
    assert 0.05 < time.monotonic() - began < 1.5


def reference(folder: Path, rank: int) -> list[torch.Tensor]:
    """Each sequence's log-probabilities, one sequence at a time and without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, attention = cpu_ranks.made_tokens(rank)
    rows = []
    for tokens, mask in zip(ids, attention.bool(), strict=True):
        logits = model(tokens[mask][None]).logits[0, :-1]
        rows.append(logits.log_softmax(-1).gather(1, tokens[mask][1:, None]).squeeze(1).detach())
    return rows


@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_on_two_ranks_are_the_model_s(model_folder: Path, packed: bool) -> None:
    found = cpu_ranks.on_ranks(cpu_ranks.log_probs_of, model_folder, packed)
    for rank, out in enumerate(found):
        expected = reference(model_folder, rank)
        for name in ("train", "reference"):
            assert out[f"{name}_memory"] > 0
            for row, wanted in zip(out[name], expected, strict=True):
                torch.testing.assert_close(row[:-1], wanted, rtol=0, atol=2e-5)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_training_and_a_checkpoint_on_two_ranks(model_folder: Path) -> None:
    first, second = cpu_ranks.on_ranks(cpu_ranks.train_and_go_back, model_folder, True)
    assert all(same(first[name], second[name]) for name in first)
    assert not same(first["before"], first["once"])
    assert not same(first["once"], first["twice"])
    assert same(first["once"], first["back"])
    assert same(first["twice"], first["again"])

"""The CPU rollout's server and its two ends, without Ray."""

from __future__ import annotations

import asyncio
import random
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.verl.cpu import rollout, server
from tests.verl.cpu.rollout import CpuReplica, CpuRollout
from tests.verl.cpu.server import CpuServer
from verl.workers.config import RolloutConfig
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class

from proxstep.errors import ProxstepError
from proxstep.training.demo_model import build_embedded_model

pytestmark = pytest.mark.verl

SAMPLED = {"temperature": 1.0, "top_p": 1, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer, model = build_embedded_model()
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def rollout_config(**changes: Any) -> RolloutConfig:
    given = {"name": "cpu", "dtype": "float32", "tensor_model_parallel_size": 1}
    return RolloutConfig(**{**given, "prompt_length": 8, "response_length": 6, **changes})


def model_section(folder: Path, **changes: Any) -> Any:
    model = {
        "_target_": "verl.workers.config.HFModelConfig",
        "path": str(folder),
        "override_config": {"attn_implementation": "sdpa"},
        "lora_rank": 0,
        "lora_adapter_path": None,
        "lora": {"rank": 0, "merge": False},
    }
    return OmegaConf.merge(model, changes)


def made_server(folder: Path, **changes: Any) -> CpuServer:
    return CpuServer(rollout_config(**changes), model_section(folder), 0)


def prompts(seed: int, count: int) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(2, 14) for _ in range(chooser.randint(1, 8))] for _ in range(count)]


def generated(
    made: CpuServer, asked: list[list[int]], params: dict[str, Any], apart: float = 0
) -> list[Any]:
    """Each request's output or error; they begin the given number of seconds apart."""

    async def one(i: int) -> Any:
        await asyncio.sleep(i * apart)
        return await made.generate(asked[i], dict(params), str(i))

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(one, range(len(asked))), return_exceptions=True)

    return asyncio.run(all_of_them())


def updated(made: CpuServer, weights: dict[str, torch.Tensor], step: int | None) -> None:
    asyncio.run(made.update_weights(weights, step))


def other_weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    _, model = build_embedded_model(seed + 1)
    return {name: value + torch.randn_like(value) / 50 for name, value in tied(model).items()}


def tied(model: Any) -> dict[str, torch.Tensor]:
    found = dict(model.state_dict())
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    return {name: value for name, value in found.items() if name != "lm_head.weight"}


def test_requests_that_come_together_are_completed_together(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, complete = [], server.complete

    def counted(model: Any, requests: Any, *args: Any) -> Any:
        sizes.append(len(requests))
        return complete(model, requests, *args)

    monkeypatch.setattr(server, "complete", counted)
    made = made_server(model_folder, max_num_seqs=50)
    asked = prompts(0, 128)
    outputs = generated(made, asked, SAMPLED)
    assert sizes == [50, 50, 28]
    generated(made, asked[:20], SAMPLED, apart=0.003)
    assert sizes == [50, 50, 28, 20]
    assert all(1 <= len(output.token_ids) <= 6 for output in outputs)
    assert all(len(output.log_probs) == len(output.token_ids) for output in outputs)
    assert {output.stop_reason for output in outputs} == {"completed"}


@pytest.mark.parametrize("seed", range(2))
def test_the_same_weights_draw_the_same_again(model_folder: Path, seed: int) -> None:
    weights = other_weights(seed) | {}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    asked = prompts(seed, 5) * 4

    def drawn(made: CpuServer, order: list[int]) -> dict[tuple[int, ...], list[Any]]:
        outputs = generated(made, [asked[i] for i in order], SAMPLED)
        found: dict[tuple[int, ...], list[Any]] = {}
        for i, output in zip(order, outputs, strict=True):
            found.setdefault(tuple(asked[i]), []).append(output.token_ids)
        return {prompt: sorted(tokens) for prompt, tokens in found.items()}

    in_order = list(range(len(asked)))
    shuffled = random.Random(seed).sample(in_order, len(in_order))
    first, second = made_server(model_folder), made_server(model_folder, max_num_seqs=3)
    for made in (first, second):
        updated(made, weights, 4)
    once, again = drawn(first, in_order), drawn(second, shuffled)
    assert once == again
    assert all(len({tuple(t) for t in tokens}) > 1 for tokens in once.values())
    assert drawn(first, in_order) != once  # a prompt's fifth completion is not its first
    updated(first, weights, 4)
    generated(first, asked, {**SAMPLED, "temperature": 0})  # a validation in between
    assert drawn(first, in_order) == once
    updated(first, weights, 5)
    assert drawn(first, in_order) != once
    other_seed = made_server(model_folder, seed=43)
    updated(other_seed, weights, 4)
    assert drawn(other_seed, in_order) != once


def test_validation_is_greedy_and_reports_the_step(model_folder: Path) -> None:
    made = made_server(model_folder)
    asked = [prompts(3, 1)[0]] * 5
    outputs = generated(made, asked, {**SAMPLED, "temperature": 0, "logprobs": False})
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    assert all(output.log_probs is None for output in outputs)
    assert outputs[0].extra_fields == {"global_steps": None}
    updated(made, dict(made._model.state_dict()), 9)
    (output,) = generated(made, asked[:1], SAMPLED)
    assert output.extra_fields == {"global_steps": 9}


@pytest.mark.parametrize(
    ("params", "length"),
    [({}, 6), ({"max_tokens": 2}, 2), ({"max_new_tokens": 3}, 3), ({"ignore_eos": True}, 6)],
)
def test_lengths(model_folder: Path, params: dict[str, Any], length: int) -> None:
    made = made_server(model_folder)
    outputs = generated(made, prompts(4, 60), {**SAMPLED, **params})
    lengths = {len(output.token_ids) for output in outputs}
    assert max(lengths) == length
    assert (lengths == {length}) == ("ignore_eos" in params)


def test_a_long_prompt_leaves_less_to_generate(model_folder: Path) -> None:
    made = made_server(model_folder, ignore_eos=True)
    (output,) = generated(made, [[5] * 11], SAMPLED)  # 8 + 6 - 11
    assert len(output.token_ids) == 3


@pytest.mark.parametrize("name", ["min_p", "repetition_penalty", "seed", "stop"])
def test_unknown_sampling_parameters_are_refused_by_name(model_folder: Path, name: str) -> None:
    (error,) = generated(made_server(model_folder), prompts(0, 1), {**SAMPLED, name: 1.1})
    assert isinstance(error, ProxstepError)
    assert name in str(error)


def test_images_are_refused(model_folder: Path) -> None:
    made = made_server(model_folder)
    with pytest.raises(ProxstepError, match="text alone"):
        asyncio.run(made.generate([3], dict(SAMPLED), "0", image_data=["image"]))


def test_an_error_reaches_every_request_and_the_server_lives_on(model_folder: Path) -> None:
    made = made_server(model_folder)
    good = {name: value.clone() for name, value in made._model.state_dict().items()}
    bad = {name: torch.full_like(value, torch.nan) for name, value in good.items()}
    updated(made, bad, 1)
    errors = generated(made, prompts(0, 3), SAMPLED)
    assert all(isinstance(error, ProxstepError) for error in errors)
    updated(made, good, 2)
    assert all(output.token_ids for output in generated(made, prompts(0, 3), SAMPLED))


class Handle:
    """A Ray actor's handle, in this process."""

    def __init__(self, made: CpuServer) -> None:
        self.update_weights = types.SimpleNamespace(remote=made.update_weights)


@pytest.mark.parametrize("seed", range(2))
def test_the_server_holds_the_ranks_weights_bit_for_bit(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    made = made_server(model_folder)
    asked_for: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(rollout.ray, "get_actor", lambda n: asked_for.append(n) or Handle(made))
    side = CpuRollout(rollout_config(), model_section(model_folder), None)
    weights = other_weights(seed)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    asyncio.run(side.update_weights(iter(weights.items()), global_steps=3))
    assert asked_for == ["cpu_server_1"]
    held = made._model.state_dict()
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], value) for name, value in weights.items())


def test_one_rank_of_a_replica_sends_and_every_rank_gathers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(rollout.ray, "get_actor", never)
    side = CpuRollout(
        rollout_config(tensor_model_parallel_size=2), model_section(model_folder), None
    )
    assert (side.replica_rank, side.is_leader_rank) == (1, False)
    weights = iter(other_weights(0).items())
    asyncio.run(side.update_weights(weights))
    assert next(weights, None) is None


def test_weights_that_do_not_fit_are_refused(model_folder: Path) -> None:
    made = made_server(model_folder)
    weights = dict(made._model.state_dict())
    del weights["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        updated(made, weights, 1)


def test_verl_finds_the_rollout() -> None:
    assert get_rollout_class("cpu", "async") is CpuRollout
    assert get_rollout_replica_class("cpu") is CpuReplica


def made_replica(folder: Path, model: dict[str, Any] | None = None, **changes: Any) -> CpuReplica:
    return CpuReplica(0, rollout_config(), model_section(folder, **(model or {})), 2, **changes)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ({}, {"is_reward_model": True}, r"reward\.reward_model\.enable=false"),
        ({}, {"is_teacher_model": True}, r"distillation\.enabled=false"),
        ({"lora_rank": 4}, {}, r"lora\.merge=true"),
        ({"lora": {"rank": 4}}, {}, r"lora\.merge=true"),
        ({"lora_adapter_path": "x"}, {}, r"lora\.merge=true"),
    ],
)
def test_what_the_rollout_cannot_do_is_refused_at_the_start(
    model_folder: Path, model: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ProxstepError, match=words):
        made_replica(model_folder, model, **changes)


def test_merged_adapters_are_taken(model_folder: Path) -> None:
    made_replica(model_folder, {"lora_rank": 4, "lora": {"merge": True}})


def test_interrupting_is_refused(model_folder: Path) -> None:
    replica = made_replica(model_folder)
    with pytest.raises(ProxstepError, match="trainer_mode=sync"):
        asyncio.run(replica.abort_all_requests())
    asyncio.run(replica.sleep())
    asyncio.run(replica.wake_up())

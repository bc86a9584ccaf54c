"""Rollouts by vLLM, against a stand-in for its classes: nothing here runs vLLM itself."""

from __future__ import annotations

import math
import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import Silent, collected, made_trainer, records, spread_reward, tiny_recipe
from tests.training.vllm_stub import Stub, vllm
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.training import lifecycle, vllm_sampler
from proxstep.training.rollout import Completions, Cut, completion_log_probs
from proxstep.training.trainer import Trainer
from proxstep.training.vllm_sampler import merged_weights

__all__ = ["vllm"]

LORA = {"name": "embedded", "warmup_score": 0.0, "lora": {"rank": 2}}


def rollout(**changes: Any) -> dict[str, Any]:
    sizes = {"num_prompts": 4, "num_generations": 4, "max_completion_length": 5}
    return {**sizes, "engine": "vllm", **changes}


def trainer(folder: Path, algorithm: str = "grpo", **changes: Any) -> Trainer:
    changes = {"task": spread_reward(folder), "rollout": rollout(), **changes}
    return made_trainer(folder / "run", algorithm, **changes)


def completions(made: Trainer, seed: int = 0) -> Completions:
    torch.manual_seed(seed)
    return made.sampler([made.train_prompts.tokens(row) for row in range(3)])


@pytest.mark.parametrize("own", [{}, {"model": LORA}])
def test_it_samples_the_policy_as_every_update_leaves_it(
    tmp_path: Path, vllm: Stub, own: dict[str, Any]
) -> None:
    made = trainer(tmp_path, optimizer={"learning_rate": 0.05}, **own)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    for _ in range(2):
        record = made._train_step()
        assert record["sampler/log_ratio_max"] < 1e-4
        assert record["sampler/log_ratio_p999"] <= record["sampler/log_ratio_max"]
        assert 0 <= record["sampler/kl"] < 1e-8
    changed = {
        name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {name for name, p in made.model.named_parameters() if p.requires_grad}
    (llm,) = vllm.llms
    assert len(llm.calls) == 2
    assert llm.asleep == {"weights", "kv_cache"}
    assert all(p.isnan().all() for p in llm.model.parameters())
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_what_it_is_asked_for(tmp_path: Path, vllm: Stub) -> None:
    made = trainer(
        tmp_path,
        seed=5,
        task={"max_prompt_length": 9, "prompt_format": "auto"},
        rollout=rollout(temperature=0.7, top_p=0.9, top_k=7, gpu_memory_utilization=0.4),
    )
    drawn = completions(made)
    (llm,) = vllm.llms
    assert llm.keywords == {
        "dtype": "float32",
        "seed": 5,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 9 + 5,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
    }
    ((prompts, options),) = llm.calls
    tokens = [made.train_prompts.tokens(row) for row in range(3)]
    assert prompts == [{"prompt_token_ids": prompt} for prompt in tokens]
    first = options[0]
    assert (first.n, first.max_tokens, first.logprobs) == (4, 5, 0)
    assert (first.temperature, first.top_p, first.top_k) == (0.7, 0.9, 7)
    assert first.stop_token_ids == [made.tokenizer.eos_token_id]
    assert len({option.seed for option in options}) == 3
    assert len(drawn) == 12  # a prompt's completions in a row
    whole = [row[mask].tolist() for row, mask in zip(*grids(drawn), strict=True)]
    assert [row[: len(tokens[i // 4])] for i, row in enumerate(whole)] == [
        tokens[i // 4] for i in range(12)
    ]


def grids(drawn: Completions) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn.token_BT, drawn.attention_BT


@pytest.mark.parametrize("own", [{"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}])
def test_the_log_probabilities_are_those_of_the_draw(
    tmp_path: Path, vllm: Stub, own: dict[str, Any]
) -> None:
    """After temperature, top_k and top_p: a cut makes every token likelier than the policy does."""
    made = trainer(tmp_path, rollout=rollout(**own))
    drawn = completions(made)
    temperature = made.recipe.rollout.temperature
    log_prob_BT = completion_log_probs(made.model, drawn, temperature, Cut())
    mask = drawn.response_BT[:, 1:]
    assert drawn.sampler_log_prob_BT is not None
    gap = (drawn.sampler_log_prob_BT - log_prob_BT)[mask]
    assert (drawn.sampler_log_prob_BT[~mask] == 0).all()
    if temperature == 1:
        assert (gap > 0.01).all()
    else:
        assert gap.abs().max() < 1e-5


def test_completions_end_as_they_do_with_transformers(tmp_path: Path, vllm: Stub) -> None:
    made = trainer(tmp_path, rollout=rollout(stop=["1", "23"], max_completion_length=8))
    drawn = completions(made)
    end, ended = made.tokenizer.eos_token_id, 0
    for row in range(len(drawn)):
        tokens = drawn.token_BT[row][drawn.response_BT[row]].tolist()
        texts = [made.tokenizer.decode(tokens[:count]) for count in range(1, len(tokens) + 1)]
        stops = [tokens[i] == end or "1" in text or "23" in text for i, text in enumerate(texts)]
        assert not any(stops[:-1])
        assert bool(drawn.truncated_B[row]) == (not stops[-1])
        assert stops[-1] or len(tokens) == 8
        ended += stops[-1]
    assert ended > 0
    assert all(option.detokenize for _, options in vllm.llms[0].calls for option in options)


def test_samples_follow_from_torchs_seed_and_so_does_what_comes_after(
    tmp_path: Path, vllm: Stub
) -> None:
    made = trainer(tmp_path)
    first, after = completions(made), torch.rand(3)
    vllm.distort = lambda logits: logits + 0 * torch.rand(())  # draws from torch's generator too
    again, after_again = completions(made), torch.rand(3)
    assert torch.equal(first.token_BT, again.token_BT)
    assert torch.equal(after, after_again)
    assert not torch.equal(first.token_BT, completions(made, seed=1).token_BT)


def test_another_sampler_is_measured_and_corrected(tmp_path: Path, vllm: Stub) -> None:
    vllm.distort = lambda logits: logits + torch.linspace(0.0, 1.0, len(logits))
    made = trainer(tmp_path, rollout=rollout(importance_cap=1.2), algorithm="reinforce")
    batch, measured = collected(made)
    assert batch is not None
    drawn, mask = batch.completions, batch.completions.response_BT[:, 1:]
    assert drawn.sampler_log_prob_BT is not None
    own = completion_log_probs(made.model, drawn, 1.0, Cut())
    ratio_BT = (own - drawn.sampler_log_prob_BT).double().masked_fill(~mask, 0.0)
    gap = ratio_BT[mask].abs().sort().values
    assert measured["sampler/log_ratio_max"] == pytest.approx(gap[-1].item())
    assert measured["sampler/log_ratio_max"] > 0.1
    k3 = ratio_BT[mask].exp() - 1 - ratio_BT[mask]
    assert measured["sampler/kl"] == pytest.approx(k3.mean().item(), rel=1e-5)
    weight_B = ratio_BT.sum(1).exp().clamp(max=1.2)
    assert measured["objective/importance_mean"] == pytest.approx(weight_B.mean().item(), rel=1e-5)
    assert batch.importance_B is not None
    assert torch.allclose(batch.importance_B.double(), weight_B, atol=1e-5)


def test_a_whole_run_writes_the_mismatch(
    tmp_path: Path, vllm: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "check_vllm", lambda recipe: None)
    task = spread_reward(tmp_path)
    recipe = tiny_recipe(tmp_path / "run", steps=1, task=task, rollout=rollout())
    assert lifecycle.train(recipe, Silent()) == "finished"
    _, *steps = records(tmp_path / "run")
    assert all(step["sampler/log_ratio_max"] < 1e-5 for step in steps)
    assert all(step["seconds_log_probs"] > 0 for step in steps)


def test_weights_that_stay_behind_are_named(tmp_path: Path, vllm: Stub) -> None:
    made = trainer(tmp_path)
    vllm.llms[0].model.inner.lm_head.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(ProxstepError, match=r"1 weights that the policy does not .* lm_head\.bias"):
        completions(made)
    assert vllm.llms[0].asleep == {"weights", "kv_cache"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish": "abort"}, "rollout.engine vllm ended a completion by abort"),
        ({"log_prob": math.nan}, "a token's log-probability is not finite"),
    ],
)
def test_other_ends_are_errors(
    tmp_path: Path, vllm: Stub, change: dict[str, Any], message: str
) -> None:
    made = trainer(tmp_path)
    vars(vllm).update(change)
    with pytest.raises(ProxstepError, match=message):
        completions(made)
    assert vllm.llms[0].asleep == {"weights", "kv_cache"}


def test_adapters_are_merged_without_a_trace(tmp_path: Path, vllm: Stub) -> None:
    made: Any = trainer(tmp_path, model=LORA)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    merged = {name: w.clone() for name, w in merged_weights(made.model.get_base_model())}
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    whole = made.model.merge_and_unload()
    assert merged.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.allclose(merged[name], parameter, atol=1e-6), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft's own advice
def test_weights_in_another_form_are_refused(tmp_path: Path, vllm: Stub) -> None:
    head = {**LORA, "lora": {"rank": 2, "target_modules": ["lm_head"]}}
    with pytest.raises(ProxstepError, match=r"model\.lora\.target_modules has lm_head"):
        trainer(tmp_path, model=head)
    made = trainer(tmp_path)
    made.model.experts = nn.Module()
    made.model.experts.weight = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ProxstepError, match="experts holds several layers' weights in one"):
        vllm_sampler.VllmSampler(made.recipe, made.model, made.tokenizer)


def test_it_is_looked_for_where_it_is_chosen_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    completions(made_trainer(tmp_path))
    assert "vllm" not in sys.modules
    recipe = tiny_recipe(tmp_path / "run", rollout=rollout())
    with pytest.raises(ProxstepError, match="needs an NVIDIA GPU, and the device here is cpu"):
        lifecycle.train(recipe, Silent())
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(vllm_sampler, "pick_device", lambda name: torch.device("cuda"))

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("proxstep.config.releases.version", missing)
    with pytest.raises(ProxstepError, match=r'vLLM is not installed: pip install "proxstep\[vllm'):
        lifecycle.train(recipe, Silent())
    monkeypatch.setattr("proxstep.config.releases.version", lambda package: "0.33.0")
    with pytest.raises(ProxstepError, match=r"vLLM 0\.33\.0 is not supported, since only 0\.31's"):
        lifecycle.train(recipe, Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "rollout.engine vllm samples on the first GPU, and device is cpu"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"rollout": rollout(temperature=0.005)}, "rollout.temperature 0.005 is outside"),
        ({"rollout": rollout(temperature=2.5)}, "rollout.temperature 2.5 is outside"),
        ({"rollout": rollout(batch_size=8)}, "rollout.batch_size is of rollout.engine transf"),
        (
            {"rollout": {"gpu_memory_utilization": 0.5}},
            "rollout.gpu_memory_utilization is of rollout.engine vllm",
        ),
        ({"rollout": rollout(engine="sglang")}, "rollout.engine"),
    ],
)
def test_what_vllm_does_not_do_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProxstepError, match=message):
        tiny_recipe(tmp_path, **{"rollout": rollout(), **changes})

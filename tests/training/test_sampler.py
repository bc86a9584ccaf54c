"""The sampler draws what transformers' generate does: with repeated prompts, rows that leave the
batch, stop texts, and for models whose cache allows none of it.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tests.families import build
from tests.models import SIZES, randomized
from transformers import (
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from proxstep.training import generation
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.generation import sample
from proxstep.training.next_token import categorical
from proxstep.training.rollout import Completions

PROMPTS = [[3, 4, 5, 6], [7], [3, 4, 5, 6], [8, 9], [7], [3, 4, 5, 6]]


class Numbers:
    """A tokenizer whose tokens are numbers, the text of each of them a letter."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token) for token in tokens)


def sliding() -> Any:
    """A window of 4, which prompts and completions leave behind."""
    return randomized(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))).eval()


def mamba() -> Any:
    config = MambaConfig(vocab_size=19, hidden_size=16, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config).eval()


FAMILIES = {
    name: (lambda name=name: build(name, 0, torch.float32, exact=False))
    for name in ("qwen3-tied", "gpt2", "gemma3", "phi", "mixtral", "qwen3-lora")
} | {"sliding": sliding, "mamba": mamba}


def made(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]()


def greedy(model: Any, prompts: list[list[int]], limit: int = 9) -> Completions:
    return sample(model, Numbers(), prompts, max_new_tokens=limit, greedy=True)


def of_generate(model: Any, prompt: list[int], limit: int = 9) -> list[int]:
    """What generate itself appends to one prompt, which needs no padding."""
    config = GenerationConfig(max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=2)
    token = torch.tensor([prompt])
    out = model.generate(
        input_ids=token, attention_mask=torch.ones_like(token), generation_config=config
    )
    return out[0, len(prompt) :].tolist()


def rows(completions: Completions) -> list[list[int]]:
    pairs = zip(completions.token_BT, completions.response_BT, strict=True)
    return [token[mask].tolist() for token, mask in pairs]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mamba"])
def test_greedy_rows_are_generates(family: str) -> None:
    model = made(family)
    assert rows(greedy(model, PROMPTS)) == [of_generate(model, prompt) for prompt in PROMPTS]


def test_a_prompt_is_read_once_and_ended_rows_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = made("qwen3-tied"), []
    forward = model.forward

    def watched(input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", watched)
    torch.manual_seed(1)
    completions = sample(model, Numbers(), PROMPTS * 8, max_new_tokens=30, temperature=3.0)
    lengths = completions.lengths()
    assert seen[0] == (3, 4)
    assert seen[1] == (48, 1)
    assert seen[-1][0] < 48
    used = sum(count for count, _ in seen[1:])
    assert lengths.sum() - 48 <= used <= 1.2 * lengths.sum()


@pytest.mark.parametrize("family", ["qwen3-tied", "sliding", "gemma3"])
def test_what_leaves_the_batch_changes_no_sample(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(family)
    drawn = []
    for share in (0, 1, 8, 10**6):  # never, when half have ended, ..., at once
        monkeypatch.setattr(generation, "_COMPACT_SHARE", share)
        torch.manual_seed(1)
        drawn.append(sample(model, Numbers(), PROMPTS * 4, max_new_tokens=12, temperature=2.0))
    assert len(set(drawn[0].lengths().tolist())) > 3
    for other in drawn[1:]:
        assert rows(other) == rows(drawn[0])


def test_mamba_is_sampled_by_generate_and_a_line_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("mamba")
    monkeypatch.setattr(generation, "_told", set())
    with caplog.at_level(logging.WARNING):
        completions = [greedy(model, PROMPTS[:1] * 3) for _ in range(2)]
    assert rows(completions[0]) == [of_generate(model, PROMPTS[0])] * 3
    lines = [record.getMessage() for record in caplog.records if "proxstep" in record.name]
    reasons = ("it keeps a LinearAttentionLayer", "it hands back no cache")  # one by release
    start = "MambaForCausalLM is sampled with transformers' generate, which takes longer: "
    assert len(lines) == 1
    assert lines[0].removeprefix(start) in reasons


def test_generate_draws_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """With top-k, top-p and a stop text; and their log-probabilities."""
    model = made("qwen3-tied")
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "temperature": 2.0,
        "top_k": 9,
        "top_p": 0.9,
        "with_log_probs": True,
        "stop": ["k", "fg"],
    }
    found = []
    for reason in (None, "it is a test"):
        if reason is not None:
            monkeypatch.setattr(generation._Decoder, "unrepeatable", lambda self: "it is a test")
        torch.manual_seed(3)
        found.append(sample(model, Numbers(), PROMPTS * 4, **options))
    ours, theirs = found
    assert rows(ours) == rows(theirs)
    assert torch.equal(ours.truncated_B, theirs.truncated_B)
    assert torch.allclose(ours.sampler_log_prob_BT, theirs.sampler_log_prob_BT, atol=1e-5)


def test_a_stop_text_ends_a_completion() -> None:
    model, stop = made("qwen3-tied"), ["ek", "d"]
    torch.manual_seed(0)
    completions = sample(model, Numbers(), PROMPTS * 20, max_new_tokens=8, stop=stop)
    for row, cut in zip(rows(completions), completions.truncated_B.tolist(), strict=True):
        text = Numbers().decode(row)
        stopped = any(text.endswith(end) for end in stop)
        assert not any(end in text[:-1] for end in stop)
        assert cut == (not stopped and row[-1] != 2)
    texts = [Numbers().decode(row) for row in rows(completions)]
    assert any(text.endswith("ek") for text in texts)
    assert any(text.endswith("d") for text in texts)
    assert completions.truncated_B.any()


def test_a_cache_of_an_unknown_kind_is_not_touched() -> None:
    """A subclass may hold more than the keys and values that can be selected."""
    layer = type("OtherLayer", (type(DynamicCache().layer_class_to_replicate()),), {})()
    decoder = generation._Decoder(made("qwen3-tied"))
    assert decoder.unrepeatable() == "it hands back no cache"
    decoder._cache = type("Cache", (), {"layers": [layer]})()
    assert decoder.unrepeatable() == "it keeps a OtherLayer"


def test_samples_are_not_torch_multinomials() -> None:
    """As they once were: one uniform number for a token takes less than one for each word."""
    prob_NV = torch.rand(50, 40).softmax(-1)
    torch.manual_seed(0)
    theirs = torch.multinomial(prob_NV, 1).squeeze(1)
    torch.manual_seed(0)
    ours = categorical(prob_NV, torch.rand(50, dtype=torch.float64))
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("vocab", [3, 256, 700])
def test_tokens_have_their_probabilities(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    prob_V = torch.randn(vocab, generator=generator).mul(3).softmax(-1)
    prob_V[vocab // 2 :: 2] = 0.0
    prob_V /= prob_V.sum()
    count = 40_000
    uniform_N = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # evenly: no noise
    token_N = torch.cat(
        [categorical(prob_V.expand(len(part), -1), part) for part in uniform_N.split(8_000)]
    )
    seen_V = torch.bincount(token_N, minlength=vocab) / count
    assert (seen_V[prob_V == 0] == 0).all()
    assert (seen_V - prob_V).abs().max() < 2 / count


def test_the_ends_of_the_unit_interval() -> None:
    prob_NV = torch.zeros(2, 600)
    prob_NV[:, [257, 300, 513]] = torch.tensor([0.5, 0.2, 0.3])
    last = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.zeros(1).double())
    uniform_N = torch.tensor([0.0, last.item()], dtype=torch.float64)
    assert categorical(prob_NV, uniform_N).tolist() == [257, 513]


def test_a_rows_tokens_do_not_depend_on_the_other_rows() -> None:
    tokenizer, model = build_embedded_model(seed=1)
    prompts = [tokenizer(text)["input_ids"] for text in ("1+2=", "123+456=")]
    drawn = []
    for other in (0, 1):
        torch.manual_seed(0)
        drawn.append(sample(model, tokenizer, [prompts[0], prompts[other]], max_new_tokens=6))
    assert rows(drawn[0])[0] == rows(drawn[1])[0]

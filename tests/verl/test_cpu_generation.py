"""The CPU rollout's drawing, against an oracle that knows the distribution."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from tests.verl.cpu.generation import Request, Sampling, _Drawer, complete
from transformers import Qwen3Config, Qwen3ForCausalLM

from proxstep.errors import ProxstepError

pytestmark = pytest.mark.verl

VOCAB, PAD, END = 17, 0, 1
PLAIN = Sampling(max_new_tokens=5, temperature=1.0, top_p=1.0, top_k=0, ignore_eos=True)


def tiny_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).double().eval()


def some_requests(seed: int, count: int, **changes: Any) -> list[Request]:
    chooser = random.Random(seed)
    sampling = dataclasses.replace(PLAIN, **changes)
    return [
        Request(
            tuple(chooser.randrange(2, VOCAB) for _ in range(chooser.randint(1, 9))),
            sampling,
            chooser.getrandbits(60),
        )
        for _ in range(count)
    ]


def distribution(model: Any, tokens: list[int], sampling: Sampling) -> torch.Tensor:
    """The next token's probabilities, slowly: one sequence, no cache, one token at a time."""
    logits = model(torch.tensor([tokens])).logits[0, -1] / sampling.temperature
    order = logits.argsort(descending=True).tolist()
    kept = order[: sampling.top_k or VOCAB]
    probability = {i: float(logits[kept].softmax(0)[n]) for n, i in enumerate(kept)}
    before, nucleus = 0.0, []
    for i in kept:
        if before < sampling.top_p:
            nucleus.append(i)
        before += probability[i]
    out = torch.zeros(VOCAB, dtype=torch.float64)
    out[nucleus] = logits[nucleus].softmax(0).double()
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 1.7, "top_k": 9}],
)
def test_log_probs_are_those_of_the_distribution(seed: int, changes: dict[str, Any]) -> None:
    model = tiny_model(seed)
    requests = some_requests(seed, 4, **changes)
    for request, completion in zip(requests, complete(model, requests, PAD, [END]), strict=True):
        assert len(completion.token_ids) == len(completion.log_probs) == 5
        tokens = list(request.prompt_ids)
        with torch.no_grad():
            for token, log_prob in zip(completion.token_ids, completion.log_probs, strict=True):
                expected = distribution(model, tokens, request.sampling)[token].log()
                assert log_prob == pytest.approx(
                    float(expected), abs=3e-6
                )  # generate casts to float32
                tokens.append(token)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}])
def test_tokens_are_drawn_in_proportion(changes: dict[str, Any]) -> None:
    """A chi-squared statistic, whose 99.99th percentile for 16 degrees of freedom is 45."""
    model, count = tiny_model(7), 6000
    sampling = dataclasses.replace(PLAIN, max_new_tokens=1, **changes)
    requests = [Request((4, 9, 2), sampling, seed) for seed in range(count)]
    drawn = torch.zeros(VOCAB, dtype=torch.float64)
    for completion in complete(model, requests, PAD, [END]):
        drawn[completion.token_ids[0]] += 1
    with torch.no_grad():
        expected = distribution(model, [4, 9, 2], sampling) * count
    assert drawn[expected == 0].sum() == 0
    likely = expected > 0
    assert ((drawn - expected)[likely] ** 2 / expected[likely]).sum() < 45


def test_a_completion_s_tokens_have_noise_of_their_own() -> None:
    """Pairs in proportion; the 99.99th percentile for 8 degrees of freedom is 32."""
    model, count = tiny_model(8), 4000
    sampling = dataclasses.replace(PLAIN, max_new_tokens=2, top_k=3)
    drawn = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    requests = [Request((4, 9, 2), sampling, seed) for seed in range(count)]
    for completion in complete(model, requests, PAD, [END]):
        drawn[tuple(completion.token_ids)] += 1
    with torch.no_grad():
        first = distribution(model, [4, 9, 2], sampling)
        second = [distribution(model, [4, 9, 2, token], sampling) for token in range(VOCAB)]
    expected = first[:, None] * torch.stack(second) * count
    likely = expected > 0
    assert int(likely.sum()) == 9
    assert ((drawn - expected)[likely] ** 2 / expected[likely]).sum() < 32


@pytest.mark.parametrize("seed", range(3))
def test_a_completion_does_not_depend_on_its_batch(seed: int) -> None:
    model = tiny_model(seed)
    requests = some_requests(seed, 6) + some_requests(seed + 10, 3, temperature=0.5, top_k=3)
    random.Random(seed).shuffle(requests)
    together = complete(model, requests, PAD, [END])
    for request, completion in zip(requests, together, strict=True):
        (alone,) = complete(model, [request], PAD, [END])
        assert alone.token_ids == completion.token_ids
        assert alone.log_probs == pytest.approx(completion.log_probs, abs=3e-6)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (1 - 2**-53, 4)])
def test_the_edges_of_the_unit_interval_draw_possible_tokens(uniform: float, token: int) -> None:
    drawer = _Drawer(dataclasses.replace(PLAIN, top_k=3), [0])
    drawer._uniform_BT.fill_(uniform)
    scores = torch.tensor([[-9.0, -9.0, 1.0, 2.0, 3.0, -9.0]])
    assert int(drawer(torch.zeros(1, 1), scores).argmax()) == token
    assert drawer.log_probs[0].isfinite()


def test_the_seed_alone_varies_a_prompt_s_completions() -> None:
    model = tiny_model(0)
    requests = [Request((3, 5), PLAIN, seed) for seed in (1, 1, 2, 3, 4)]
    found = [tuple(c.token_ids) for c in complete(model, requests, PAD, [END])]
    assert found[0] == found[1]
    assert len(set(found)) > 2


def test_temperature_0_takes_the_most_likely_token() -> None:
    model = tiny_model(1)
    requests = some_requests(1, 3, temperature=0.0)
    for request, completion in zip(requests, complete(model, requests, PAD, [END]), strict=True):
        tokens = list(request.prompt_ids)
        for token in completion.token_ids:
            with torch.no_grad():
                assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)


def test_a_completion_ends_with_its_end_token() -> None:
    model = tiny_model(2)
    free = some_requests(2, 40, max_new_tokens=12)
    ending = some_requests(2, 40, max_new_tokens=12, ignore_eos=False)
    lengths = set()
    for whole, cut in zip(
        complete(model, free, PAD, [END, 5]), complete(model, ending, PAD, [END, 5]), strict=True
    ):
        assert len(whole.token_ids) == 12
        at = [i for i, token in enumerate(whole.token_ids) if token in (END, 5)]
        assert cut.token_ids == whole.token_ids[: at[0] + 1 if at else 12]
        assert len(cut.log_probs) == len(cut.token_ids)
        lengths.add(len(cut.token_ids))
    assert len(lengths) > 3


def test_probabilities_that_are_not_finite_are_named() -> None:
    model = tiny_model(0)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ProxstepError, match=r"not finite.*optim\.lr"):
        complete(model, some_requests(0, 2), PAD, [END])

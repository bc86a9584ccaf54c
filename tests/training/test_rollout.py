"""Sampling: what the grid looks like, and that its log-probabilities are the sampler's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from proxstep.config.sections import UpdateSection
from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import token_log_probs
from proxstep.training.batch import Batch
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.evaluation import Drift, Probe, drift_from_initial
from proxstep.training.generation import end_tokens, sample
from proxstep.training.rollout import Completions, Cut, completion_log_probs, response_logits


@pytest.fixture(scope="module")
def policy():
    tokenizer, model = build_embedded_model(seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3.0)  # far from uniform
    return tokenizer, model.eval()


def draw(policy, *texts: str, **options) -> Completions:
    tokenizer, model = policy
    torch.manual_seed(0)
    options = {"max_new_tokens": 5, **options}
    return sample(model, tokenizer, [tokenizer(t)["input_ids"] for t in texts], **options)


def test_the_grid(policy) -> None:
    tokenizer, _ = policy
    texts = ["1+2=", "123+456=", "7*8="] * 20
    completions = draw(policy, *texts)
    for row, text in enumerate(texts):
        attended = completions.token_BT[row][completions.attention_BT[row]]
        response = completions.token_BT[row][completions.response_BT[row]]
        prompt = attended[: len(attended) - len(response)]
        assert tokenizer.decode(prompt) == text
        assert torch.equal(attended[len(prompt) :], response)
        ended = bool((response == tokenizer.eos_token_id).any())
        assert ended == (not completions.truncated_B[row])
        assert (response[:-1] != tokenizer.eos_token_id).all()
        assert len(response) == 5 or ended
    assert completions.truncated_B.any()
    assert not completions.truncated_B.all()
    for text, row in zip(completions.texts(tokenizer), range(len(texts)), strict=True):
        assert "<eos>" not in text
        assert len(text) <= completions.lengths()[row]


def test_columns_and_ids(policy) -> None:
    completions = draw(policy, "1+2=", "123+456=", "12+34=")
    part = completions.rows(torch.tensor([0]))
    part = part.columns(part.used_columns())
    assert part.attention_BT[0, 0]
    assert part.attention_BT[0, -1]
    assert torch.equal(
        part.token_BT[part.attention_BT], completions.token_BT[0][completions.attention_BT[0]]
    )
    ids = completions.sequence_ids()
    assert torch.equal(ids >= 0, completions.attention_BT)
    assert all((ids[row][ids[row] >= 0] == row).all() for row in range(3))


def test_log_probs_do_not_depend_on_padding_or_batching(policy) -> None:
    _, model = policy
    completions = draw(policy, "1+2=", "123+456=", "12+34=")
    together = completion_log_probs(model, completions, 0.7, Cut(size=3))
    apart = completion_log_probs(model, completions, 0.7, Cut(size=1))
    mask = completions.response_BT[:, 1:]
    assert torch.allclose(together[mask], apart[mask], atol=1e-5)
    for row in range(3):
        alone = completions.rows(torch.tensor([row]))
        alone = alone.columns(alone.used_columns())
        logits = model(input_ids=alone.token_BT).logits[:, :-1] / 0.7
        expected = token_log_probs(logits, alone.token_BT[:, 1:])
        assert torch.allclose(
            together[row][mask[row]], expected[alone.response_BT[:, 1:]], atol=1e-5
        )


def test_a_hub_models_own_sampling_defaults_are_left_out(policy) -> None:
    """A generation_config with top_k = 1 would make every sample greedy."""
    tokenizer, model = policy
    own = model.generation_config
    own.update(top_k=1, temperature=0.01, repetition_penalty=5.0, do_sample=True)
    completions = draw(policy, *["1+2="] * 40)
    assert len(set(completions.texts(tokenizer))) > 5
    assert model.generation_config is own
    assert own.top_k == 1


def test_sampling_follows_the_policy(policy) -> None:
    """First tokens of many samples against the model's distribution."""
    _, model = policy
    completions = draw(policy, *["1+2="] * 4000, max_new_tokens=1, temperature=2.0)
    first = completions.token_BT[completions.response_BT]
    logits = response_logits(model, completions.rows(torch.tensor([0])), 2.0)
    expected = logits[0, -1].softmax(-1)
    seen = torch.bincount(first, minlength=len(expected)) / len(first)
    assert (seen - expected).abs().max() < 5 * math.sqrt(0.25 / 4000)


def test_a_diverged_policy_is_named(policy) -> None:
    tokenizer, model = build_embedded_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ProxstepError, match="not finite"):
        draw((tokenizer, model), "1+2=")


def test_greedy_is_the_argmax(policy) -> None:
    _, model = policy
    completions = draw(policy, "1+2=", "123+456=", greedy=True)
    logits = response_logits(model, completions, 1.0)
    mask = completions.response_BT[:, 1:]
    assert torch.equal(logits.argmax(-1)[mask], completions.token_BT[:, 1:][mask])


def test_end_tokens_join_the_models_and_the_tokenizers(policy) -> None:
    tokenizer, model = policy
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [3, 4]
    try:
        assert end_tokens(model, tokenizer) == sorted({3, 4, tokenizer.eos_token_id})
    finally:
        model.generation_config.eos_token_id = own


def test_drift_is_zero_at_the_start_and_agrees_both_ways_nearby(policy) -> None:
    tokenizer, model = policy
    _, other = build_embedded_model(seed=1)
    other.load_state_dict(model.state_dict())
    other.eval()
    prompts = [tokenizer(t)["input_ids"] for t in ["1+2=", "12+34=", "8-3="] * 100]

    def drift(policy: Any) -> Drift:
        return drift_from_initial(policy, model, tokenizer, prompts, 6, Cut(size=7))

    torch.manual_seed(0)
    probe = Probe.draw(model, tokenizer, prompts, 6)
    assert probe.kl(model) == pytest.approx(0.0, abs=1e-6)
    assert drift(other).kl_policy_initial == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.1)
    forward = probe.kl(other)
    backward = drift(other).kl_policy_initial
    assert forward > 1e-5
    assert forward == pytest.approx(backward, rel=0.3)
    samples = [tokenizer("1+2=")["input_ids"]] * 50
    near = drift_from_initial(other, model, tokenizer, samples, 1, Cut(size=7))
    logits = other(torch.tensor(samples[:1])).logits[0, -1]
    exact = torch.distributions.Categorical(logits=logits).entropy().item()
    assert near.evaluation_entropy == pytest.approx(exact, rel=1e-5)
    restored = Probe.from_state_dict(probe.state_dict(), torch.device("cpu"))
    assert restored.kl(other) == forward


def test_minibatches_keep_groups_whole_and_microbatches_keep_order(policy) -> None:
    completions = draw(policy, *["1+2=", "123+456=", "12+34=", "8-3="] * 3)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    signal = torch.arange(12.0)
    old = torch.randn(12, completions.token_BT.shape[1] - 1)
    batch = Batch(completions, signal, group, torch.arange(len(group)), old)
    parts = list(batch.minibatches(2))
    assert [p.group_B.unique().tolist() for p in parts] == [[0, 1], [2, 3]]
    sizes = [[len(p.group_B.unique()) for p in batch.minibatches(n)] for n in (3, 4, 5)]
    assert sizes == [[2, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]  # as equal as can be, none empty
    micro = [m for p in parts for m in p.microbatches(UpdateSection(microbatch_size=3))]
    assert torch.cat([m.signal_B for m in micro]).tolist() == signal.tolist()
    assert [len(m) for m in micro] == [3, 2, 3, 1, 3]  # group 2 is too large, group 3 stays whole
    for m in micro:
        row = int(m.signal_B[0])
        mask = completions.response_BT[row, 1:]
        assert torch.equal(m.old_log_prob_BT[0][m.completions.response_BT[0, 1:]], old[row][mask])

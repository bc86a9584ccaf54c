"""The log-probabilities with which the tokens were drawn, and where they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proxstep.training.demo_model import build_embedded_model
from proxstep.training.evaluation import Probe
from proxstep.training.generation import sample
from proxstep.training.rollout import Completions, Cut, completion_log_probs, response_logits

TEXTS = ["1+2=", "123+456=", "12+34=", "7*8="] * 20


@pytest.fixture(scope="module")
def policy() -> tuple[Any, torch.nn.Module]:
    tokenizer, model = build_embedded_model(seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3.0)  # far from uniform
    return tokenizer, model.eval()


def draw(policy: Any, **options: Any) -> Completions:
    tokenizer, model = policy
    torch.manual_seed(0)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return sample(model, tokenizer, prompts, **{"max_new_tokens": 6, **options})


def kept(logits_V: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """The logits that top-k and then top-p leave, the others at minus infinity."""
    order = logits_V.argsort(descending=True).tolist()[: top_k or None]
    weights = logits_V[order].softmax(0).tolist()
    while top_p < 1 and sum(weights[:-1]) >= top_p:
        weights.pop()
    left = torch.full_like(logits_V, -torch.inf)
    for token in order[: len(weights)]:
        left[token] = logits_V[token]
    return left


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 1.4, "top_k": 5, "top_p": 0.8},
        {"max_new_tokens": 1, "top_k": 2},
    ],
)
def test_they_are_those_of_the_truncated_distribution(policy: Any, options: dict[str, Any]) -> None:
    completions = draw(policy, **options, with_log_probs=True)
    sampler_log_prob_BT = completions.sampler_log_prob_BT
    assert sampler_log_prob_BT is not None
    with torch.no_grad():
        logits_BTV = response_logits(policy[1], completions, options.get("temperature", 1.0))
    response_BT = completions.response_BT[:, 1:]
    assert sampler_log_prob_BT.shape == response_BT.shape
    assert (sampler_log_prob_BT[~response_BT] == 0).all()
    if not options:
        assert (completions.lengths() < 6).any()  # some ended early, and padding follows
    for b, t in response_BT.nonzero().tolist():
        left = kept(logits_BTV[b, t], options.get("top_p", 1.0), options.get("top_k", 0))
        expected = left.log_softmax(0)[completions.token_BT[b, t + 1]]
        assert sampler_log_prob_BT[b, t] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4, "top_k": 5, "top_p": 0.8}])
def test_asking_for_them_does_not_change_the_samples(policy: Any, options: dict[str, Any]) -> None:
    plain, asked = draw(policy, **options), draw(policy, **options, with_log_probs=True)
    assert plain.sampler_log_prob_BT is None
    assert torch.equal(plain.token_BT, asked.token_BT)
    assert torch.equal(plain.response_BT, asked.response_BT)


def test_without_truncation_they_are_the_policys_own(policy: Any) -> None:
    completions = draw(policy, temperature=0.7, with_log_probs=True)
    own = completion_log_probs(policy[1], completions, 0.7, Cut(size=len(completions)))
    mask = completions.response_BT[:, 1:]
    assert torch.allclose(completions.sampler_log_prob_BT[mask], own[mask], atol=1e-4)


def test_rows_and_columns_carry_them(policy: Any) -> None:
    completions = draw(policy, top_k=3, with_log_probs=True)
    whole = completions.sampler_log_prob_BT
    assert whole is not None
    index = torch.tensor([2, 0])
    part = completions.rows(index)
    part = part.columns(part.used_columns())
    assert part.sampler_log_prob_BT is not None
    assert part.sampler_log_prob_BT.shape == part.response_BT[:, 1:].shape
    for row, source in enumerate(index.tolist()):
        assert torch.equal(
            part.sampler_log_prob_BT[row][part.response_BT[row, 1:]],
            whole[source][completions.response_BT[source, 1:]],
        )
    shorter = completions.columns(slice(2, -1)).sampler_log_prob_BT
    assert shorter is not None
    assert torch.equal(shorter, whole[:, 2:-1])
    plain = draw(policy)
    assert plain.rows(index).columns(slice(1, None)).sampler_log_prob_BT is None
    assert completions.columns(slice(1, None)).sampler_log_prob_BT.shape[1] == whole.shape[1] - 1


def test_a_probe_without_them_goes_through_a_checkpoint(policy: Any) -> None:
    tokenizer, model = policy
    probe = Probe.draw(model, tokenizer, [tokenizer(text)["input_ids"] for text in TEXTS], 3)
    restored = Probe.from_state_dict(probe.state_dict(), torch.device("cpu"))
    assert restored.kl(model) == probe.kl(model)
    assert restored.completions.sampler_log_prob_BT is None

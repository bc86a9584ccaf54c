"""The adaptive temperature, and the entropy proxy that it needs."""

from __future__ import annotations

import math

import pytest
import torch
from tests.algorithms.loss_cases import SEEDS, assert_close, make_case

from proxstep.algorithms.temperature import adaptive_tau, entropy_proxy
from proxstep.errors import ProxstepError


@pytest.mark.parametrize("seed", SEEDS)
def test_the_entropy_proxy_is_the_mean_surprise(seed):
    case = make_case(seed)
    log_vocabulary = math.log(4)
    proxy_B = entropy_proxy(case.log_probs, case.response_mask, log_vocabulary=log_vocabulary)
    for b in range(6):
        mask = case.response_mask[b]
        surprise = -case.log_probs[b][mask].mean().item() if mask.any() else 0.0
        assert_close(proxy_B[b], min(surprise / log_vocabulary, 1.0))
    assert (proxy_B == 1).any()  # the clamp acts
    assert ((proxy_B > 0) & (proxy_B < 1)).any()
    assert not proxy_B.requires_grad


def test_the_entropy_proxy_estimates_the_entropy_without_a_pass_over_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    log_prob_V = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
    exact = -(log_prob_V.exp() * log_prob_V).sum() / math.log(50)
    token = torch.multinomial(log_prob_V.exp(), 40_000, replacement=True, generator=generator)
    sampled = log_prob_V[token].view(1, -1)
    mask = torch.ones_like(sampled, dtype=torch.bool)
    assert_close(
        entropy_proxy(sampled, mask, log_vocabulary=math.log(50))[0], exact, tolerance=0.01
    )
    uniform = torch.full((1, 3), -math.log(50))
    proxy_B = entropy_proxy(
        uniform, torch.ones(1, 3, dtype=torch.bool), log_vocabulary=math.log(50)
    )
    assert proxy_B.item() == pytest.approx(1.0)


@pytest.mark.parametrize("log_vocabulary", [0.0, -1.0, float("nan")])
def test_a_vocabulary_without_entropy_is_refused(log_vocabulary):
    case = make_case(0)
    with pytest.raises(ProxstepError, match="log_vocabulary is"):
        entropy_proxy(case.log_probs, case.response_mask, log_vocabulary=log_vocabulary)


def test_adaptive_tau_equals_the_formula():
    entropy, confidence = torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([1.0, 0.5, 0.0, 1.0])
    signal = torch.tensor([1.0, -1.0, 0.3, -1.0])
    expected = [0.5, 1 + 0.1 + 0.25, 1.2, 1.5]
    assert adaptive_tau(1.0, entropy, confidence, signal).tolist() == pytest.approx(expected)
    expected = [0.2, 0.35, 0.35, 0.35]
    actual = adaptive_tau(
        0.5,
        entropy,
        confidence,
        signal,
        entropy_coef=0.0,
        confidence_coef=2.0,
        high=0.35,
    )
    assert actual.tolist() == pytest.approx(expected)


def test_adaptive_tau_refuses_an_empty_range():
    ones = torch.ones(2)
    for hyper in ({"low": 0.0}, {"low": 2.0, "high": 1.0}):
        with pytest.raises(ProxstepError, match=r"low is|below low"):
            adaptive_tau(1.0, ones, ones, ones, **hyper)
    with pytest.raises(ProxstepError, match="tau is"):
        adaptive_tau(0.0, ones, ones, ones)

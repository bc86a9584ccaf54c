"""The KL estimators by enumeration: what their values and gradients are in expectation.

Every token of a small vocabulary, or every sequence of two, is weighted with its probability, so
that nothing here is sampled and every expectation is exact in float64.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import KlEstimator, kl_estimate
from proxstep.training.regularizers import kl_reward

VOCAB = 6
KINDS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")
SEEDS = range(5)


def policies(seed: int, shape: tuple[int, ...] = (VOCAB,)) -> tuple[Tensor, Tensor]:
    """Logits of a policy, a leaf, and of another."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 1.5
    return p.requires_grad_(), q


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
    return grad


def expected(kind: KlEstimator, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits, log p, log q, and the estimator's mean over tokens drawn from p."""
    logits, other = policies(seed)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    estimate = kl_estimate(log_p[None], log_q[None], kind)[0]
    return logits, log_p, log_q, (log_p.detach().exp() * estimate).sum()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_unbiased_except_for_k2(kind: KlEstimator, seed: int) -> None:
    _, log_p, log_q, mean = expected(kind, seed)
    error = (mean - kl(log_p, log_q)).abs().item()
    assert error > 1e-3 if kind == "k2" else error < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_in_a_loss(kind: KlEstimator, seed: int) -> None:
    logits, log_p, log_q, mean = expected(kind, seed)
    forward = gradient(kl(log_p, log_q), logits)
    reverse = gradient(kl(log_q, logits.log_softmax(-1)), logits)
    of = {"k1": torch.zeros_like(logits), "k2": forward, "k3": reverse}
    found = gradient(mean, logits)
    for name, grad in of.items():
        assert torch.allclose(found, grad, atol=1e-12) == (name == kind), name


@pytest.mark.parametrize("seed", SEEDS)
def test_all_three_agree_to_second_order(seed: int) -> None:
    """Near the initial policy both divergences are half the same quadratic form."""
    logits, direction = policies(seed)
    log_q = logits.detach().log_softmax(-1)
    for step in (1e-2, 1e-3):
        log_p = (logits.detach() + step * direction).log_softmax(-1)
        means = [(log_p.exp() * kl_estimate(log_p[None], log_q[None], k)[0]).sum() for k in KINDS]
        for mean in means:
            assert mean.item() == pytest.approx(kl(log_p, log_q).item(), rel=10 * step)


def two_tokens(first: Tensor, second: Tensor) -> Tensor:
    """Log-probabilities of both tokens of every sequence; the second depends on the first."""
    log_first, log_second = first.log_softmax(-1), second.log_softmax(-1)
    pairs = itertools.product(range(VOCAB), repeat=2)
    return torch.stack([torch.stack([log_first[a], log_second[a, b]]) for a, b in pairs])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_in_the_reward(kind: KlEstimator, seed: int) -> None:
    """Only k1's is that of the divergence between distributions over whole sequences."""
    coef = 0.3
    logits, other = policies(seed, (VOCAB + 1, VOCAB))
    log_p_BT = two_tokens(logits[0], logits[1:])
    log_q_BT = two_tokens(other[0], other[1:])
    log_p_B, log_q_B = log_p_BT.sum(-1), log_q_BT.sum(-1)
    mask = torch.ones_like(log_p_BT, dtype=torch.bool)
    reward_B = kl_reward(log_p_BT.detach(), log_q_BT, mask, kl_coef=coef, kind=kind)
    probability_B = log_p_B.detach().exp()
    value = (probability_B * reward_B).sum()
    divergence = kl(log_p_B, log_q_B)
    unbiased = (value + coef * divergence).abs().item() < 1e-12
    assert unbiased == (kind != "k2")
    found = gradient((probability_B * reward_B * log_p_B).sum(), logits)
    exact = gradient(-coef * divergence, logits)
    assert torch.allclose(found, exact, atol=1e-12) == (kind == "k1")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_term_of_the_loss_lacks_what_a_token_does_to_the_next_one(seed: int) -> None:
    """Even exact over the vocabulary: the tokens before are taken as they were drawn."""
    logits, other = policies(seed, (VOCAB + 1, VOCAB))
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    by_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    first = log_p[0].exp()
    whole = by_token[0] + (first * by_token[1:]).sum()
    in_loss = by_token[0] + (first.detach() * by_token[1:]).sum()
    assert whole.item() == pytest.approx(in_loss.item(), rel=1e-12)

    difference = gradient(whole - in_loss, logits)
    assert difference[0].abs().max() > 1e-3
    assert difference[1:].abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [30.0, 1e3])
def test_far_apart_policies_stay_finite(kind: KlEstimator, far: float) -> None:
    log_p = torch.tensor([[-far, -1.0]], requires_grad=True)
    log_q = torch.tensor([[-1.0, -far]])
    total = kl_estimate(log_p, log_q, kind).sum()
    assert total.isfinite()
    assert gradient(total, log_p).isfinite().all()


def test_only_completion_tokens_count_in_the_reward() -> None:
    log_p, log_q = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    log_q = log_q.masked_fill(~mask, float("nan"))
    found = kl_reward(log_p, log_q, mask, kl_coef=2.0, kind="k1")
    ratio = log_p - log_q
    by_hand = [ratio[0, :2].sum(), ratio[1, 1:].sum(), torch.tensor(0.0)]
    assert found.tolist() == pytest.approx([-2.0 * float(total) for total in by_hand])


def test_an_unknown_estimator_is_named() -> None:
    zero = torch.zeros(1, 1)
    with pytest.raises(ProxstepError, match="KL estimator is 'k4'; it must be k1, k2 or k3"):
        kl_estimate(zero, zero, "k4")  # type: ignore[arg-type]

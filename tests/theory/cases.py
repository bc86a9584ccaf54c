"""Random policies, models and functions for the checks, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.theory.maths import categorical, escort, fisher

OUTCOMES = 7


def random(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def between(seed: int, low: float, high: float) -> float:
    """A number in a range."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand((), generator=generator).item()


def close(actual: object, expected: object, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Raise AssertionError unless both are the same to rounding error, or as given."""
    left, right = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(left, right.expand_as(left), rtol=rtol, atol=atol)


def constant(value_V: Tensor) -> None:
    """Raise AssertionError unless all entries are equal."""
    close(value_V, value_V[0])


@dataclass(frozen=True)
class Case:
    """An anchor, a policy and advantages; alpha in (0.05, 0.95), mu in (0.3, 0.9)."""

    seed: int

    @property
    def anchor_V(self) -> Tensor:
        return random(self.seed, OUTCOMES).softmax(-1)

    @property
    def policy_V(self) -> Tensor:
        return (self.anchor_V.log() + 0.7 * random(self.seed + 100, OUTCOMES)).softmax(-1)

    @property
    def advantage_V(self) -> Tensor:
        return random(self.seed + 200, OUTCOMES)

    @property
    def target_V(self) -> Tensor:
        return escort.oracle(self.advantage_V)

    @property
    def alpha(self) -> float:
        return between(self.seed + 300, 0.05, 0.95)

    @property
    def mu(self) -> float:
        return between(self.seed + 400, 0.3, 0.9)

    @property
    def weight_V(self) -> Tensor:
        return escort.escort_weight(self.anchor_V, self.target_V, self.alpha)

    @property
    def drive_V(self) -> Tensor:
        """omega less its mean, not by the function under test."""
        return self.weight_V - (self.anchor_V * self.weight_V).sum()

    def function(self, number: int = 0) -> Tensor:
        return random(self.seed + 500 + 100 * number, OUTCOMES)

    def mean_zero(self, number: int = 0) -> Tensor:
        value_V = self.function(number)
        return value_V - (self.anchor_V * value_V).sum()

    def norm(self, value_V: Tensor) -> Tensor:
        return (self.anchor_V * value_V**2).sum().sqrt()


def counted(seed: int) -> tuple[Tensor, Tensor]:
    """A rational anchor, and the outcomes of a batch in which each has exactly its share."""
    generator = torch.Generator().manual_seed(seed)
    count_V = torch.randint(1, 6, (OUTCOMES,), generator=generator)
    index_B = torch.arange(OUTCOMES).repeat_interleave(count_V)
    return count_V.double() / count_V.sum(), index_B


@dataclass(frozen=True)
class Model:
    """A policy over 5 outputs for each of 2 questions, with 4 parameters, not linear in them.

    The outcomes are the 10 pairs of question and output.
    """

    seed: int

    @property
    def theta_P(self) -> Tensor:
        return 0.5 * random(self.seed + 1, 4)

    @property
    def advantage_V(self) -> Tensor:
        return random(self.seed + 2, 10)

    @property
    def direction_P(self) -> Tensor:
        return random(self.seed + 3, 4)

    def log_prob(self, theta_P: Tensor) -> Tensor:
        feature_QVP = random(self.seed + 4, 2, 5, 4)
        linear_QV = feature_QVP @ theta_P
        question_Q = torch.tensor([0.3, 0.7], dtype=torch.float64)
        log_prob_QV = (linear_QV + 0.2 * linear_QV**2).log_softmax(-1)
        return (log_prob_QV + question_Q.log()[:, None]).flatten()

    @property
    def prob_V(self) -> Tensor:
        return self.log_prob(self.theta_P).exp()

    @property
    def score_VP(self) -> Tensor:
        return fisher.scores(self.log_prob, self.theta_P)

    @property
    def fisher_PP(self) -> Tensor:
        """E[s s^T], one outcome at a time."""
        pairs = zip(self.prob_V, self.score_VP, strict=True)
        return sum(p * torch.outer(s, s) for p, s in pairs)


def hessian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The matrix of second derivatives."""
    return torch.func.jacrev(torch.func.jacrev(function))(at)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The vector of first derivatives."""
    at = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(at), at)
    return found


def softmax_log_ratio(case: Case) -> Callable[[Tensor], Tensor]:
    """Delta as a function of logits that are added to the anchor's."""
    log_anchor_V = case.anchor_V.log()
    return lambda logit_V: (log_anchor_V + logit_V).log_softmax(-1) - log_anchor_V


def variance(value_V: Tensor, prob_V: Tensor) -> Tensor:
    """Var_pi(f), by its second formula."""
    return categorical.expectation(value_V**2, prob_V) - (prob_V * value_V).sum() ** 2

"""The bandit toy's problem: a policy small enough that everything about it is a sum.

A policy over V outcomes with logits X theta. Outcome y has the score G_y = x_y - E[x], the Fisher
matrix is the features' covariance under the policy, and rewards, divergences and the natural
gradient need no sampling. The features' columns differ in scale, so that the natural gradient is
another direction than the plain one, and so do their rows, so that scores differ in length.

Legend for shape suffixes: V outcomes, D parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from proxstep.typing import Float, Tensor

NUM_OUTCOMES, NUM_FEATURES = 32, 8


@dataclass(frozen=True)
class Bandit:
    """One instance.

    Attributes:
        feature_VD: The outcomes' features X.
        reward_V: The outcomes' rewards, in [0, 1].
        start_D: The parameters of the initial policy.
    """

    feature_VD: Float[Tensor, "outcomes features"]
    reward_V: Float[Tensor, " outcomes"]
    start_D: Float[Tensor, " features"]

    def log_policy(self, theta_D: Float[Tensor, " features"]) -> Float[Tensor, " outcomes"]:
        """Return the outcomes' log-probabilities, log softmax(X theta), in nats."""
        return (self.feature_VD @ theta_D).log_softmax(dim=0)


def make_bandit(
    seed: int, *, num_outcomes: int = NUM_OUTCOMES, num_features: int = NUM_FEATURES
) -> Bandit:
    """Return an instance that follows from the seed alone.

    Features are normal, times column scales from 1 down to 0.1 and log-normal row scales; rewards
    are uniform, stretched to [0, 1]; the initial logits have standard deviation 0.5.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    column_D = torch.logspace(0, -1, num_features, dtype=torch.float64)
    row_V1 = (0.7 * normal(num_outcomes, 1)).exp()
    feature_VD = normal(num_outcomes, num_features) * column_D * row_V1
    reward_V = torch.rand(num_outcomes, generator=generator, dtype=torch.float64)
    reward_V = (reward_V - reward_V.min()) / (reward_V.max() - reward_V.min())
    start_D = normal(num_features)
    return Bandit(feature_VD, reward_V, 0.5 * start_D / (feature_VD @ start_D).std())


def step_size(
    log_prob_V: Float[Tensor, " outcomes"], tilt_V: Float[Tensor, " outcomes"], kl: float
) -> float:
    """Return how far along a direction the policy must go to spend a KL divergence, to 1e-9 of it.

    KL(pi_s || pi) = kl for the s > 0 with pi_s proportional to pi exp(s tilt).

    The divergence grows with s up to -log pi(the outcomes of largest tilt). A step that would spend
    more than half of that is none: it would leave a policy that is certain in floating point.

    Args:
        log_prob_V: The current policy, in nats.
        tilt_V: What a unit step adds to the logits.
        kl: The divergence to spend, in nats.

    Returns:
        s, or 0 for no step.
    """
    centered_V = tilt_V - log_prob_V.exp() @ tilt_V
    variance = (log_prob_V.exp() @ centered_V.square()).item()
    most = -log_prob_V[tilt_V == tilt_V.max()].logsumexp(dim=0).item()
    if variance == 0 or most < 2 * kl:
        return 0.0
    low, high, size = 0.0, math.inf, math.sqrt(2 * kl / variance)
    for _ in range(200):
        tilted_V = log_prob_V + size * centered_V
        prob_V = tilted_V.softmax(dim=0)
        mean = (prob_V @ centered_V).item()
        excess = size * mean - tilted_V.logsumexp(dim=0).item() - kl
        if abs(excess) <= 1e-9 * kl:
            break
        low, high = (size, high) if excess < 0 else (low, size)
        slope = size * (prob_V @ (centered_V - mean).square()).item()
        newton = size - excess / slope if slope > 0 else math.inf
        middle = 2 * size if high == math.inf else (low + high) / 2
        size = newton if low < newton < min(high, 4 * size) else middle
    return size

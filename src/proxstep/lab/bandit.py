"""The bandit toy: a policy whose every expectation is a sum, trained by each method in turn.

A policy over V outcomes with logits X theta. Outcome y has the score G_y = x_y - E[x], the Fisher
matrix is the features' covariance under the policy, and rewards, divergences and the natural
gradient need no sampling. The features' columns differ in scale, so that the natural gradient is
another direction than the plain one, and so do their rows, so that scores differ in length.

The training alone is random: every few updates a batch of outcomes is drawn, and each method
updates on it with the library's own objective and weight rule. Each update is scaled until it
spends the same KL divergence, so that methods differ by direction alone.

Legend for shape suffixes: V outcomes, D parameters, B sampled outcomes, T tokens of each (one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from proxstep.algorithms import (
    ALGORITHMS,
    centered_weights,
    escort_weights,
    sequence_coefficients,
)
from proxstep.algorithms.advantages import group_zscore
from proxstep.isopo.means import TrailingMeans
from proxstep.isopo.plan import Statistics
from proxstep.isopo.rule import IsometricRule, NaturalRule
from proxstep.isopo.settings import PRESETS
from proxstep.lab.categorical import (
    chi_square,
    cosines,
    fisher_matrix,
    kl,
    natural_gradient,
    scores,
)
from proxstep.typing import Float, Int, Tensor

NUM_OUTCOMES, NUM_FEATURES = 32, 8
BATCH_SIZE = 64
UPDATES_PER_ROLLOUT = 8
KL_PER_UPDATE = 1e-3
"""What an update spends, KL(new policy || current policy), in nats."""


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


@dataclass(frozen=True)
class Method:
    """How an update's direction is found.

    Attributes:
        objective: A name of `proxstep.algorithms.ALGORITHMS`; None for the exact natural gradient.
        preset: A name of `proxstep.isopo.PRESETS`; None for the objective's own gradient.
    """

    objective: str | None
    preset: str | None = None


METHODS = {
    "isopo": Method("reinforce", "isopo"),
    "isopo-npg": Method("reinforce", "isopo-npg"),
    "isopo-natural": Method("reinforce", "isopo-natural"),
    "opo": Method("opo"),
    "reinforce": Method("reinforce"),
    "dro": Method("dro"),
    "natural gradient": Method(None),
    "grpo": Method("grpo"),
    "dapo": Method("dapo"),
    "gspo": Method("gspo"),
    "cispo": Method("cispo"),
}


@dataclass(frozen=True)
class Rollout:
    """A batch of outcomes that the policy drew, one group.

    Attributes:
        outcome_B: The outcomes.
        old_log_prob_BT: Their log-probabilities when they were drawn, in nats.
        advantage_B: Their z-scored rewards.
        drive_B: OPO's centered drive of them.
    """

    outcome_B: Int[Tensor, " batch"]
    old_log_prob_BT: Float[Tensor, "batch tokens"]
    advantage_B: Float[Tensor, " batch"]
    drive_B: Float[Tensor, " batch"]


@dataclass
class Trace:
    """What one method did on one instance; divergences in nats, from the initial policy pi_0.

    Attributes:
        reward: Expected reward before the first update and after each.
        kl_policy_initial: KL(pi || pi_0), likewise.
        kl_initial_policy: KL(pi_0 || pi), likewise.
        chi_square: E_{pi_0}[(pi / pi_0 - 1)^2], likewise.
        cosine_fisher: Of each update's direction and the natural gradient, in the Fisher inner
            product; None where the method had no direction.
        cosine_euclidean: The same in the Euclidean one.
        kl_spent: KL(new policy || current policy) of each update; 0 where there was none.
    """

    reward: list[float] = field(default_factory=list)
    kl_policy_initial: list[float] = field(default_factory=list)
    kl_initial_policy: list[float] = field(default_factory=list)
    chi_square: list[float] = field(default_factory=list)
    cosine_fisher: list[float | None] = field(default_factory=list)
    cosine_euclidean: list[float | None] = field(default_factory=list)
    kl_spent: list[float] = field(default_factory=list)


def draw(
    log_prob_V: Float[Tensor, " outcomes"],
    reward_V: Float[Tensor, " outcomes"],
    uniform_B: Float[Tensor, " batch"],
) -> Rollout:
    """Return the batch that uniform numbers in [0, 1) stand for, with advantages and drives."""
    cumulative_V = log_prob_V.exp().cumsum(dim=0)
    outcome_B = torch.searchsorted(cumulative_V, uniform_B * cumulative_V[-1], right=True)
    outcome_B = outcome_B.clamp(max=len(log_prob_V) - 1)
    group_B = torch.zeros_like(outcome_B)
    advantage_B, _ = group_zscore(reward_V[outcome_B], group_B)
    weight_B, _ = escort_weights(advantage_B, group_B)
    drive_B = centered_weights(weight_B, group_B)
    return Rollout(outcome_B, log_prob_V[outcome_B][:, None], advantage_B, drive_B)


def direction(
    method: Method,
    bandit: Bandit,
    theta_D: Float[Tensor, " features"],
    rollout: Rollout,
    trailing: TrailingMeans,
) -> Float[Tensor, " features"]:
    """Return the direction in which a method moves the parameters, given a batch.

    It is a direction of ascent of any length, and 0 where nothing pushes. This update's moments are
    added to the rule's trailing means.
    """
    theta_D = theta_D.detach().requires_grad_()
    log_prob_V = bandit.log_policy(theta_D)
    score_VD = scores(log_prob_V, bandit.feature_VD).detach()
    if method.objective is None:
        return natural_gradient(score_VD, log_prob_V.detach().exp(), bandit.reward_V)
    inputs = (
        log_prob_V[rollout.outcome_B][:, None],
        rollout.old_log_prob_BT,
        rollout.drive_B if method.objective == "opo" else rollout.advantage_B,
        torch.ones_like(rollout.old_log_prob_BT, dtype=torch.bool),
    )
    objective = ALGORITHMS[method.objective]
    if method.preset is None:
        loss, _ = objective.loss(*inputs)
        (grad_D,) = torch.autograd.grad(loss, theta_D)
        return -grad_D
    coefficient_B, _, _ = sequence_coefficients(objective, *inputs)
    fisher_DD = fisher_matrix(score_VD, log_prob_V.detach().exp())
    score_BD = score_VD[rollout.outcome_B]
    rule = PRESETS[method.preset]
    assert isinstance(rule, IsometricRule | NaturalRule)
    weight_B = _weights(rule, coefficient_B, score_BD, fisher_DD, trailing)
    return weight_B @ score_BD


def _weights(
    rule: IsometricRule | NaturalRule,
    coefficient_B: Tensor,
    score_BD: Tensor,
    fisher_DD: Tensor,
    trailing: TrailingMeans,
) -> Tensor:
    """Return the rule's weights, with the whole of theta as its one layer and the exact F.

    The scale is the paper's: updates are scaled by what they spend.
    """
    fisher_sq_B = ((score_BD @ fisher_DD) * score_BD).sum(dim=1)
    ntk_BB = score_BD @ score_BD.mT
    found = Statistics(coefficient_B, fisher_sq_B, score_BD.square().sum(dim=1), ntk_BB)
    weight_B, moments, _ = replace(rule, scale="paper").weigh(found, trailing.of("theta"))
    trailing.add("theta", moments)
    return weight_B


def run_method(bandit: Bandit, method: Method, *, seed: int, steps: int) -> Trace:
    """Train one method on one instance.

    The seed is that of the uniform numbers that batches are drawn with, the same for every method;
    every `UPDATES_PER_ROLLOUT` of the steps, which are updates, share a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    theta_D, initial_V = bandit.start_D, bandit.log_policy(bandit.start_D)
    trailing, trace = TrailingMeans(decay=0.9), Trace()
    log_prob_V = initial_V
    _record(trace, log_prob_V, initial_V, bandit)
    rollout = None
    for update in range(steps):
        if rollout is None or update % UPDATES_PER_ROLLOUT == 0:
            uniform_B = torch.rand(BATCH_SIZE, generator=generator, dtype=torch.float64)
            rollout = draw(log_prob_V, bandit.reward_V, uniform_B)
        direction_D = direction(method, bandit, theta_D, rollout, trailing)
        trailing.fold()
        score_VD = scores(log_prob_V, bandit.feature_VD)
        prob_V = log_prob_V.exp()
        natural_D = natural_gradient(score_VD, prob_V, bandit.reward_V)
        fisher_DD = fisher_matrix(score_VD, prob_V)
        fisher, euclidean = cosines(direction_D, natural_D, fisher_DD)
        trace.cosine_fisher.append(fisher)
        trace.cosine_euclidean.append(euclidean)
        size = step_size(log_prob_V, bandit.feature_VD @ direction_D, KL_PER_UPDATE)
        theta_D = theta_D + size * direction_D
        before_V, log_prob_V = log_prob_V, bandit.log_policy(theta_D)
        trace.kl_spent.append(_kl(log_prob_V, before_V) if size else 0.0)
        _record(trace, log_prob_V, initial_V, bandit)
    return trace


def _record(trace: Trace, log_prob_V: Tensor, initial_V: Tensor, bandit: Bandit) -> None:
    trace.reward.append((log_prob_V.exp() @ bandit.reward_V).item())
    trace.kl_policy_initial.append(_kl(log_prob_V, initial_V))
    trace.kl_initial_policy.append(_kl(initial_V, log_prob_V))
    trace.chi_square.append(chi_square(log_prob_V.exp(), initial_V.exp()).item())


def _kl(log_prob_V: Tensor, other_log_prob_V: Tensor) -> float:
    return kl(log_prob_V.exp(), other_log_prob_V.exp()).item()


def kl_per_gain(trace: Trace) -> list[float | None]:
    """Return KL(pi || pi_0) per reward gained after each update; None where nothing was gained."""
    gains = [reward - trace.reward[0] for reward in trace.reward[1:]]
    return [
        spent / gain if gain > 0 else None
        for spent, gain in zip(trace.kl_policy_initial[1:], gains, strict=True)
    ]


def reward_at_kl(trace: Trace, kl: float) -> float | None:
    """Return the reward when KL(pi || pi_0) first reached a value, None where it never did."""
    for i, (now, reward) in enumerate(zip(trace.kl_policy_initial, trace.reward, strict=True)):
        if now >= kl:
            if i == 0:
                return reward
            before, earlier = trace.kl_policy_initial[i - 1], trace.reward[i - 1]
            return earlier + (kl - before) / (now - before) * (reward - earlier)
    return None


def quartiles(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Return the quartiles of the values that are there; None where there are none."""
    given = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if not len(given):
        return None
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = given.quantile(levels).tolist()
    return low, middle, high

"""GOPO: the advantage projected onto what a policy can do, and a squared distance to that target.

Shapes: B sequences, T token positions, N sequences of one group. In the paper's symbols: v* is
`target`, rho the sequence's ratio, v = rho - 1 is `deviation`.
"""

from __future__ import annotations

import torch

from proxstep.algorithms.advantages import Groups, check_finite
from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
    check_inputs,
    check_positive,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.algorithms.preparation import Signal, SignalInputs
from proxstep.logprobs.tokens import (
    LOG_RATIO_BOUND,
    bounded,
    masked_mean,
    masked_sum,
    token_log_ratio,
)
from proxstep.typing import Bool, Float, Int, Tensor

PAPER_MU = 0.5


def gopo(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    mu: float = PAPER_MU,
    length_normalize: bool = False,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return GOPO's bounded objective: the squared distance of the ratio to its target.

    L = mean_b (mu / 2) (rho_b - (1 + v*_b))^2
    rho_b = exp(sum_t (log pi(y_bt) - log pi_k(y_bt)))

    At rho = 1 the gradient in log pi(y_b) is -mu v*_b, which is -A_b where no target is at its
    bound. A group of equal rewards has v* = 0 and is pulled to the old policy alone.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: Those of pi_k, the policy at the start of the update, in nats; without
            gradient.
        advantages: v* of each sequence, from `bounded_target`.
        response_mask: True at the response's tokens.
        mu: Curvature of the loss, above 0; the same that made the targets.
        length_normalize: Take the mean over tokens, not the sum: off in the paper's formula, on in
            the author's code.
        aggregation: seq-mean-token-mean is the mean over sequences; with the step's counts.

    Returns:
        The loss and the per-sequence metrics `abs_delta` (nats), `chi_square` (v^2), `ratio` and
        `delta_clamped` (1 where the bound below took the gradient away).

    Raises:
        ProxstepError: The tensors do not fit together or mu is not above 0.

    Source: arXiv 2602.21269, equations 23 and 24, counted in the author's source, a revision after
    version 1 of the paper; the numbers of version 1 are not checked. mu from the experiments there.
    Differs: the log-ratio is bounded at 20 nats; a sequence beyond has no gradient. The author's
    code bounds the mean log-ratio at 5 nats; an earlier version cut the loss off below 0, which
    removed the gradient of every good sequence near rho = 1.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    check_positive("mu", mu)
    reduce = masked_mean if length_normalize else masked_sum
    delta_B = reduce(token_log_ratio(log_probs, old_log_probs, response_mask), response_mask)
    deviation_B = bounded(delta_B).expm1()
    loss_B = 0.5 * mu * (deviation_B - advantages.detach()).square()
    abs_delta_B = delta_B.detach().abs()
    return aggregate_sequences(loss_B, response_mask, aggregation), {
        "abs_delta": abs_delta_B,
        "chi_square": deviation_B.detach().square(),
        "ratio": deviation_B.detach() + 1,
        "delta_clamped": (abs_delta_B > LOG_RATIO_BOUND).to(log_probs),
    }


def bounded_target(
    advantages: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    mu: float = PAPER_MU,
    importance: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return the deviation v* that each sequence's ratio is drawn to: at least -1, of mean 0.

    v*_b = max(-1, (A_b - lambda) / mu), lambda such that the v* of each group sum to 0

    lambda is 0, and v* = A / mu, where centered advantages are all at least -mu. Otherwise it is
    found exactly: the n largest advantages of N are above the bound, so their targets sum to N - n,
    which gives lambda; n is the largest number for which that leaves the n-th above the bound.

    Args:
        advantages: One advantage per sequence; a constant added to a group's changes nothing.
        group_ids: The group (prompt) of each sequence.
        mu: Curvature of the loss, above 0.
        importance: w_b above 0, from `importance_weights`: the sum is then that of w_b v*_b. None
            where the old policy sampled.

    Returns:
        The target of each sequence, without gradient; exactly 0 in a group of equal advantages.

    Raises:
        ProxstepError: mu is not above 0 or an input is not finite.

    Source: arXiv 2602.21269, equations 16 and 20 (numbered as in `gopo`).
    Differs: the paper finds lambda by bisection. The weighted sum is ours.

    >>> target_B = bounded_target(torch.tensor([0.25, 0.25, 0.25, -0.75]), torch.zeros(4).long())
    >>> [round(target, 4) for target in target_B.tolist()]
    [0.3333, 0.3333, 0.3333, -1.0]
    """
    check_positive("mu", mu)
    check_finite("advantages", advantages)
    weight_B = torch.ones_like(advantages) if importance is None else importance
    check_finite("importance", weight_B)
    check_positive("importance", weight_B.min().item())
    groups, target_B = Groups.from_ids(group_ids), torch.empty_like(advantages)
    for group in range(len(groups.size_P)):
        member_B = groups.index_B == group
        target_B[member_B] = _projected(advantages.detach()[member_B] / mu, weight_B[member_B])
    return target_B


def _projected(
    wish_N: Float[Tensor, " group"], weight_N: Float[Tensor, " group"]
) -> Float[Tensor, " group"]:
    """Return a group's targets; its wishes are A / mu, and so v* = highest - gap, or -1."""
    gap_N, order_N = (wish_N.max() - wish_N).sort()
    weight_N = weight_N[order_N]
    kept_N = weight_N.cumsum(0)
    highest_N = (kept_N[-1] - kept_N + (weight_N * gap_N).cumsum(0)) / kept_N
    num_above = int((highest_N - gap_N > -1).sum())  # at least 1: the first gap is 0
    target_N = (highest_N[num_above - 1] - gap_N).clamp(min=-1)
    return target_N[order_N.argsort()]


def prepare(inputs: SignalInputs, *, mu: float = PAPER_MU) -> Signal:
    """Return the targets, and the share of them that are at their bound."""
    target_B = bounded_target(
        inputs.advantage_B, inputs.group_B, mu=mu, importance=inputs.importance_B
    )
    at_bound = (target_B == -1).cpu().double().mean().item()
    return Signal(target_B, inputs.importance_B, metrics={"frac_target_at_bound": at_bound})


GOPO = Algorithm(
    "gopo",
    gopo,
    level="sequence",
    about="Squared distance of the sequence's ratio to a bounded target (arXiv 2602.21269).",
    keys={
        "mu": Key(
            "Curvature of the loss; a target is at its bound where an advantage is below -mu.", gt=0
        ),
        "length_normalize": Key("Take a sequence's log-ratio per token."),
    },
    prepare=prepare,
    advantage="group-centered",
    compares=lambda options: "another algorithm",
)

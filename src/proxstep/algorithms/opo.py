"""OPO: the escort weight shapes the drive, a quadratic penalty the step, and nothing saturates.

Shapes: B sequences, T token positions. In the paper's symbols: Delta is `delta`,
v = exp(Delta) - 1 is `deviation`, omega is `weight`, and `drive` multiplies u in the loss.
"""

from __future__ import annotations

import math

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
)
from proxstep.algorithms.checks import check_choice, check_inputs, check_positive
from proxstep.errors import ProxstepError
from proxstep.logprobs.masked import masked_mean, masked_sum
from proxstep.logprobs.ratio import LOG_RATIO_BOUND, bounded, token_log_ratio
from proxstep.typing import Bool, Float, Tensor

SURROGATES = ("log", "ratio")
FORMS = ("work", "regression")

# The paper's curvature (section 9.1), and the least that `auto_mu` gives.
_PAPER_MU = 1.0


def opo(
    log_probs: Float[Tensor, "batch tokens"],
    anchor_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    mu: float = _PAPER_MU,
    surrogate: str = "log",
    form: str = "work",
    length_normalize: bool = False,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return OPO's objective: a drive against a quadratic penalty on the sequence's ratio.

    L = mean_b (-drive_b u_b + (mu / 2) u_b^2)       (form work)
    L = mean_b (mu / 2) (u_b - drive_b / mu)^2       (form regression)
    Delta_b = sum_t (log pi(y_bt) - log pi_anchor(y_bt))
    u = Delta (surrogate log) or u = v = exp(Delta) - 1 (surrogate ratio)

    The two forms differ by a constant and have one gradient. The second is never negative: it is
    the squared distance to the optimum u = drive / mu (`regression_target`), from which dL/du grows
    linearly.

    A sequence without response tokens counts nowhere, in particular not in the mean; without any
    token in the batch the loss is 0. One token is a sequence like any other. A group of equal
    rewards has drive exactly 0 (`escort_weights`), and is pulled to the anchor alone.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        anchor_log_probs: Those of the anchor, in nats: the policy frozen before the iteration's
            first update and shared by all its minibatches. They carry no gradient.
        advantages: The drive of each sequence, from `escort_weights` and `drive`.
        response_mask: True at the response's tokens.
        mu: Curvature of the penalty, above 0; alpha and tau shape the drive alone.
        surrogate: log or ratio; they agree to first order at the anchor (lemma A.1).
        form: work (equations 10 and 19) or regression (equations 16 and 17).
        length_normalize: Take Delta as the mean over tokens, not the sum: off in the paper's
            formula, on in the author's code.
        aggregation: seq-mean-token-mean (the mean over sequences), with the step's counts.

    Returns:
        The loss and the per-sequence metrics `abs_delta` (nats), `chi_square` (v^2), `ratio` and
        `delta_clamped` (1 where the bound below acted on v and the ratio).

    Raises:
        ProxstepError: The tensors do not fit together, mu is not above 0, a choice is unknown, or
            the aggregation's mode is another.

    Source: arXiv 2601.12415, equation 19 (log) and equation 10 (ratio); equation 16 (regression).
    Differs: in v, Delta is bounded at 20 nats either way, so that loss and gradient stay finite; a
    sequence beyond the bound gives the ratio surrogate no gradient. The log surrogate itself is not
    bounded.
    """
    if aggregation.mode != SEQ_MEAN_TOKEN_MEAN.mode:
        raise ProxstepError(
            f"loss_agg_mode is {aggregation.mode!r}, but opo has one value per sequence: use "
            f"{SEQ_MEAN_TOKEN_MEAN.mode!r} (for a mean over tokens inside Delta, length_normalize)."
        )
    loss_B, metrics = opo_by_sequence(
        log_probs,
        anchor_log_probs,
        advantages,
        response_mask,
        mu=mu,
        surrogate=surrogate,
        form=form,
        length_normalize=length_normalize,
    )
    return aggregate_sequences(loss_B, response_mask, aggregation), metrics


def opo_by_sequence(
    log_probs: Float[Tensor, "batch tokens"],
    anchor_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    mu: float,
    surrogate: str,
    form: str,
    length_normalize: bool,
) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, " batch"]]]:
    """Return what `opo` takes the mean of: each sequence's loss, for another aggregation.

    Args:
        log_probs: As in `opo`, and so are the others.
        anchor_log_probs: In nats.
        advantages: The drive of each sequence.
        response_mask: True at the response's tokens.
        mu: Curvature of the penalty, above 0.
        surrogate: log or ratio.
        form: work or regression.
        length_normalize: Take Delta as the mean over tokens.

    Returns:
        The loss of each sequence, of no meaning where it has no response token; and the metrics.

    Raises:
        ProxstepError: As `opo`.

    Source: as `opo`.
    """
    check_inputs(log_probs, anchor_log_probs, advantages, response_mask)
    check_positive("mu", mu)
    check_choice("surrogate", surrogate, SURROGATES)
    check_choice("form", form, FORMS)
    log_ratio_BT = token_log_ratio(log_probs, anchor_log_probs, response_mask)
    reduce = masked_mean if length_normalize else masked_sum
    delta_B = reduce(log_ratio_BT, response_mask)
    deviation_B = bounded(delta_B).expm1()
    u_B = delta_B if surrogate == "log" else deviation_B
    drive_B = advantages.detach()
    if form == "work":
        loss_B = -drive_B * u_B + 0.5 * mu * u_B.square()
    else:
        loss_B = 0.5 * mu * (u_B - regression_target(drive_B, mu=mu)).square()
    abs_delta_B = delta_B.detach().abs()
    return loss_B, {
        "abs_delta": abs_delta_B,
        "chi_square": deviation_B.detach().square(),
        "ratio": deviation_B.detach() + 1,
        "delta_clamped": (abs_delta_B > LOG_RATIO_BOUND).to(log_probs),
    }


def regression_target(
    drive_B: Float[Tensor, " batch"], *, mu: float = _PAPER_MU
) -> Float[Tensor, " batch"]:
    """Return the deviation v* at which OPO's loss is smallest.

    v*_b = drive_b / mu, which with the centered drive is (omega_b - 1) / mu. Up to a constant the
    loss is (mu / 2) (v - v*)^2.

    Args:
        drive_B: The drive of each sequence.
        mu: Curvature of the penalty, above 0.

    Returns:
        The target of each sequence; below -1 it asks for a negative probability (see `positivity`).

    Raises:
        ProxstepError: mu is not above 0.

    Source: arXiv 2601.12415, equations 11 and 18.
    """
    check_positive("mu", mu)
    return drive_B / mu


def positivity(weight_B: Float[Tensor, " batch"], *, mu: float = _PAPER_MU) -> dict[str, float]:
    """Return the shares of sequences whose weight breaks a positivity condition.

    The update pi_k (1 + v*) is a policy only where v* = (omega - 1) / mu >= -1.

    Args:
        weight_B: Escort weights of mean 1.
        mu: Curvature of the penalty, above 0.

    Returns:
        `frac_negative_target`, the share with omega < 1 - mu, and `frac_over_positivity_bound`, the
        share with omega > 1 + mu, which is how proposition 8.4 prints the condition.

    Raises:
        ProxstepError: mu is not above 0.

    Source: arXiv 2601.12415, proposition 8.4.
    Differs: the printed condition, mu >= max omega - 1, bounds v* by 1 from above, not by -1 from
    below: omega = (0, 1.5, 1.5) and mu = 0.5 satisfy it with v* = -2. Since omega >= 0, mu >= 1 is
    always enough. Both are reported.

    >>> import torch
    >>> positivity(torch.tensor([0.0, 1.5, 1.5]), mu=0.5)["frac_over_positivity_bound"]
    0.0
    """
    return target_shares(regression_target(weight_B - 1, mu=mu))


def target_shares(target_B: Float[Tensor, " batch"]) -> dict[str, float]:
    """Return the shares of targets outside [-1, 1], whatever drive they come from.

    Args:
        target_B: v* of each sequence, from `regression_target`.

    Returns:
        `frac_negative_target`, the share below -1 (a negative probability), and
        `frac_over_positivity_bound`, the share above 1 (`positivity` says what that is).
    """
    return {
        "frac_negative_target": (target_B < -1).double().mean().item(),
        "frac_over_positivity_bound": (target_B > 1).double().mean().item(),
    }


def auto_mu(drive_B: Float[Tensor, " batch"]) -> float:
    """Return a curvature that keeps every target of a rollout in [-1, 1].

    mu = max(1, max_b |drive_b|)

    With the centered drive both conditions of `positivity` hold: mu >= max omega - 1 and
    mu >= 1 - min omega. With the z-scored drive the targets lie in [-1, 1] too. Without centering
    (drive none) they lie in [0, 1]: no probability turns negative under any mu, and mu only keeps
    the target below twice the anchor; their mean is above 0, so they are no policy either way.

    It is one number for a whole rollout: taken anew in each minibatch, the curvature would depend
    on the minibatch's drive, which is the coupling that OPO avoids (theorem 8.1).

    Args:
        drive_B: The drive of every sequence of the rollout.

    Returns:
        The curvature; 1, the paper's, where no drive is larger.

    Source: arXiv 2601.12415, section 8.5, safeguard (i), which says "large enough".
    """
    return max(_PAPER_MU, drive_B.abs().max().item())


def clip_target(
    drive_B: Float[Tensor, " batch"], *, mu: float, target_min: float
) -> Float[Tensor, " batch"]:
    """Return the drive whose target is at least a bound: v* clipped from below.

    drive'_b = max(drive_b, mu target_min), so that drive' / mu = max(v*, target_min); up to a
    constant the loss depends on the drive through that alone.

    In the ratio surrogate it keeps the target's probability pi_k (1 + v*) at or above
    (1 + target_min) pi_k. In the log surrogate, where the target of Delta is v* and no probability
    can turn negative, it bounds how far a sequence is pushed down, in nats. Either way the targets
    no longer have mean 0: (iii) of section 8.5, the projection onto the simplex, restores that for
    a categorical policy and lives in `proxstep.theory`.

    Args:
        drive_B: The drive of each sequence.
        mu: Curvature of the penalty, above 0.
        target_min: The bound, in [-1, 0).

    Returns:
        The drive, changed only where its target was below the bound.

    Raises:
        ProxstepError: mu is not above 0, or target_min is not in [-1, 0).

    Source: arXiv 2601.12415, section 8.5, safeguard (ii), with target_min = -1 + epsilon.
    """
    check_positive("mu", mu)
    if not -1 <= target_min < 0:
        raise ProxstepError(
            f"target_min is {target_min}; it must be in [-1, 0): -1 lets a probability reach 0."
        )
    return drive_B.clamp(min=mu * target_min)


def tv_bound(chi_square: float) -> float:
    """Return what a chi-square divergence allows at most in total variation.

    TV(pi, pi_k) <= sqrt(E_{pi_k}[v^2]) / 2

    Args:
        chi_square: E[v^2], the mean over sequences of `opo`'s metric `chi_square`: the mean comes
            before the square root.

    Returns:
        The bound, 0 where the policies are equal; above 1 it says nothing.

    Source: arXiv 2601.12415, proposition A.3.
    """
    return math.sqrt(chi_square) / 2

"""OPO: the escort weight shapes the drive, a quadratic penalty the step, and nothing saturates.

Shapes: B sequences, T token positions, P groups. In the paper's symbols: Delta is `delta`,
v = exp(Delta) - 1 is `deviation`, omega is `weight`, and `drive` multiplies u in the loss.
"""

from __future__ import annotations

from proxstep.advantages import Groups, batch_normalized, check_finite, group_zscore
from proxstep.errors import ProxstepError
from proxstep.losses.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
)
from proxstep.losses.checks import check_choice, check_inputs, check_positive
from proxstep.losses.ratio import LOG_RATIO_BOUND, bounded, token_log_ratio
from proxstep.masked import masked_mean, masked_sum
from proxstep.types import Bool, Float, Int, Tensor

ANCHOR_CORRECTIONS = ("absorbed", "length", "sequence")
DRIVES = ("center", "zscore", "none")
NORMALIZATIONS = ("group", "batch")
SURROGATES = ("log", "ratio")


def escort_weights(
    advantages: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    alpha: float = 0.4,
    tau: float | Float[Tensor, " batch"] = 1.0,
    anchor_sequence_log_probs: Float[Tensor, " batch"] | None = None,
    lengths: Int[Tensor, " batch"] | None = None,
    anchor_correction: str = "absorbed",
    normalize: str = "group",
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return the escort weight of each sequence, with mean 1 in its group.

    log omega_b = (1 - alpha) (A_b / tau_b - s_b) + constant, the constant such that omega has mean
    1; computed as a softmax, so that no advantage is too large. Equal exponents give exactly 1.

    The correction s_b stands for the anchor's probability in omega = rho / pi_k:
        absorbed: s = 0. The sequences were drawn from the anchor and the target is the anchor
            tilted by the advantage, so the factor cancels (appendix A.3, step 2).
        length:   s = log pi_k(y_b) / length_b, what the author's code does.
        sequence: s = log pi_k(y_b), equation 7 read literally. Its spread over sequences is tens
            of nats, so that one of the group takes nearly all the weight: watch
            `effective_sample_size`.

    Args:
        advantages: One advantage per sequence.
        group_ids: The group (prompt) of each sequence.
        alpha: In [0, 1]. Towards 1 the weights are uniform (conservative); towards 0 they are
            softmax(A / tau) times the group's size (aggressive).
        tau: Temperature of the advantages, in their unit; a number or one per sequence.
        anchor_sequence_log_probs: log pi_k(y_b) in nats; needed by the corrections length and
            sequence.
        lengths: Response tokens of each sequence; needed by the correction length.
        anchor_correction: absorbed, length or sequence.
        normalize: Where the mean is 1: group or batch.

    Returns:
        The weights, without gradient, and the metrics `effective_sample_size` (mean over groups of
        (sum omega)^2 / sum omega^2, in sequences), `effective_sample_size_min` (its smallest) and
        `weight_max`.

    Raises:
        ProxstepError: alpha or tau is out of range, a choice is unknown, an input is missing or not
            finite.

    Source: arXiv 2601.12415, equations 4-7 and algorithm 1, line 5; alpha = 0.4 from section 9.1.
    Differs: the mean over the sample is made exactly 1 (equation 6), which the paper leaves to
    z-scoring. The paper has no tau in its formulas; here it divides the advantage, so that mu alone
    sets the curvature (theorem 8.1).

    >>> import torch
    >>> advantages, group_ids = torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])
    >>> weight_B, _ = escort_weights(advantages, group_ids)
    >>> [round(weight, 4) for weight in weight_B.tolist()]
    [1.2913, 0.7087, 1.0, 1.0]
    """
    _check_escort(advantages, group_ids, alpha, tau, anchor_correction, normalize)
    correction_B = _anchor_correction(anchor_correction, anchor_sequence_log_probs, lengths)
    groups = Groups.from_ids(group_ids) if normalize == "group" else Groups.whole_batch(group_ids)
    exponent_B = (1 - alpha) * (advantages.detach() / tau - correction_B)
    unnormalized_B = (exponent_B - groups.max(exponent_B)[groups.index_B]).exp()
    weight_B = unnormalized_B / groups.mean(unnormalized_B)[groups.index_B]
    sample_size_P = groups.sum(weight_B).square() / groups.sum(weight_B.square())
    return weight_B, {
        "effective_sample_size": sample_size_P.mean().item(),
        "effective_sample_size_min": sample_size_P.min().item(),
        "weight_max": weight_B.max().item(),
    }


def drive(
    weight_B: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    kind: str = "center",
    normalize: str = "group",
) -> Float[Tensor, " batch"]:
    """Return the drive of each sequence: what `opo` takes as its advantages.

    center: omega - 1, the projection that keeps probability normalized (remark 6.2).
    zscore: (omega - mean) / std, section 4.1's z-scoring; 0 where all weights are equal.
    none:   omega, algorithm 1 as printed. On-policy that is a likelihood weighted by the
        advantage: it never pushes down.

    Args:
        weight_B: Escort weights of mean 1, from `escort_weights`.
        group_ids: The group (prompt) of each sequence.
        kind: center, zscore or none.
        normalize: Where zscore takes mean and standard deviation, as in `escort_weights`: group or
            batch.

    Returns:
        The drive.

    Raises:
        ProxstepError: A choice is unknown; or, with zscore, a group has one sequence.

    Source: arXiv 2601.12415, equation 18, remark 6.2 and section 4.1.
    """
    check_choice("kind", kind, DRIVES)
    check_choice("normalize", normalize, NORMALIZATIONS)
    if kind == "center":
        return weight_B - 1
    if kind == "zscore":
        zscore = group_zscore if normalize == "group" else batch_normalized
        return zscore(weight_B, group_ids)[0]
    return weight_B


def opo(
    log_probs: Float[Tensor, "batch tokens"],
    anchor_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    mu: float = 1.0,
    surrogate: str = "log",
    length_normalize: bool = False,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return OPO's objective: a drive against a quadratic penalty on the sequence's ratio.

    L = mean_b (-drive_b u_b + (mu / 2) u_b^2)
    Delta_b = sum_t (log pi(y_bt) - log pi_anchor(y_bt))
    u = Delta (surrogate log) or u = v = exp(Delta) - 1 (surrogate ratio)

    The optimum is u = drive / mu (`regression_target`); dL/du grows linearly with the distance.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        anchor_log_probs: Those of the anchor, in nats: the policy frozen before the iteration's
            first update and shared by all its minibatches. They carry no gradient.
        advantages: The drive of each sequence, from `escort_weights` and `drive`.
        response_mask: True at the response's tokens.
        mu: Curvature of the penalty, above 0; alpha and tau shape the drive alone.
        surrogate: log or ratio; they agree to first order at the anchor (lemma A.1).
        length_normalize: Take Delta as the mean over tokens, not the sum: off in the paper's
            formula, on in the author's code.
        aggregation: seq-mean-token-mean (the mean over sequences), with the step's counts.

    Returns:
        The loss and the per-sequence metrics `abs_delta` (nats), `chi_square` (v^2), `ratio` and
        `delta_clamped` (1 where the bound below acted on v and the ratio).

    Raises:
        ProxstepError: The tensors do not fit together, mu is not above 0, a choice is unknown, or
            the aggregation's mode is another.

    Source: arXiv 2601.12415, equation 19 (log) and equation 10 (ratio).
    Differs: in v, Delta is bounded at 20 nats either way, so that loss and gradient stay finite; a
    sequence beyond the bound gives the ratio surrogate no gradient. The log surrogate itself is not
    bounded.
    """
    check_inputs(log_probs, anchor_log_probs, advantages, response_mask)
    check_positive("mu", mu)
    check_choice("surrogate", surrogate, SURROGATES)
    if aggregation.mode != SEQ_MEAN_TOKEN_MEAN.mode:
        raise ProxstepError(
            f"loss_agg_mode is {aggregation.mode!r}, but opo has one value per sequence: use "
            f"{SEQ_MEAN_TOKEN_MEAN.mode!r} (for a mean over tokens inside Delta, length_normalize)."
        )
    log_ratio_BT = token_log_ratio(log_probs, anchor_log_probs, response_mask)
    reduce = masked_mean if length_normalize else masked_sum
    delta_B = reduce(log_ratio_BT, response_mask)
    deviation_B = bounded(delta_B).expm1()
    u_B = delta_B if surrogate == "log" else deviation_B
    loss_B = -advantages.detach() * u_B + 0.5 * mu * u_B.square()
    abs_delta_B = delta_B.detach().abs()
    metrics = {
        "abs_delta": abs_delta_B,
        "chi_square": deviation_B.detach().square(),
        "ratio": deviation_B.detach() + 1,
        "delta_clamped": (abs_delta_B > LOG_RATIO_BOUND).to(log_probs),
    }
    return aggregate_sequences(loss_B, response_mask, aggregation), metrics


def regression_target(
    drive_B: Float[Tensor, " batch"], *, mu: float = 1.0
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


def positivity(weight_B: Float[Tensor, " batch"], *, mu: float = 1.0) -> dict[str, float]:
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
    target_B = regression_target(weight_B - 1, mu=mu)
    return {
        "frac_negative_target": (target_B < -1).double().mean().item(),
        "frac_over_positivity_bound": (target_B > 1).double().mean().item(),
    }


def adaptive_tau(
    tau: float,
    anchor_entropy_B: Float[Tensor, " batch"],
    confidence_B: Float[Tensor, " batch"],
    reward_signal_B: Float[Tensor, " batch"],
    *,
    entropy_coef: float = 0.2,
    confidence_coef: float = 0.5,
    low: float = 0.2,
    high: float = 1.5,
) -> Float[Tensor, " batch"]:
    """Return a temperature per sequence: higher where the anchor was unsure or confident and wrong.

    tau_b = clamp(tau (1 + a H_b - b confidence_b reward_signal_b), low, high)

    Args:
        tau: The base temperature.
        anchor_entropy_B: Normalized entropy H of the anchor, in [0, 1].
        confidence_B: 1 minus the normalized entropy of the current policy, in [0, 1].
        reward_signal_B: How good the sequence was, in [-1, 1].
        entropy_coef: a, the weight of the anchor's entropy.
        confidence_coef: b, the weight of the confidence.
        low: Smallest temperature, above 0.
        high: Largest temperature.

    Returns:
        The temperature of each sequence, for `escort_weights`.

    Raises:
        ProxstepError: tau or low is not above 0, or high is below low.

    Source: arXiv 2601.12415, section 9.1, which names the range only; rule and coefficients are the
    author's configuration.
    Differs: there the temperature divides the log-ratio; here it divides the advantage (see
    `escort_weights`).
    """
    check_positive("tau", tau)
    check_positive("low", low)
    if high < low:
        raise ProxstepError(f"high is {high}, below low, {low}: give low <= high.")
    factor_B = (
        1 + entropy_coef * anchor_entropy_B - confidence_coef * confidence_B * reward_signal_B
    )
    return (tau * factor_B).clamp(low, high)


def _check_escort(
    advantages: Tensor,
    group_ids: Tensor,
    alpha: float,
    tau: float | Tensor,
    anchor_correction: str,
    normalize: str,
) -> None:
    if advantages.ndim != 1 or advantages.shape != group_ids.shape or not len(advantages):
        raise ProxstepError(
            "advantages and group_ids must be vectors of one entry per sequence, got shapes "
            f"{tuple(advantages.shape)} and {tuple(group_ids.shape)}."
        )
    check_finite("advantages", advantages)
    if not 0 <= alpha <= 1:
        raise ProxstepError(f"alpha is {alpha}; it must be in [0, 1] (1 is uniform weights).")
    if isinstance(tau, Tensor):
        check_finite("tau", tau)
    check_positive("tau", tau.min().item() if isinstance(tau, Tensor) else tau)
    check_choice("anchor_correction", anchor_correction, ANCHOR_CORRECTIONS)
    check_choice("normalize", normalize, NORMALIZATIONS)


def _anchor_correction(
    anchor_correction: str, anchor_sequence_log_probs: Tensor | None, lengths: Tensor | None
) -> Tensor | float:
    if anchor_correction == "absorbed":
        return 0.0
    if anchor_sequence_log_probs is None:
        raise ProxstepError(
            f"anchor_correction {anchor_correction!r} needs anchor_sequence_log_probs."
        )
    check_finite("anchor_sequence_log_probs", anchor_sequence_log_probs)
    if anchor_correction == "sequence":
        return anchor_sequence_log_probs.detach()
    if lengths is None:
        raise ProxstepError("anchor_correction 'length' needs lengths, the response tokens.")
    return anchor_sequence_log_probs.detach() / lengths.clamp(min=1)

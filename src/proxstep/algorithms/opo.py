"""OPO: the escort weight says what to learn, a quadratic penalty how far to move.

Shapes: B sequences, T token positions. In the paper's symbols: omega is `weight`, pi_k the old
policy, Delta is `delta`, v = exp(Delta) - 1 is `deviation`, and the drive multiplies u in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from proxstep.algorithms.advantages import Groups, check_finite
from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.algorithms.checks import check_choice, check_inputs, check_positive
from proxstep.algorithms.preparation import Signal, SignalInputs
from proxstep.algorithms.safeguards import (
    PAPER_MU,
    auto_mu,
    clip_target,
    regression_target,
    target_shares,
)
from proxstep.algorithms.temperature import adaptive_tau as temperatures
from proxstep.algorithms.temperature import entropy_proxy
from proxstep.errors import ProxstepError
from proxstep.logprobs.masked import masked_mean, masked_sum
from proxstep.logprobs.ratio import LOG_RATIO_BOUND, bounded, token_log_ratio
from proxstep.typing import Bool, Float, Int, Tensor

SURROGATES = ("log", "ratio")
DRIVES = ("center", "zscore", "none")
NORMALIZATIONS = ("group", "batch")
ANCHOR_CORRECTIONS = ("absorbed", "length")

# Guards the division by a standard deviation of about 0, as the advantages' z-scores do.
_STD_EPS = 1e-6


def opo(
    log_probs: Float[Tensor, "batch tokens"],
    anchor_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    mu: float = PAPER_MU,
    surrogate: str = "log",
    length_normalize: bool = False,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return OPO's objective: a drive against a quadratic penalty on the sequence's ratio.

    L = mean_b (-drive_b u_b + (mu / 2) u_b^2)
    Delta_b = sum_t (log pi(y_bt) - log pi_k(y_bt))
    u = Delta (surrogate log) or u = v = exp(Delta) - 1 (surrogate ratio)

    Up to a constant it is (mu / 2) (u - drive / mu)^2, the squared distance to `regression_target`:
    dL/du grows linearly from there.

    A sequence without response tokens counts nowhere, in particular not in the mean; without any
    token in the batch the loss is 0. One token is a sequence like any other. A group of equal
    rewards has drive exactly 0 (`escort_weights`), and is pulled to the old policy alone.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        anchor_log_probs: Those of pi_k, in nats: the policy frozen before the iteration's first
            update and shared by all its minibatches. They carry no gradient.
        advantages: The drive of each sequence, from `escort_weights` and `centered_weights`.
        response_mask: True at the response's tokens.
        mu: Curvature of the penalty, above 0; alpha and tau shape the drive alone.
        surrogate: log or ratio; they agree to first order at the old policy (lemma A.1).
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
    length_normalize: bool,
) -> tuple[Float[Tensor, " batch"], dict[str, Float[Tensor, " batch"]]]:
    """Return what `opo` takes the mean of: each sequence's loss, for another aggregation.

    Arguments, errors and source are those of `opo`; a loss has no meaning where a sequence has no
    response token.
    """
    check_inputs(log_probs, anchor_log_probs, advantages, response_mask)
    check_positive("mu", mu)
    check_choice("surrogate", surrogate, SURROGATES)
    reduce = masked_mean if length_normalize else masked_sum
    delta_B = reduce(token_log_ratio(log_probs, anchor_log_probs, response_mask), response_mask)
    deviation_B = bounded(delta_B).expm1()
    u_B = delta_B if surrogate == "log" else deviation_B
    loss_B = -advantages.detach() * u_B + 0.5 * mu * u_B.square()
    abs_delta_B = delta_B.detach().abs()
    return loss_B, {
        "abs_delta": abs_delta_B,
        "chi_square": deviation_B.detach().square(),
        "ratio": deviation_B.detach() + 1,
        "delta_clamped": (abs_delta_B > LOG_RATIO_BOUND).to(log_probs),
    }


def escort_weights(
    advantages: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    alpha: float = 0.4,
    tau: float | Float[Tensor, " batch"] = 1.0,
    correction: Float[Tensor, " batch"] | None = None,
    normalize: str = "group",
    importance: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
    """Return the escort weight of each sequence, with mean 1 in its group.

    log omega_b = (1 - alpha) (A_b / tau_b - s_b) + constant, the constant such that omega has mean
    1; computed as a softmax, so that no advantage is too large. Equal exponents give exactly 1.

    The mean is that under the old policy. Where another policy sampled, it is the mean weighted by
    `importance`: sum_b w_b omega_b / sum_b w_b = 1.

    Args:
        advantages: One advantage per sequence.
        group_ids: The group (prompt) of each sequence.
        alpha: In [0, 1]. Towards 1 the weights are uniform (conservative); towards 0 they are
            softmax(A / tau) times the group's size (aggressive).
        tau: Temperature of the advantages, in their unit; a number or one per sequence.
        correction: s_b in nats, for the old policy's factor in omega = rho / pi_k. None is 0: the
            sequences were drawn from pi_k and the target is pi_k tilted by the advantage, so the
            factor cancels (appendix A.3, step 2). The author's code takes log pi_k(y_b) / length_b.
            Equation 7 read literally is log pi_k(y_b), whose spread of tens of nats gives one
            sequence of the group nearly all the weight: watch `effective_sample_size`.
        normalize: Where the mean is 1: group or batch.
        importance: w_b above 0, from `importance_weights`; None where the old policy sampled.

    Returns:
        The weights, without gradient, and the metrics `effective_sample_size` (mean over groups of
        (sum w omega)^2 / sum (w omega)^2, in sequences), `effective_sample_size_min` (its smallest)
        and `weight_max`.

    Raises:
        ProxstepError: alpha, tau or an importance weight is out of range, a choice is unknown, an
            input is not finite.

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
    if advantages.ndim != 1 or advantages.shape != group_ids.shape or not len(advantages):
        raise ProxstepError(
            "advantages and group_ids must be vectors of one entry per sequence, got shapes "
            f"{tuple(advantages.shape)} and {tuple(group_ids.shape)}."
        )
    if not 0 <= alpha <= 1:
        raise ProxstepError(f"alpha is {alpha}; it must be in [0, 1] (1 is uniform weights).")
    check_finite("advantages", advantages)
    if isinstance(tau, Tensor):
        check_finite("tau", tau)
    check_positive("tau", tau.min().item() if isinstance(tau, Tensor) else tau)
    tilt_B = advantages.detach() / tau
    check_finite("advantages / tau", tilt_B)
    if correction is not None:
        check_finite("correction", correction)
        tilt_B = tilt_B - correction.detach()
    groups = _groups(group_ids, normalize, importance)
    exponent_B = (1 - alpha) * tilt_B
    unnormalized_B = (exponent_B - groups.max(exponent_B)[groups.index_B]).exp()
    weight_B = unnormalized_B / _mean(unnormalized_B, groups, importance)[groups.index_B]
    share_B = weight_B if importance is None else importance * weight_B
    sample_size_P = groups.sum(share_B).square() / groups.sum(share_B.square())
    return weight_B, {
        "effective_sample_size": sample_size_P.mean().item(),
        "effective_sample_size_min": sample_size_P.min().item(),
        "weight_max": weight_B.max().item(),
    }


def centered_weights(
    weight_B: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    kind: str = "center",
    normalize: str = "group",
    importance: Float[Tensor, " batch"] | None = None,
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
        importance: As in `escort_weights`; zscore weights its mean and variance with them.

    Returns:
        The drive.

    Raises:
        ProxstepError: A choice is unknown, an importance weight is not above 0; or, with zscore,
            there is a group of one sequence.

    Source: arXiv 2601.12415, equation 18, remark 6.2 and section 4.1.
    """
    check_choice("kind", kind, DRIVES)
    groups = _groups(group_ids, normalize, importance)
    if kind == "none":
        return weight_B
    if kind == "center":
        return weight_B - 1
    if (groups.size_P == 1).any():
        raise ProxstepError(
            "drive zscore compares the sequences of a group, and there is a group of one: set "
            "num_generations to 2 or more, or choose the drive center."
        )
    above_lowest_B = weight_B - groups.min(weight_B)[groups.index_B]  # 0 where all are equal
    center_B = above_lowest_B - _mean(above_lowest_B, groups, importance)[groups.index_B]
    size_P = groups.size_P.to(weight_B)
    unbiased_P = size_P / (size_P - 1)
    std_P = (_mean(center_B.square(), groups, importance) * unbiased_P).sqrt()
    return center_B / (std_P + _STD_EPS)[groups.index_B]


def _mean(value_B: Tensor, groups: Groups, importance_B: Tensor | None) -> Tensor:
    """Return each group's mean under the old policy."""
    if importance_B is None:
        return groups.mean(value_B)
    return groups.sum(importance_B * value_B) / groups.sum(importance_B)


def _groups(group_ids: Tensor, normalize: str, importance: Tensor | None) -> Groups:
    check_choice("normalize", normalize, NORMALIZATIONS)
    if importance is not None:
        check_finite("importance", importance)
        check_positive("importance", importance.min().item())
    return Groups.from_ids(group_ids) if normalize == "group" else Groups.whole_batch(group_ids)


def prepare(
    inputs: SignalInputs,
    *,
    alpha: float = 0.4,
    tau: float = 1.0,
    adaptive_tau: bool = False,
    tau_min: float = 0.2,
    tau_max: float = 1.5,
    tau_entropy_coef: float = 0.2,
    tau_confidence_coef: float = 0.5,
    mu: float | Literal["auto"] = PAPER_MU,
    target_min: float | None = None,
    drive: str = "center",
    normalize: str = "group",
    anchor_correction: str = "absorbed",
) -> Signal:
    """Return OPO's drive and the curvature that goes with it (arXiv 2601.12415, algorithm 1)."""
    old = inputs.old_policy
    tau_B: float | Tensor = tau
    if adaptive_tau:
        assert old is not None  # OPO.reads_old_policy
        entropy_B = entropy_proxy(
            old.log_prob_BT, old.response_BT, log_vocabulary=math.log(old.vocabulary_size)
        ).cpu()
        tau_B = temperatures(
            tau,
            entropy_B,
            1 - entropy_B,  # before the rollout's first update the current policy is the old one
            inputs.advantage_B.clamp(-1.0, 1.0),
            entropy_coef=tau_entropy_coef,
            confidence_coef=tau_confidence_coef,
            low=tau_min,
            high=tau_max,
        )
    correction_B = None
    if anchor_correction == "length":
        assert old is not None
        length_B = old.response_BT.sum(dim=1).clamp(min=1)
        correction_B = (old.sequence_log_probs() / length_B).cpu()
    where = {"normalize": normalize, "importance": inputs.importance_B}
    weight_B, metrics = escort_weights(
        inputs.advantage_B, inputs.group_B, alpha=alpha, tau=tau_B, correction=correction_B, **where
    )
    drive_B = centered_weights(weight_B, inputs.group_B, kind=drive, **where)
    curvature = auto_mu(drive_B) if mu == "auto" else mu
    metrics |= target_shares(regression_target(drive_B, mu=curvature))
    if target_min is not None:
        drive_B = clip_target(drive_B, mu=curvature, target_min=target_min)
    mean_tau = tau_B.mean().item() if isinstance(tau_B, Tensor) else tau_B
    metrics |= {"alpha": alpha, "tau": mean_tau, "mu": curvature}
    return Signal(drive_B, inputs.importance_B, {"mu": curvature}, metrics)


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for keys that do not go together."""
    if options["target_min"] is not None and options["drive"] == "none":
        raise ValueError(
            "objective.target_min bounds the target from below, and objective.drive none has no "
            "target below 0: leave one of them out"
        )
    low, tau, high = options["tau_min"], options["tau"], options["tau_max"]
    if options["adaptive_tau"] and not low <= tau <= high:
        raise ValueError(
            f"objective.tau {tau} is not between objective.tau_min {low} and objective.tau_max "
            f"{high}"
        )
    for name in ("tau_min", "tau_max", "tau_entropy_coef", "tau_confidence_coef"):
        if not options["adaptive_tau"] and options[name] != OPO.defaults[name]:
            raise ValueError(
                f"objective.{name} is of the adaptive temperature: add objective.adaptive_tau "
                "true, or leave it out"
            )


OPO = Algorithm(
    "opo",
    opo,
    level="sequence",
    about="Escort-weighted drive with a quadratic penalty (arXiv 2601.12415).",
    keys={
        "alpha": Key("Escort exponent: 1 is uniform (conservative), 0 aggressive.", ge=0, le=1),
        "tau": Key("Temperature of the advantage in the escort weight.", ge=1e-6),
        "adaptive_tau": Key(
            "Each sequence's own temperature, from how likely the old policy found its tokens and "
            "from its advantage; tau is the base."
        ),
        "tau_min": Key("adaptive_tau: the smallest.", ge=1e-6),
        "tau_max": Key("adaptive_tau: the largest.", gt=0),
        "tau_entropy_coef": Key(
            "adaptive_tau: how far the old policy's entropy raises the temperature.", ge=0
        ),
        "tau_confidence_coef": Key(
            "adaptive_tau: how far being confident and wrong raises it, and being confident and "
            "right lowers it.",
            ge=0,
        ),
        "mu": Key(
            'Curvature of the chi-square penalty; "auto" is the largest drive of the rollout, at '
            "least 1: no target is more than one old probability away.",
            gt=0,
        ),
        "target_min": Key(
            "Smallest target drive / mu, such as -0.999; null for no bound.", ge=-1, lt=0
        ),
        "surrogate": Key("Eq. 19 (log) or eq. 10 (ratio).", choices=SURROGATES),
        "drive": Key("omega - 1, z-scored omega, or omega as in algorithm 1.", choices=DRIVES),
        "normalize": Key(
            "Where the escort weights have mean 1: in each prompt's group, or in the whole "
            "rollout.",
            choices=NORMALIZATIONS,
        ),
        "anchor_correction": Key(
            "The old policy's factor in eq. 7; see docs/algorithms.md.", choices=ANCHOR_CORRECTIONS
        ),
        "length_normalize": Key("Log-ratios per token."),
    },
    prepare=prepare,
    aggregates=False,
    on_policy="has no penalty to pay: objective.mu changes nothing",
    reads_old_policy=lambda options: (
        options["anchor_correction"] != "absorbed" or options["adaptive_tau"]
    ),
    compares=lambda options: "objective.normalize batch" if options["normalize"] == "group" else "",
    check=check,
)

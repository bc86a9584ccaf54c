"""OPO: the escort weight says what to learn, a quadratic penalty how far to move.

Shapes: B sequences, T token positions. In the paper's symbols: omega is `weight`, pi_k the old
policy, Delta is `delta`, v = exp(Delta) - 1 is `deviation`, and the drive multiplies u in the loss.
"""

from __future__ import annotations

from typing import Literal

from proxstep.algorithms.aggregate import (
    SEQ_MEAN_TOKEN_MEAN,
    Aggregation,
    LossAndMetrics,
    aggregate_sequences,
    check_choice,
    check_inputs,
    check_positive,
)
from proxstep.algorithms.base import Algorithm, Key
from proxstep.algorithms.escort import DRIVES, NORMALIZATIONS, centered_weights, escort_weights
from proxstep.algorithms.preparation import Signal, SignalInputs, mean_log_probs
from proxstep.algorithms.safeguards import (
    PAPER_MU,
    SAFEGUARD_KEYS,
    auto_mu,
    check_safeguards,
    clip_target,
    regression_target,
    target_shares,
)
from proxstep.algorithms.temperature import (
    TEMPERATURE_KEYS,
    adaptive_temperature,
    check_temperature,
)
from proxstep.logprobs.tokens import (
    LOG_RATIO_BOUND,
    bounded,
    masked_mean,
    masked_sum,
    token_log_ratio,
)
from proxstep.typing import Bool, Float, Tensor

SURROGATES = ("log", "ratio")
ANCHOR_CORRECTIONS = ("absorbed", "length")


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
        aggregation: seq-mean-token-mean is the mean over sequences; with the step's counts.

    Returns:
        The loss and the per-sequence metrics `abs_delta` (nats), `chi_square` (v^2), `ratio` and
        `delta_clamped` (1 where the bound below acted on v and the ratio).

    Raises:
        ProxstepError: The tensors do not fit together, mu is not above 0 or a choice is unknown.

    Source: arXiv 2601.12415, equation 19 (log) and equation 10 (ratio).
    Differs: in v, Delta is bounded at 20 nats either way, so that loss and gradient stay finite; a
    sequence beyond the bound gives the ratio surrogate no gradient. The log surrogate itself is not
    bounded.
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
    return aggregate_sequences(loss_B, response_mask, aggregation), {
        "abs_delta": abs_delta_B,
        "chi_square": deviation_B.detach().square(),
        "ratio": deviation_B.detach() + 1,
        "delta_clamped": (abs_delta_B > LOG_RATIO_BOUND).to(log_probs),
    }


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
    tau_B: float | Tensor = tau
    if adaptive_tau:
        coefs = {"entropy_coef": tau_entropy_coef, "confidence_coef": tau_confidence_coef}
        tau_B = adaptive_temperature(inputs, tau, low=tau_min, high=tau_max, **coefs)
    correction_B = mean_log_probs(inputs) if anchor_correction == "length" else None
    where = {"normalize": normalize, "importance": inputs.importance_B}
    advantage_B, group_B = inputs.advantage_B, inputs.group_B
    weight_B, metrics = escort_weights(
        advantage_B, group_B, alpha=alpha, tau=tau_B, correction=correction_B, **where
    )
    drive_B = centered_weights(weight_B, group_B, kind=drive, **where)
    curvature = auto_mu(drive_B) if mu == "auto" else mu
    metrics |= target_shares(regression_target(drive_B, mu=curvature))
    if target_min is not None:
        drive_B = clip_target(drive_B, mu=curvature, target_min=target_min)
    mean_tau = tau_B.mean().item() if isinstance(tau_B, Tensor) else tau_B
    metrics |= {"alpha": alpha, "tau": mean_tau, "mu": curvature}
    return Signal(drive_B, inputs.importance_B, {"mu": curvature}, metrics)


OPO = Algorithm(
    "opo",
    opo,
    level="sequence",
    about="Escort-weighted drive with a quadratic penalty (arXiv 2601.12415).",
    keys={
        "alpha": Key(
            "Escort exponent: 1 weights all alike (conservative), 0 is aggressive.", ge=0, le=1
        ),
        "tau": Key("Temperature of the advantage in the escort weight.", ge=1e-6),
        **TEMPERATURE_KEYS,
        **SAFEGUARD_KEYS,
        "surrogate": Key(
            "The loss acts on the log-ratio (eq. 19) or on the ratio (eq. 10).", choices=SURROGATES
        ),
        "drive": Key(
            "The drive: omega - 1, z-scored omega, or omega as in algorithm 1.", choices=DRIVES
        ),
        "normalize": Key(
            "The escort weights have mean 1 in each prompt's group, or in the whole rollout.",
            choices=NORMALIZATIONS,
        ),
        "anchor_correction": Key(
            "How the old policy's factor in eq. 7 is treated; see docs/algorithms/opo.md.",
            choices=ANCHOR_CORRECTIONS,
        ),
        "length_normalize": Key("Take a sequence's log-ratio per token."),
    },
    prepare=prepare,
    on_policy="has no penalty to pay: objective.mu changes nothing",
    reads_old_policy=lambda options: (
        options["anchor_correction"] != "absorbed" or options["adaptive_tau"]
    ),
    compares=lambda options: "objective.normalize batch" if options["normalize"] == "group" else "",
    checks=(check_temperature, check_safeguards),
)

"""OPO's safeguards: what keeps the target a policy, and what a step can cost at most.

Shapes: B sequences. In the paper's symbols: v* is `target`, omega is `weight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from proxstep.algorithms.aggregate import check_positive
from proxstep.algorithms.base import Key
from proxstep.errors import ProxstepError
from proxstep.typing import Float, Tensor

PAPER_MU = 1.0
"""The paper's curvature (section 9.1), and the least that `auto_mu` gives."""


def regression_target(
    drive_B: Float[Tensor, " batch"], *, mu: float = PAPER_MU
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


def positivity(weight_B: Float[Tensor, " batch"], *, mu: float = PAPER_MU) -> dict[str, float]:
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
        "frac_negative_target": (target_B < -1).cpu().double().mean().item(),
        "frac_over_positivity_bound": (target_B > 1).cpu().double().mean().item(),
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
    return max(PAPER_MU, drive_B.abs().max().item())


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
    a categorical policy (`tests/theory/maths/simplex.py`).

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


SAFEGUARD_KEYS = {
    "mu": Key(
        'Curvature of the chi-square penalty; "auto" is the largest drive of the rollout, and at '
        "least 1, so that targets lie between 0 and twice the old probability.",
        gt=0,
    ),
    "target_min": Key(
        "Lower bound of the targets drive / mu, such as -0.999; null for none.", ge=-1, lt=0
    ),
}


def check_safeguards(options: Mapping[str, Any]) -> None:
    """Raise ValueError where there is no target to bound."""
    if options["target_min"] is not None and options["drive"] == "none":
        raise ValueError(
            "objective.target_min bounds the target from below, and objective.drive none has no "
            "target below 0: leave one of them out"
        )

"""The escort family between the anchor and the oracle, and the weight that it gives an outcome.

Shapes: V outcomes. `anchor_V` is pi_k, `target_V` the oracle P*.
"""

from __future__ import annotations

from proxstep.errors import ProxstepError
from proxstep.typing import Float, Tensor
from tests.theory.maths.categorical import check_positive_policy


def oracle(advantage_V: Float[Tensor, " outcomes"]) -> Float[Tensor, " outcomes"]:
    """Return the oracle as printed, P*(y) proportional to exp(A(y)).

    Args:
        advantage_V: The advantage of each outcome.

    Returns:
        The oracle, whatever the anchor.

    Source: arXiv 2601.12415, section 4.1.
    """
    return advantage_V.softmax(dim=-1)


def tilted_oracle(
    advantage_V: Float[Tensor, " outcomes"], anchor_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, " outcomes"]:
    """Return the anchor tilted by the advantage, P*(y) proportional to pi_k(y) exp(A(y)).

    With this oracle the escort weight is proportional to exp((1 - alpha) A): the anchor's
    probability cancels, which is what `proxstep.algorithms.escort_weights` assumes by default.

    Args:
        advantage_V: The advantage of each outcome.
        anchor_V: The anchor.

    Returns:
        The oracle.

    Raises:
        ProxstepError: The anchor is no policy without zeros.

    Source: arXiv 2601.12415, appendix A.3, step 2.
    Differs: the paper keeps P* proportional to exp(A) and lets the sampling measure absorb the
    factor; for samples from the anchor that is this oracle.
    """
    check_positive_policy("anchor_V", anchor_V)
    return (anchor_V.log() + advantage_V).softmax(dim=-1)


def escort(
    anchor_V: Float[Tensor, " outcomes"], target_V: Float[Tensor, " outcomes"], alpha: float
) -> Float[Tensor, " outcomes"]:
    """Return the escort distribution, rho proportional to pi_k^alpha P*^(1 - alpha).

    Args:
        anchor_V: The anchor, rho at alpha = 1.
        target_V: The oracle, rho at alpha = 0.
        alpha: In [0, 1].

    Returns:
        The point at alpha of the e-geodesic between the two.

    Raises:
        ProxstepError: alpha is out of range, or one of the two is no policy without zeros.

    Source: arXiv 2601.12415, equation 4 and proposition 4.2.
    """
    return _exponent(anchor_V, target_V, alpha).softmax(dim=-1)


def escort_weight(
    anchor_V: Float[Tensor, " outcomes"], target_V: Float[Tensor, " outcomes"], alpha: float
) -> Float[Tensor, " outcomes"]:
    """Return the escort weight omega = rho / pi_k, whose mean under the anchor is 1.

    Args:
        anchor_V: The anchor.
        target_V: The oracle.
        alpha: In [0, 1]. Towards 1 the weight is 1 everywhere, towards 0 it is P* / pi_k.

    Returns:
        The weight of each outcome.

    Raises:
        ProxstepError: As `escort`.

    Source: arXiv 2601.12415, equations 5 and 6.
    """
    return escort(anchor_V, target_V, alpha) / anchor_V


def log_normalizer(
    anchor_V: Float[Tensor, " outcomes"], target_V: Float[Tensor, " outcomes"], alpha: float
) -> Float[Tensor, ""]:
    """Return log Z, Z = sum_y pi_k(y)^alpha P*(y)^(1 - alpha).

    It is at most 0, and -log Z is the smallest value of alpha KL(q || pi_k) + (1 - alpha)
    KL(q || P*) over policies q, taken at q = rho.

    Args:
        anchor_V: The anchor.
        target_V: The oracle.
        alpha: In [0, 1].

    Returns:
        The logarithm of the escort's normalizer, in nats.

    Raises:
        ProxstepError: As `escort`.

    Source: arXiv 2601.12415, equation 23.
    """
    return _exponent(anchor_V, target_V, alpha).logsumexp(dim=-1)


def _exponent(anchor_V: Tensor, target_V: Tensor, alpha: float) -> Tensor:
    check_positive_policy("anchor_V", anchor_V)
    check_positive_policy("target_V", target_V)
    if not 0 <= alpha <= 1:
        raise ProxstepError(f"alpha is {alpha}; it must be in [0, 1] (1 is the anchor).")
    return alpha * anchor_V.log() + (1 - alpha) * target_V.log()

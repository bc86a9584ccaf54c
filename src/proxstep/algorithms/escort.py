"""OPO's escort weight and what is made of it: how much each sequence is worth, in log space.

Shapes: B sequences, P groups. In the paper's symbols: omega is `weight`, pi_k the old policy, and
the drive multiplies u in the loss.
"""

from __future__ import annotations

from proxstep.algorithms.advantages import Groups, check_finite
from proxstep.algorithms.aggregate import check_choice, check_positive
from proxstep.errors import ProxstepError
from proxstep.typing import Float, Int, Tensor

DRIVES = ("center", "zscore", "none")
NORMALIZATIONS = ("group", "batch")

# Guards the division by a standard deviation of about 0, as the advantages' z-scores do.
_STD_EPS = 1e-6


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
    tilt_B = _tilt(advantages, tau, correction)
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


def _tilt(advantage_B: Tensor, tau: float | Tensor, correction_B: Tensor | None) -> Tensor:
    """Return A_b / tau_b - s_b, all of them finite."""
    check_finite("advantages", advantage_B)
    if isinstance(tau, Tensor):
        check_finite("tau", tau)
    check_positive("tau", tau.min().item() if isinstance(tau, Tensor) else tau)
    tilt_B = advantage_B.detach() / tau
    check_finite("advantages / tau", tilt_B)
    if correction_B is None:
        return tilt_B
    check_finite("correction", correction_B)
    return tilt_B - correction_B.detach()


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

"""Exact quantities of a policy over few outcomes: every expectation is a sum.

Legend for shape suffixes: V outcomes, D parameters.
"""

from __future__ import annotations

import torch

from proxstep.typing import Float, Tensor


def scores(
    log_prob_V: Float[Tensor, " outcomes"], feature_VD: Float[Tensor, "outcomes features"]
) -> Float[Tensor, "outcomes features"]:
    """Return G_y = d log pi(y) / d theta = x_y - E[x] of every outcome, for logits X theta."""
    return feature_VD - log_prob_V.exp() @ feature_VD


def fisher_matrix(
    score_VD: Float[Tensor, "outcomes features"], prob_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, "features features"]:
    """Return F = E[G G^T], the covariance of the scores."""
    return score_VD.mT @ (prob_V[:, None] * score_VD)


def natural_gradient(
    score_VD: Float[Tensor, "outcomes features"],
    prob_V: Float[Tensor, " outcomes"],
    reward_V: Float[Tensor, " outcomes"],
) -> Float[Tensor, " features"]:
    """Return F^-1 g, the natural gradient of the expected reward.

    F's pseudo-inverse: a direction that does not move the policy is left at 0.

    Source: arXiv 2512.23353, section 1.2.
    """
    advantage_V = reward_V - (prob_V * reward_V).sum()
    gradient_D = score_VD.mT @ (prob_V * advantage_V)
    eigenvalue_D, eigenvector_DD = torch.linalg.eigh(fisher_matrix(score_VD, prob_V))
    resolution = len(eigenvalue_D) * torch.finfo(eigenvalue_D.dtype).eps * eigenvalue_D[-1]
    inverse_D = torch.where(eigenvalue_D > resolution, 1 / eigenvalue_D, 0.0)
    return eigenvector_DD @ (inverse_D * (eigenvector_DD.mT @ gradient_D))


def chi_square(
    prob_V: Float[Tensor, " outcomes"], other_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, ""]:
    """Return the Pearson divergence, sum_y other(y) (pi(y) / other(y) - 1)^2."""
    return (other_V * (prob_V / other_V - 1).square()).sum()


def kl(
    prob_V: Float[Tensor, " outcomes"], other_V: Float[Tensor, " outcomes"]
) -> Float[Tensor, ""]:
    """Return KL(pi || other) = sum_y pi(y) log(pi(y) / other(y)), in nats."""
    xlogy = torch.special.xlogy
    return (xlogy(prob_V, prob_V) - xlogy(prob_V, other_V)).sum()


def cosines(
    direction_D: Float[Tensor, " features"],
    natural_D: Float[Tensor, " features"],
    fisher_DD: Float[Tensor, "features features"],
) -> tuple[float, float] | tuple[None, None]:
    """Return the cosine to the natural gradient in the Fisher and in the Euclidean inner product.

    The first is also the share of the natural gradient's first-order reward gain that a step of the
    same KL divergence has in this direction, since <d, F^-1 g>_F = d.g.

    Args:
        direction_D: The direction d.
        natural_D: The natural gradient F^-1 g.
        fisher_DD: The Fisher matrix F.

    Returns:
        Both, or None twice where a direction has no length.
    """

    def cosine(metric_DD: Tensor) -> float | None:
        product = direction_D @ metric_DD @ natural_D
        squares = (direction_D @ metric_DD @ direction_D) * (natural_D @ metric_DD @ natural_D)
        return (product / squares.sqrt()).item() if squares > 0 else None

    fisher, euclidean = cosine(fisher_DD), cosine(torch.eye(len(natural_D)).to(fisher_DD))
    return (None, None) if fisher is None or euclidean is None else (fisher, euclidean)

"""How much of the gradient's noise is between prompts, how much within, and what that makes cheap.

With advantages against the mean of a prompt's n completions, a prompt's part of the gradient is a
mean over pairs of completions,

    u_p = 1 / (n - 1) sum_i a_i G_i = mean over i < j of h_ij,   h_ij = (a_i - a_j) (G_i - G_j) / 2,

a U-statistic whose expectation is the prompt's gradient gamma_p, free of the shrinkage 1 - 1/n that
the baseline causes. So the noise of P prompts with n completions each is, for any P and n >= 2,

    (tau^2 + W(n)) / P,   W(n) = (4 (n - 2) zeta_1 + 2 zeta_2) / (n (n - 1))

tau^2 is the variance of gamma_p between prompts, zeta_1 that of h given one of its completions, and
zeta_2 that of h. The products <h_ij, h_kl> with no, one and two completions in common estimate
|gamma_p|^2, |gamma_p|^2 + zeta_1 and |gamma_p|^2 + zeta_2 without bias, which takes 4 completions;
products of different prompts' u estimate the square of the mean gradient.

Legend for shape suffixes: M microbatches, B sequences, padded to the largest microbatch; n
completions of one prompt, Q prompts of one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from proxstep.typing import Float, Int, Tensor

_FEWEST = 4
_CENTERED = 1e-4
"""The mean of a group's coefficients beside the largest of all, where a baseline centers them."""


@dataclass(frozen=True)
class NoiseSplit:
    """The parts of the plain gradient's noise, in units of the contributions' squared length.

    They are unbiased, and so may be negative where they are small; average them over steps.

    Attributes:
        num_prompts: Prompts that were measured.
        num_generations: Completions of each, on average.
        squared_gradient: |E gamma_p|^2.
        between: tau^2, the variance between prompts.
        single: zeta_1, the variance that one of a pair's completions makes.
        pair: zeta_2, the variance of a pair.
    """

    num_prompts: float
    num_generations: float
    squared_gradient: float
    between: float
    single: float
    pair: float

    def within(self, num_generations: float) -> float:
        """Return W(n), a prompt's noise by its completions."""
        n = num_generations
        return max(0.0, (4 * (n - 2) * self.single + 2 * self.pair) / (n * (n - 1)))

    def variance(self, num_prompts: float, num_generations: float) -> float:
        """Return the expected squared error of the mean gradient of so many prompts."""
        return (max(0.0, self.between) + self.within(num_generations)) / num_prompts

    def critical_prompts(self, num_generations: float) -> float:
        """Return the prompts at which noise and gradient are equally long; infinite if hidden."""
        noise = self.variance(1, num_generations)
        return noise / self.squared_gradient if self.squared_gradient > 0 else math.inf

    def cheapest(self, num_prompts: int, num_generations: int) -> tuple[int, int]:
        """Return the prompts and generations of the fewest completions with no more noise."""
        allowed = self.variance(num_prompts, num_generations) * (1 + 1e-9)
        best = num_prompts, num_generations
        for generations in range(2, num_prompts * num_generations + 1):
            noise = self.variance(1, generations)
            prompts = max(1, math.ceil(noise / allowed)) if allowed > 0 else num_prompts
            if prompts * generations < best[0] * best[1]:
                best = prompts, generations
        return best

    def sentence(self) -> str:
        """Return what follows from the split."""
        prompts, generations = round(self.num_prompts), round(self.num_generations)
        whole = self.variance(1, generations)
        if whole <= 0:
            return "The gradient has no noise that could be split."
        share = max(0.0, self.between) / whole
        text = f"{share:.0%} of the noise is between prompts, the rest between their completions"
        critical = self.critical_prompts(generations)
        if math.isfinite(critical):
            text += f"; noise and gradient are equally long at {critical:.3g} x {generations}"
        other = self.cheapest(prompts, generations)
        part = other[0] * other[1] / (prompts * generations)
        if part > _WORTH:
            return f"{text}. You sample {prompts} x {generations}, and nothing is much cheaper."
        return (
            f"{text}. You sample {prompts} x {generations}; {other[0]} x {other[1]} would have the "
            f"same noise at {part:.0%} of the rollouts."
        )


_WORTH = 0.95
"""A share of the rollouts that saves too little to speak of."""


def pooled(splits: Sequence[NoiseSplit]) -> NoiseSplit | None:
    """Return the average of several steps' splits, None of none."""
    if not splits:
        return None
    parts = [asdict(split) for split in splits]
    return NoiseSplit(**{name: math.fsum(p[name] for p in parts) / len(parts) for name in parts[0]})


def noise_split(
    coefficient_MB: Float[Tensor, "microbatches batch"],
    ntk_MBB: Float[Tensor, "microbatches batch batch"],
    group_MB: Int[Tensor, "microbatches batch"],
) -> NoiseSplit | None:
    """Return the split of a step's noise.

    Args:
        coefficient_MB: The coefficients: advantages against the mean of their group, in any unit.
        ntk_MBB: The kernels <G_b, G_c>.
        group_MB: Each sequence's group, -1 in the padding and where it is unknown.

    Returns:
        The split; None where no microbatch has two groups of four sequences or more, or where
        coefficients are not centered in their group.

    Source: Hoeffding (1948), "A class of statistics with asymptotically normal distribution",
        for the variance of a U-statistic.
    """
    moments, sizes, cross, num_pairs = torch.zeros(3, dtype=torch.float64), [], 0.0, 0
    known_X = coefficient_MB[group_MB >= 0]
    allowed = _CENTERED * known_X.abs().max().item() if len(known_X) else 0.0
    for coefficient_B, ntk_BB, group_B in zip(coefficient_MB, ntk_MBB, group_MB, strict=True):
        weights: list[Tensor] = []
        for group in group_B.unique():
            rows = (group_B == group).nonzero().squeeze(1)
            a_n = coefficient_B[rows].double()
            if group < 0 or len(rows) < _FEWEST:
                continue
            if a_n.sum().abs() > allowed * len(rows):
                return None
            moments += _pair_moments(a_n, ntk_BB[rows][:, rows].double())
            sizes.append(len(rows))
            weight_B = torch.zeros(len(group_B), dtype=torch.float64)
            weight_B[rows] = a_n / (len(rows) - 1)
            weights.append(weight_B)
        if len(weights) > 1:
            weight_QB = torch.stack(weights)
            product_QQ = weight_QB @ ntk_BB.double() @ weight_QB.mT
            cross += (product_QQ.sum() - product_QQ.trace()).item()
            num_pairs += len(weights) * (len(weights) - 1)
    if not num_pairs:
        return None
    apart, one_shared, both_shared = (moments / len(sizes)).tolist()
    return NoiseSplit(
        num_prompts=len(sizes),
        num_generations=sum(sizes) / len(sizes),
        squared_gradient=cross / num_pairs,
        between=apart - cross / num_pairs,
        single=one_shared - apart,
        pair=both_shared - apart,
    )


def _pair_moments(a_n: Float[Tensor, " n"], ntk_nn: Float[Tensor, "n n"]) -> Float[Tensor, " 3"]:
    """Return the means of <h_ij, h_kl> over pairs with no, one and two completions in common."""
    n = len(a_n)
    difference_nn = a_n[:, None] - a_n[None, :]
    square_n = ntk_nn.diagonal()
    distance_nn = square_n[:, None] + square_n[None, :] - 2 * ntk_nn
    both = (difference_nn.square() * distance_nn).sum() / 4
    # Row i holds the coefficients of sum_j h_ij.
    row_nn = (difference_nn.sum(dim=1) / 2).diag() - difference_nn / 2
    one = (row_nn @ ntk_nn @ row_nn.mT).trace() - both
    all_n = row_nn.sum(dim=0)
    apart = all_n @ ntk_nn @ all_n - 2 * both - 4 * one
    pairs = n * (n - 1)
    triples = pairs * (n - 2)
    return torch.stack([apart / (triples * (n - 3)), one / triples, both / pairs])

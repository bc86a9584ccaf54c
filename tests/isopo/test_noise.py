"""Gradient noise and conflict against explicit gradients: exact formulas, expectations, loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxstep.isopo.diagnostics.noise import (
    Contributions,
    conflict_share,
    independent_units,
    noise_moments,
    noise_scale,
)

seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def padded_products(contributions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inner products and present sequences of microbatches of contributions (..., b, d)."""
    size = max(c.shape[-2] for c in contributions)
    leading = contributions[0].shape[:-2]
    products = torch.zeros(*leading, len(contributions), size, size, dtype=torch.float64)
    present = torch.zeros(*leading, len(contributions), size, dtype=torch.bool)
    for m, c in enumerate(contributions):
        products[..., m, : c.shape[-2], : c.shape[-2]] = c @ c.mT
        present[..., m, : c.shape[-2]] = True
    return products, present


def single_units(present: Tensor) -> Tensor:
    return torch.arange(present.shape[-1]).expand_as(present).where(present, -1)


def assert_unbiased(estimate: Tensor, truth: float, precision: float) -> None:
    """The mean is within 4 standard errors, and these are small enough to notice a bias."""
    error = estimate.std() / len(estimate) ** 0.5
    assert error < precision * truth
    assert abs(estimate.mean() - truth) < 4 * error


# -- the noise scale -------------------------------------------------------------------------------


@given(seeds, st.integers(2, 9))
@settings(deadline=None, max_examples=50)
def test_one_microbatch_is_the_textbook_formula(seed: int, batch: int) -> None:
    contributions = normal(batch, 5, seed=seed)
    products, present = padded_products([contributions])
    squared_gradient, variance = noise_moments(products, single_units(present))
    s = sum(float(g @ g) for g in contributions) / batch
    mean = contributions.sum(0) / batch
    m = float(mean @ mean)
    assert float(squared_gradient) == pytest.approx((batch * m - s) / (batch - 1), abs=1e-12)
    assert float(variance) == pytest.approx(batch * (s - m) / (batch - 1), abs=1e-12)


def test_both_moments_are_unbiased_over_microbatches_of_several_sizes() -> None:
    mean = torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 0.2, 0.7], dtype=torch.float64)
    batches = [mean + spread * normal(20_000, b, 4, seed=b) for b in (3, 1, 5)]
    products, present = padded_products(batches)
    squared_gradient, variance = noise_moments(products, single_units(present))
    assert_unbiased(squared_gradient, float(mean @ mean), precision=0.02)
    assert_unbiased(variance, float(spread @ spread), precision=0.02)


def grouped_contributions() -> tuple[Tensor, Tensor, float, float]:
    """Two microbatches of three groups of four, whose sequences share their prompt's effect.

    Returns:
        Products and groups of many trials, |G|^2, and tr(Sigma): the mean over N sequences misses
        G by (4 prompt^2 + own^2) dim / N, squared.
    """
    mean = torch.tensor([0.8, -0.4, 0.2], dtype=torch.float64)
    prompt, own = 0.6, 0.9
    batches = []
    for seed in (1, 2):
        effect = prompt * normal(20_000, 3, 1, 3, seed=seed)
        batches.append(
            (mean + effect + own * normal(20_000, 3, 4, 3, seed=10 + seed)).flatten(1, 2)
        )
    products, _ = padded_products(batches)
    groups = torch.arange(3).repeat_interleave(4).expand(20_000, 2, 12)
    return products, groups, float(mean @ mean), 3 * (4 * prompt**2 + own**2)


def test_groups_as_units_are_unbiased_where_sequences_share_a_prompt() -> None:
    products, groups, squared_truth, variance_truth = grouped_contributions()
    unit, between_groups = independent_units(groups, torch.ones_like(groups, dtype=torch.bool))
    assert between_groups
    squared_gradient, variance = noise_moments(products, unit)
    assert_unbiased(squared_gradient, squared_truth, precision=0.02)
    assert_unbiased(variance, variance_truth, precision=0.02)


def test_sequences_as_units_underrate_the_noise_of_groups() -> None:
    """The direction that the summary and the documentation name."""
    products, groups, squared_truth, variance_truth = grouped_contributions()
    sequences = single_units(torch.ones_like(groups, dtype=torch.bool))
    squared_gradient, variance = noise_moments(products, sequences)
    assert squared_gradient.mean() > 1.2 * squared_truth
    assert variance.mean() < 0.8 * variance_truth


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_what_a_group_baseline_does_to_a_pair(group_size: int) -> None:
    """E<g_i, g_j> = ((1 - 1/n)^2 + 1/n^2) |gamma|^2, by summing over every group of samples."""
    logits = normal(3, seed=0)
    prob = logits.softmax(0)
    score = torch.eye(3, dtype=torch.float64) - prob  # d log pi(action) / d logits, per action
    reward = normal(3, seed=1)
    gamma = (prob * reward) @ score
    pair, single = torch.tensor(0.0), torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=group_size):
        index = list(actions)
        chance = prob[index].prod()
        advantage = reward[index] - reward[index].mean()
        g = advantage[:, None] * score[index]
        pair = pair + chance * (g[0] @ g[1])
        single = single + chance * g[0]
    kept = 1 - 1 / group_size
    assert torch.allclose(single, kept * gamma)
    assert float(pair) == pytest.approx(float((kept**2 + 1 / group_size**2) * (gamma @ gamma)))


@given(seeds, st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=30)
def test_the_scale_of_the_coefficients_cancels(seed: int, factor: float) -> None:
    contributions = normal(6, 5, seed=seed) + 1.0
    ratios = []
    for scaled in (contributions, factor * contributions):
        products, present = padded_products([scaled])
        ratios.append(float(noise_scale(*noise_moments(products, single_units(present)))))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)


def test_noise_that_hides_the_gradient_is_infinite() -> None:
    g = normal(1, 4, seed=0)
    products, present = padded_products([torch.cat([g, -g])])
    squared_gradient, variance = noise_moments(products, single_units(present))
    assert squared_gradient < 0 < variance
    assert noise_scale(squared_gradient, variance) == torch.inf


def test_equal_contributions_have_no_noise() -> None:
    g = normal(1, 4, seed=0)
    products, present = padded_products([g.expand(5, 4)])
    squared_gradient, variance = noise_moments(products, single_units(present))
    assert float(squared_gradient) == pytest.approx(float((g * g).sum()))
    assert float(noise_scale(squared_gradient, variance)) == pytest.approx(0, abs=1e-12)


def test_what_says_nothing_is_unknown() -> None:
    zeros, present = padded_products([torch.zeros(3, 4, dtype=torch.float64)])
    squared_gradient, variance = noise_moments(zeros, single_units(present))
    assert squared_gradient == variance == 0
    assert noise_scale(squared_gradient, variance).isnan()
    single, present = padded_products([normal(1, 4, seed=0), normal(1, 4, seed=1)])
    assert all(value.isnan() for value in noise_moments(single, single_units(present)))


def test_a_microbatch_of_one_sequence_adds_nothing() -> None:
    many, one = normal(4, 5, seed=0), 100 * normal(1, 5, seed=1)
    alone, present_alone = padded_products([many])
    both, present_both = padded_products([many, one])
    for a, b in zip(
        noise_moments(alone, single_units(present_alone)),
        noise_moments(both, single_units(present_both)),
        strict=True,
    ):
        assert torch.allclose(a, b)


# -- what was drawn independently ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "between_groups"),
    [
        ([[0, 0, 1, 1], [2, 2, 3, 3]], True),
        ([[0, 0, 0, 0], [2, 2, 3, 3]], True),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], False),
        ([[0, 0, 1, 1], [2, 2, 3, -1]], False),
        ([[-1, -1, -1, -1], [-1, -1, -1, -1]], False),
    ],
)
def test_units_are_groups_where_a_microbatch_can_compare_two(
    groups: list[list[int]], between_groups: bool
) -> None:
    group = torch.tensor(groups)
    present = torch.ones_like(group, dtype=torch.bool)
    unit, found = independent_units(group, present)
    assert found == between_groups
    assert torch.equal(unit, group if between_groups else single_units(present))


def test_padding_belongs_to_no_unit() -> None:
    group = torch.tensor([[0, 0, 1, -1], [0, 1, -1, -1]])
    present = group >= 0
    assert torch.equal(independent_units(group, present)[0], group)
    alone = torch.tensor([[0, 0, 0, -1]])
    assert independent_units(alone, alone >= 0)[0].tolist() == [[0, 1, 2, -1]]


# -- conflict --------------------------------------------------------------------------------------


@given(seeds)
@settings(deadline=None, max_examples=50)
def test_conflict_is_counted_pair_by_pair(seed: int) -> None:
    batches = [normal(b, 3, seed=seed + b) for b in (6, 4)]
    for batch in batches:
        batch[1] = 0  # a sequence without a coefficient
    products, present = padded_products(batches)
    group = torch.randint(0, 3, present.shape, generator=torch.Generator().manual_seed(seed))
    group = group.where(present, -1)
    opposed = pairs = 0
    for m, batch in enumerate(batches):
        for b, c in itertools.combinations(range(len(batch)), 2):
            if group[m, b] == group[m, c] and float(batch[b] @ batch[c]) != 0:
                pairs += 1
                opposed += float(batch[b] @ batch[c]) < 0
    share = float(conflict_share(products, group))
    assert share == pytest.approx(opposed / pairs) if pairs else share != share


def test_conflict_needs_groups_and_pairs() -> None:
    products, present = padded_products([normal(4, 3, seed=0)])
    assert conflict_share(products, torch.full_like(present, -1, dtype=torch.long)).isnan()
    assert conflict_share(products, torch.arange(4)[None]).isnan()
    assert conflict_share(torch.zeros_like(products), torch.zeros(1, 4, dtype=torch.long)).isnan()


# -- the whole model -------------------------------------------------------------------------------


def two_uses(seed: int) -> tuple[list[Tensor], Contributions]:
    """Two uses' explicit gradients of 2 microbatches of 4 sequences, and the same as kernels."""
    gradients = [normal(2, 4, dim, seed=seed + dim) for dim in (3, 7)]
    coefficient = normal(2, 4, seed=seed)
    group = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]).expand(2, 2, 4)
    contributions = Contributions(
        coefficient_MB=coefficient.expand(2, 2, 4),
        ntk_MBB=torch.stack([g @ g.mT for g in gradients]),
        unit_MB=group,
        group_MB=group,
        between_groups=True,
    )
    return [coefficient[..., None] * g for g in gradients], contributions


def test_the_whole_is_the_concatenated_gradient() -> None:
    explicit, contributions = two_uses(seed=0)
    together = torch.cat(explicit, dim=-1)
    whole = contributions.of_the_whole()
    assert torch.allclose(whole.products(), together @ together.mT)
    assert torch.equal(whole.unit_MB, contributions.unit_MB[0])


@pytest.mark.parametrize("field", ["coefficient_MB", "unit_MB", "group_MB"])
def test_uses_that_disagree_have_no_whole(field: str) -> None:
    _, contributions = two_uses(seed=0)
    changed = getattr(contributions, field).clone()
    changed[1, 1, 0] += 1
    fields = {**vars(contributions), field: changed}
    whole = Contributions(**fields).of_the_whole()
    assert (whole.unit_MB == -1).all()
    assert all(value.isnan() for value in noise_moments(whole.products(), whole.unit_MB))
    assert conflict_share(whole.products(), whole.group_MB).isnan()


def test_a_use_without_kernel_does_not_count_towards_the_whole() -> None:
    _, contributions = two_uses(seed=0)
    fields = {name: value for name, value in vars(contributions).items() if name.endswith("B")}
    missing = {
        name: torch.zeros_like(value[:1]) if value.is_floating_point() else 0 * value[:1] - 1
        for name, value in fields.items()
    }
    more = {name: torch.cat([missing[name], value]) for name, value in fields.items()}
    whole = contributions.of_the_whole()
    same = Contributions(**more, between_groups=True).of_the_whole()
    assert torch.equal(whole.products(), same.products())
    assert torch.equal(whole.unit_MB, same.unit_MB)

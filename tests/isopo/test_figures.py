"""Every figure of a step against loops over explicit per-sequence gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.isopo.steps import DIMENSIONS, SIZES, Step, layer, pooled, random_step
from torch import Tensor

from proxstep.isopo.diagnostics.step import diagnose

seeds = st.integers(0, 2**31)


# -- lengths and weights ---------------------------------------------------------------------------


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_lengths_are_pooled_over_microbatches(seed: int) -> None:
    step = random_step(seed)
    found = diagnose(step.records)
    for name in DIMENSIONS:
        norms = [math.sqrt(x) for x in pooled(step, name, "norm_sq_B")]
        filled = pooled(step, name, "filled_B")
        fishers = pooled(step, name, "fisher_sq_B")
        measured = [math.sqrt(f) for f, skip in zip(fishers, filled, strict=True) if not skip]
        own = layer(found, name)
        assert own.frac_filled_fisher == pytest.approx(sum(filled) / 8)
        for values, quantiles in ((norms, own.norm), (measured, own.fisher)):
            if len(values) < 2:
                continue
            quartiles = statistics.quantiles(values, n=4, method="inclusive")
            assert quantiles is not None
            expected = (min(values), *quartiles, max(values))
            assert dataclasses.astuple(quantiles) == pytest.approx(expected)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_weights_are_pooled_over_microbatches(seed: int) -> None:
    step = random_step(seed)
    found = diagnose(step.records)
    spreads = []
    for name in DIMENSIONS:
        weights, coefficients = (pooled(step, name, f) for f in ("weight_B", "coefficient_B"))
        scales = [w / c for w, c in zip(weights, coefficients, strict=True) if c != 0]
        spreads.append(statistics.pstdev(scales) / abs(statistics.mean(scales)))
        own = layer(found, name)
        assert own.weight_spread == pytest.approx(spreads[-1])
        sizes = [abs(w) for w in weights]
        assert own.max_weight_share == pytest.approx(max(sizes) / sum(sizes))
        norms = pooled(step, name, "norm_sq_B")
        parts = [abs(w) * math.sqrt(n) for w, n in zip(weights, norms, strict=True)]
        assert own.max_contribution_share == pytest.approx(max(parts) / sum(parts))
    assert found.weight_spread == pytest.approx(statistics.mean(spreads))


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_the_correlation_is_of_logarithms_without_filled_estimates(seed: int) -> None:
    step = random_step(seed)
    found = diagnose(step.records)
    for name in DIMENSIONS:
        columns = [pooled(step, name, f) for f in ("fisher_sq_B", "norm_sq_B", "filled_B")]
        logs = [(math.log(f), math.log(n)) for f, n, skip in zip(*columns, strict=True) if not skip]
        if len(logs) < 3:
            assert layer(found, name).fisher_norm_correlation is None
        else:
            expected = statistics.correlation(*zip(*logs, strict=True))
            assert layer(found, name).fisher_norm_correlation == pytest.approx(expected)
        columns = [pooled(step, name, f) for f in ("weight_B", "coefficient_B", "length_B")]
        logs = [(math.log(abs(w / c)), math.log(n)) for w, c, n in zip(*columns, strict=True) if c]
        expected = statistics.correlation(*zip(*logs, strict=True))
        assert layer(found, name).weight_length_correlation == pytest.approx(expected)


# -- the gradient ----------------------------------------------------------------------------------


def weighted_sums(step: Step, name: str, field: str) -> Tensor:
    """Each microbatch's gradient sum_b x_b G_b, one after the other in one long vector."""
    pairs = zip(step.records[name], step.gradients[name], strict=True)
    return torch.cat([getattr(record, field) @ g for record, g in pairs])


@given(seeds, st.sampled_from([SIZES, (6,)]))
@settings(deadline=None, max_examples=20)
def test_cosine_and_shares_are_those_of_explicit_gradients(seed: int, sizes: tuple) -> None:
    step = random_step(seed, sizes)
    found = diagnose(step.records)
    transformed, plain = (
        {name: weighted_sums(step, name, field) for name in DIMENSIONS}
        for field in ("weight_B", "coefficient_B")
    )
    total = sum(float(t @ t) for t in transformed.values())
    cosines = []
    for name in DIMENSIONS:
        t, p = transformed[name], plain[name]
        cosines.append(float(t @ p / t.norm() / p.norm()))
        assert layer(found, name).cosine_to_reinforce == pytest.approx(cosines[-1])
        assert layer(found, name).grad_share == pytest.approx(float(t @ t) / total)
    assert found.mean_cosine_to_reinforce == pytest.approx(statistics.mean(cosines))
    t, p = torch.cat([*transformed.values()]), torch.cat([*plain.values()])
    assert found.cosine_to_reinforce == pytest.approx(float(t @ p / t.norm() / p.norm()))


# -- kernels, noise, conflict ----------------------------------------------------------------------


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_spectra_are_those_of_each_microbatch(seed: int) -> None:
    step = random_step(seed)
    found = diagnose(step.records)
    conditions = []
    for name in ("up", "head"):
        singular = [torch.linalg.svdvals(g).square() for g in step.gradients[name]]
        own = layer(found, name)
        assert own.ntk_eigenvalue_min == pytest.approx(
            min(float(e[-1]) for e in singular), rel=1e-6
        )
        assert own.ntk_eigenvalue_max == pytest.approx(max(float(e[0]) for e in singular))
        ratios = [float(e[0] / e[-1]) for e in singular]
        if max(ratios) < 1e6:
            assert own.ntk_condition == pytest.approx(statistics.median_low(ratios), rel=1e-6)
        ranks = [float(e.sum() ** 2 / e.square().sum()) for e in singular]
        assert own.ntk_effective_rank == pytest.approx(statistics.mean(ranks))
        off = []
        for g in step.gradients[name]:
            sizes = [[abs(float(a @ b)) for b in g] for a in g]
            off.append(1 - sum(sizes[i][i] for i in range(len(g))) / sum(map(sum, sizes)))
        assert own.ntk_off_diagonal == pytest.approx(statistics.mean(off))
        conditions.append(own.ntk_condition)
    assert layer(found, "norm").ntk_condition == math.inf
    assert layer(found, "norm").ntk_eigenvalue_min == pytest.approx(0, abs=1e-9)
    assert found.ntk_condition == statistics.median(sorted([*conditions, math.inf]))


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_noise_of_groups_is_that_of_their_sums(seed: int) -> None:
    """Groups of two, two and one in the first microbatch, of two and one in the second."""
    step = random_step(seed)
    found = diagnose(step.records)
    assert found.noise_between_groups
    sums: list[dict[int, Tensor]] = []
    for m, (coefficient, group) in enumerate(zip(step.coefficients, step.groups, strict=True)):
        sums.append({})
        for b, label in enumerate(group.tolist()):
            g = torch.cat([step.gradients[name][m][b] for name in DIMENSIONS])
            sums[m][label] = sums[m].get(label, 0) + coefficient[b] * g
    products = [
        float(u @ v) for units in sums for u, v in itertools.permutations(units.values(), 2)
    ]
    scatter = sum(
        float((u - sum(units.values()) / len(units)).square().sum())
        for units in sums
        for u in units.values()
    )
    size = 8 / 5
    assert found.noise is not None
    assert found.noise.squared_gradient == pytest.approx(sum(products) / 8 / size**2, abs=1e-9)
    assert found.noise.variance == pytest.approx(scatter / 3 / size)
    own = [use.noise.variance for use in found.layers if use.noise is not None]
    assert sum(own) == pytest.approx(found.noise.variance)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_conflict_of_the_whole_sums_over_uses_first(seed: int) -> None:
    step = random_step(seed)
    found = diagnose(step.records)
    products, signs = [], []
    for m, group in enumerate(step.groups):
        for b, c in itertools.combinations(range(len(group)), 2):
            both = float(step.coefficients[m][b] * step.coefficients[m][c])
            if group[b] == group[c] and both != 0:
                inner = sum(float(gs[m][b] @ gs[m][c]) for gs in step.gradients.values())
                products.append(both * inner)
                signs.append(both)
    assert found.group_conflict == pytest.approx(
        sum(x < 0 for x in products) / len(products), rel=1e-12
    )
    assert found.opposed_coefficients == pytest.approx(sum(x < 0 for x in signs) / len(signs))

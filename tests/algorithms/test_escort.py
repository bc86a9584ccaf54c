import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.loss_cases import SEEDS, assert_close

from proxstep.algorithms import centered_weights, escort_weights
from proxstep.errors import ProxstepError

GROUPS = torch.tensor([5, -2, 5, 9, -2, 5, 9, -2, -2])  # sizes 3, 4, 2 in no order


def random_advantages(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(GROUPS), generator=generator, dtype=torch.float64).to(dtype)


def loop(exponent: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """exp(exponent) divided by its mean over the group, one sequence at a time."""
    exponents, labels, weights = exponent.tolist(), group.tolist(), []
    for own, label in zip(exponents, labels, strict=True):
        members = [math.exp(e) for e, g in zip(exponents, labels, strict=True) if g == label]
        weights.append(math.exp(own) / (sum(members) / len(members)))
    return torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("normalize", ["group", "batch"])
def test_equals_the_formula(seed, alpha, normalize):
    advantages = random_advantages(seed)
    tau = 0.5 + random_advantages(seed + 10).abs()
    sequence_log_probs = -5 * random_advantages(seed + 20).abs()
    lengths = torch.arange(1, len(GROUPS) + 1)
    nothing = torch.zeros(len(GROUPS), dtype=torch.float64)
    group = GROUPS if normalize == "group" else torch.zeros_like(GROUPS)
    for correction in (None, sequence_log_probs / lengths, sequence_log_probs):
        weight_B, _ = escort_weights(
            advantages,
            GROUPS,
            alpha=alpha,
            tau=tau,
            correction=correction,
            normalize=normalize,
        )
        exponent = (1 - alpha) * (
            advantages / tau - (nothing if correction is None else correction)
        )
        assert_close(weight_B, loop(exponent, group))


def test_the_default_is_alpha_0_4_uncorrected_per_group():
    advantages = random_advantages(0)
    weight_B, _ = escort_weights(advantages, GROUPS)
    assert_close(weight_B, loop(0.6 * advantages, GROUPS))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
    alpha=st.floats(0, 1),
    normalize=st.sampled_from(["group", "batch"]),
)
def test_the_mean_is_one_and_weights_are_finite(seed, scale, alpha, normalize):
    weight_B, _ = escort_weights(
        scale * random_advantages(seed), GROUPS, alpha=alpha, normalize=normalize
    )
    assert torch.isfinite(weight_B).all()
    assert (weight_B >= 0).all()
    labels = GROUPS if normalize == "group" else torch.zeros_like(GROUPS)
    for label in labels.unique():
        assert weight_B[labels == label].mean().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_advantages_give_one_sequence_the_whole_group(dtype):
    advantages = torch.tensor([1e4, -1e4, 0.0, 1e4, 5.0], dtype=dtype)
    weight_B, metrics = escort_weights(advantages, torch.tensor([0, 0, 0, 1, 1]))
    assert weight_B.tolist() == [3.0, 0.0, 0.0, 2.0, 0.0]
    assert metrics["effective_sample_size"] == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_alpha_one_is_uniform_and_alpha_zero_is_the_softmax(seed):
    advantages = random_advantages(seed)
    weight_B, _ = escort_weights(advantages, GROUPS, alpha=1.0)
    assert (weight_B == 1).all()
    near, _ = escort_weights(advantages, GROUPS, alpha=1 - 1e-9)
    assert_close(near, torch.ones(len(GROUPS)), tolerance=1e-7)
    weight_B, _ = escort_weights(advantages, GROUPS, alpha=0.0, tau=0.7)
    for label in GROUPS.unique():
        member = label == GROUPS
        expected = torch.softmax(advantages[member] / 0.7, dim=0) * member.sum()
        assert_close(weight_B[member], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_permutation_and_shift(seed):
    advantages = random_advantages(seed)
    weight_B, metrics = escort_weights(advantages, GROUPS)
    order = torch.randperm(len(GROUPS), generator=torch.Generator().manual_seed(seed))
    permuted, permuted_metrics = escort_weights(advantages[order], GROUPS[order])
    assert_close(permuted, weight_B[order])
    assert permuted_metrics == pytest.approx(metrics)
    shift = torch.where(GROUPS == 5, 100.0, -7.0)  # one constant per group
    shifted, _ = escort_weights(advantages + shift, GROUPS)
    assert_close(shifted, weight_B, tolerance=1e-11)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_rise_with_the_advantage(seed):
    advantages = random_advantages(seed)
    weight_B, _ = escort_weights(advantages, torch.zeros_like(GROUPS))
    assert torch.equal(weight_B.argsort(), advantages.argsort())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e4, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 49])
@pytest.mark.parametrize("kind", ["center", "zscore"])
@pytest.mark.parametrize("normalize", ["group", "batch"])
def test_equal_advantages_give_exactly_no_drive(dtype, value, size, kind, normalize):
    group_ids = torch.arange(2 * size) % 2
    advantages = torch.full((2 * size,), value, dtype=dtype)
    weight_B, _ = escort_weights(advantages, group_ids, normalize=normalize)
    assert (weight_B == 1).all()
    drive_B = centered_weights(weight_B, group_ids, kind=kind, normalize=normalize)
    assert drive_B.dtype == dtype
    assert (drive_B == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_drives_equal_the_formula(seed):
    weight_B, _ = escort_weights(random_advantages(seed), GROUPS)
    assert torch.equal(centered_weights(weight_B, GROUPS), weight_B - 1)
    assert torch.equal(centered_weights(weight_B, GROUPS, kind="none"), weight_B)
    zscore_B = centered_weights(weight_B, GROUPS, kind="zscore")
    for label in GROUPS.unique():
        member = weight_B[label == GROUPS]
        expected = (member - member.mean()) / member.std(correction=1)
        assert_close(zscore_B[label == GROUPS], expected, tolerance=1e-4)
        assert centered_weights(weight_B, GROUPS)[label == GROUPS].sum().item() == pytest.approx(
            0, abs=1e-12
        )
    whole_B = centered_weights(weight_B, GROUPS, kind="zscore", normalize="batch")
    expected = (weight_B - weight_B.mean()) / weight_B.std(correction=1)
    assert_close(whole_B, expected, tolerance=1e-4)


def test_metrics_equal_the_formula():
    advantages = random_advantages(1)
    weight_B, metrics = escort_weights(advantages, GROUPS)
    sizes = []
    for label in GROUPS.unique():
        member = weight_B[label == GROUPS]
        sizes.append((member.sum() ** 2 / (member**2).sum()).item())
    assert metrics == pytest.approx(
        {
            "effective_sample_size": sum(sizes) / 3,
            "effective_sample_size_min": min(sizes),
            "weight_max": weight_B.max().item(),
        }
    )
    _, metrics = escort_weights(advantages, GROUPS, alpha=1.0)
    assert metrics["effective_sample_size"] == pytest.approx(3)


def test_equation_seven_read_literally_gives_one_sequence_the_group():
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0])
    sequence_log_probs = torch.tensor([-40.0, -95.0, -60.0, -70.0])
    weight_B, metrics = escort_weights(
        advantages,
        torch.zeros(4, dtype=torch.int64),
        correction=sequence_log_probs,
    )
    assert weight_B.argmax() == 1  # the least likely, although its advantage is the worst
    assert metrics["effective_sample_size"] < 1.01


def test_weights_carry_no_gradient():
    advantages = random_advantages(0).requires_grad_()
    sequence_log_probs = random_advantages(1).requires_grad_()
    weight_B, _ = escort_weights(
        advantages,
        GROUPS,
        correction=sequence_log_probs,
    )
    assert not weight_B.requires_grad


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"tau": 0.0}, "tau is 0"),
        ({"tau": torch.tensor([1.0, -1.0])}, "tau is -1"),
        ({"tau": torch.tensor([1.0, float("nan")])}, r"tau\[1\] is nan"),
        ({"normalize": "groups"}, "did you mean group"),
        ({"correction": torch.tensor([0.0, -float("inf")])}, r"correction\[1\] is -inf"),
    ],
)
def test_wrong_choices_are_refused(hyper, message):
    with pytest.raises(ProxstepError, match=message):
        escort_weights(torch.zeros(2), torch.tensor([0, 0]), **hyper)


def test_wrong_inputs_are_refused():
    with pytest.raises(ProxstepError, match=r"advantages\[1\] is inf"):
        escort_weights(torch.tensor([0.0, float("inf")]), torch.tensor([0, 0]))
    unchecked = inspect.unwrap(escort_weights)  # past the shape checks of the test suite
    for size in (0, 3):
        with pytest.raises(ProxstepError, match="one entry per sequence"):
            unchecked(torch.zeros(size), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ProxstepError, match="did you mean zscore"):
        centered_weights(torch.ones(2), torch.tensor([0, 0]), kind="z-score")
    with pytest.raises(ProxstepError, match="num_generations"):
        centered_weights(torch.ones(2), torch.tensor([0, 1]), kind="zscore")


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_a_temperature_too_small_for_its_advantages_is_named(alpha: float) -> None:
    with pytest.raises(ProxstepError, match="advantages / tau"):
        escort_weights(torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), alpha=alpha, tau=1e-40)

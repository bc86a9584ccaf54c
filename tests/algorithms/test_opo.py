import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.loss_cases import (
    SEEDS,
    Case,
    assert_close,
    loss_and_gradient,
    make_case,
    numerical_gradient,
)

from proxstep.algorithms import ALGORITHMS, centered_weights, escort_weights, opo
from proxstep.algorithms.safeguards import (
    auto_mu,
    clip_target,
    positivity,
    regression_target,
    target_shares,
    tv_bound,
)
from proxstep.errors import ProxstepError


def loop(case: Case, log_probs: torch.Tensor, mu: float, surrogate: str, per_token: bool) -> float:
    """Equations 19 and 10, one sequence at a time."""
    losses = []
    for b in range(6):
        mask = case.response_mask[b]
        if mask.any():
            delta = (log_probs[b] - case.old_log_probs[b])[mask].sum()
            delta = delta / mask.sum() if per_token else delta
            u = delta if surrogate == "log" else torch.exp(delta) - 1
            losses.append(-case.advantages[b] * u + mu / 2 * u**2)
    return (sum(losses) / len(losses)).item()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("surrogate", ["log", "ratio"])
@pytest.mark.parametrize("per_token", [False, True])
def test_equals_the_formula(seed, surrogate, per_token):
    case = make_case(seed)
    loss, gradient, metrics = loss_and_gradient(
        "opo", case, mu=0.8, surrogate=surrogate, length_normalize=per_token
    )
    assert_close(loss, loop(case, case.log_probs, 0.8, surrogate, per_token))
    expected = numerical_gradient(
        lambda at: loop(case, at, 0.8, surrogate, per_token), case.log_probs
    )
    assert_close(gradient, expected, tolerance=1e-6)
    for b in range(6):
        mask = case.response_mask[b]
        delta = (case.log_probs[b] - case.old_log_probs[b])[mask].sum()
        delta = delta / mask.sum().clamp(min=1) if per_token else delta
        assert_close(metrics["abs_delta"][b], delta.abs())
        assert_close(metrics["ratio"][b], delta.exp())
        assert_close(metrics["chi_square"][b], (delta.exp() - 1) ** 2)
    assert (metrics["delta_clamped"] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("surrogate", ["log", "ratio"])
@pytest.mark.parametrize("mu", [0.1, 1.0, 30.0])
def test_at_the_anchor_the_gradient_is_minus_the_drive(seed, surrogate, mu):
    case = make_case(seed).on_policy()
    _, gradient, _ = loss_and_gradient("opo", case, mu=mu, surrogate=surrogate)
    num_sequences = case.response_mask.any(dim=1).sum()
    expected = -case.advantages[:, None] * case.response_mask / num_sequences
    assert_close(gradient, expected)


@pytest.mark.parametrize("surrogate", ["log", "ratio"])
def test_a_zero_drive_pulls_back_to_the_anchor_and_rests_there(surrogate):
    case = make_case(0)
    still = Case(*case.tensors[:2], torch.zeros(6, dtype=torch.float64), case.response_mask)
    loss, gradient, _ = loss_and_gradient("opo", still.on_policy(), surrogate=surrogate)
    assert loss == 0
    assert (gradient == 0).all()
    loss, gradient, _ = loss_and_gradient("opo", still, surrogate=surrogate)
    log_ratio = (case.log_probs - case.old_log_probs) * case.response_mask
    pushes_back = gradient * log_ratio.sum(dim=1, keepdim=True)
    assert loss > 0
    assert (pushes_back[case.response_mask] > 0).all()


@pytest.mark.parametrize("surrogate", ["log", "ratio"])
@pytest.mark.parametrize("mu", [0.7, 2.0])
def test_the_regression_target_is_the_minimum(surrogate, mu):
    drive_B = torch.tensor([0.5, -0.4, 0.0], dtype=torch.float64)
    target_B = regression_target(drive_B, mu=mu)
    delta_B = target_B if surrogate == "log" else target_B.log1p()
    anchor = torch.full((3, 1), -2.0, dtype=torch.float64)
    log_probs = (anchor + delta_B[:, None]).requires_grad_()
    loss, _ = opo(
        log_probs, anchor, drive_B, torch.ones(3, 1, dtype=torch.bool), mu=mu, surrogate=surrogate
    )
    loss.backward()
    assert_close(log_probs.grad, torch.zeros(3, 1))
    # Completing the square: L = mean (mu / 2) (u - u*)^2 - (mu / 2) u*^2.
    assert_close(loss.detach(), (-mu / 2 * target_B.square()).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", ["log", "ratio"])
def test_the_clamp_is_counted_and_only_the_ratio_loses_its_gradient(dtype, surrogate):
    anchor = torch.zeros(4, 1, dtype=dtype)
    delta = torch.tensor([[1e3], [-1e3], [19.9], [20.1]], dtype=dtype)
    case = Case(delta, anchor, torch.ones(4, dtype=dtype), torch.ones(4, 1, dtype=torch.bool))
    loss, gradient, metrics = loss_and_gradient("opo", case, surrogate=surrogate)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert metrics["delta_clamped"].tolist() == [1.0, 1.0, 0.0, 1.0]
    has_gradient = (gradient[:, 0] != 0).tolist()
    assert has_gradient == ([True] * 4 if surrogate == "log" else [False, False, True, False])


@pytest.mark.parametrize("seed", SEEDS)
def test_small_deviations_keep_their_digits_in_float32(seed):
    case = make_case(seed, dtype=torch.float32)
    anchor = torch.zeros(6, 7)
    near = Case(anchor + 1e-6, anchor, case.advantages, case.response_mask)
    _, _, metrics = loss_and_gradient("opo", near)
    delta_B = 1e-6 * case.response_mask.sum(dim=1)
    torch.testing.assert_close(metrics["chi_square"], delta_B.square(), rtol=1e-3, atol=0.0)


def test_an_unknown_surrogate_names_the_nearest():
    with pytest.raises(ProxstepError, match=r"surrogate is 'ratios'; did you mean ratio"):
        opo(*make_case(0).tensors, surrogate="ratios")


def test_the_anchor_may_be_named():
    case = make_case(0)
    loss, _ = opo(
        log_probs=case.log_probs,
        anchor_log_probs=case.old_log_probs,
        advantages=case.advantages,
        response_mask=case.response_mask,
    )
    assert torch.equal(loss, ALGORITHMS["opo"].loss(*case.tensors)[0])


def test_regression_target_refuses_mu_zero():
    with pytest.raises(ProxstepError, match="mu is 0"):
        regression_target(torch.ones(2), mu=0.0)


def test_positivity_counts_both_conditions():
    weight_B = torch.tensor([0.0, 0.4, 1.1, 2.5])
    assert positivity(weight_B, mu=0.5) == {
        "frac_negative_target": 0.5,
        "frac_over_positivity_bound": 0.25,
    }
    assert positivity(weight_B, mu=1.0)["frac_negative_target"] == 0
    assert positivity(weight_B, mu=1.5)["frac_over_positivity_bound"] == 0


def test_the_printed_positivity_condition_does_not_suffice():
    weight_B = torch.tensor([0.0, 1.5, 1.5])
    shares = positivity(weight_B, mu=0.5)
    assert shares["frac_over_positivity_bound"] == 0
    assert shares["frac_negative_target"] == pytest.approx(1 / 3)
    assert regression_target(weight_B - 1, mu=0.5).min() == -2


# A regression to the target


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("surrogate", ["log", "ratio"])
@pytest.mark.parametrize("mu", [0.3, 1.0, 7.0])
def test_up_to_a_constant_it_is_the_squared_distance_to_the_target(seed, surrogate, mu):
    case = make_case(seed)
    loss, _, _ = loss_and_gradient("opo", case, mu=mu, surrogate=surrogate)
    kept = case.response_mask.any(dim=1)
    target_B = regression_target(case.advantages, mu=mu)[kept]
    constant = (mu / 2 * target_B.square()).mean()
    assert_close(loss + constant, squared_distance(case, mu, surrogate, target_B.tolist()))


def squared_distance(case: Case, mu: float, surrogate: str, targets: list[float]) -> float:
    """mean (mu / 2) (u - target)^2, one sequence at a time."""
    losses, rest = [], iter(targets)
    for b in range(6):
        if case.response_mask[b].any():
            delta = (case.log_probs[b] - case.old_log_probs[b])[case.response_mask[b]].sum().item()
            u = delta if surrogate == "log" else math.exp(delta) - 1
            losses.append(mu / 2 * (u - next(rest)) ** 2)
    return sum(losses) / len(losses)


# Positivity safeguards

GROUP = torch.arange(12) // 4


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    kind=st.sampled_from(["center", "zscore", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_auto_mu_keeps_every_target_within_one(seed, scale, kind, dtype):
    generator = torch.Generator().manual_seed(seed)
    advantages = scale * torch.randn(12, generator=generator, dtype=torch.float64).to(dtype)
    weight_B, _ = escort_weights(advantages, GROUP, alpha=0.0)
    drive_B = centered_weights(weight_B, GROUP, kind=kind)
    mu = auto_mu(drive_B)
    assert mu == max(1.0, drive_B.abs().max().item())
    target_B = regression_target(drive_B, mu=mu)
    assert target_B.abs().max() <= 1
    assert set(target_shares(target_B).values()) == {0.0}
    if kind == "center":
        assert mu >= weight_B.max() - 1  # as printed
        assert mu >= 1 - weight_B.min()  # what positivity needs
        assert set(positivity(weight_B, mu=mu).values()) == {0.0}
    if kind == "none":
        assert target_B.min() >= 0


def test_auto_mu_is_the_papers_where_that_is_enough():
    assert auto_mu(torch.tensor([0.9, -0.3])) == ALGORITHMS["opo"].defaults["mu"] == 1.0
    assert auto_mu(torch.tensor([0.9, -2.5])) == 2.5


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("target_min", [-1.0, -0.999, -0.1])
def test_a_clipped_target_is_the_target_clipped(mu, target_min):
    drive_B = torch.linspace(-4, 4, 33, dtype=torch.float64)
    clipped_B = clip_target(drive_B, mu=mu, target_min=target_min)
    expected = regression_target(drive_B, mu=mu).clamp(min=target_min)
    assert_close(regression_target(clipped_B, mu=mu), expected)
    unchanged = drive_B >= mu * target_min
    assert torch.equal(clipped_B[unchanged], drive_B[unchanged])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_depends_on_the_clip_through_the_target_alone(seed):
    case = make_case(seed)
    clipped = Case(
        *case.tensors[:2],
        clip_target(case.advantages, mu=0.2, target_min=-0.5),
        case.response_mask,
    )
    loss, _, _ = loss_and_gradient("opo", clipped, mu=0.2, surrogate="ratio")
    kept = case.response_mask.any(dim=1)
    target_B = (case.advantages / 0.2).clamp(min=-0.5)[kept]
    constant = (0.1 * target_B.square()).mean()
    assert_close(loss + constant, squared_distance(case, 0.2, "ratio", target_B.tolist()))
    assert (case.advantages < -0.1).any()


@pytest.mark.parametrize("target_min", [-1.1, 0.0, 0.5, float("nan")])
def test_a_bound_outside_its_range_is_refused(target_min):
    with pytest.raises(ProxstepError, match="target_min is"):
        clip_target(torch.ones(2), mu=1.0, target_min=target_min)
    with pytest.raises(ProxstepError, match="mu is 0"):
        clip_target(torch.ones(2), mu=0.0, target_min=-0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_holds_for_total_variation(seed):
    generator = torch.Generator().manual_seed(seed)
    anchor, policy = torch.randn(2, 7, generator=generator, dtype=torch.float64).softmax(1)
    v = policy / anchor - 1
    total_variation = (policy - anchor).abs().sum() / 2
    bound = tv_bound((anchor * v.square()).sum().item())
    assert total_variation <= bound
    assert bound == pytest.approx((anchor * v.square()).sum().sqrt().item() / 2)
    assert tv_bound(0.0) == 0


# Where there is little to learn from


def test_one_token_is_a_sequence_and_an_empty_one_counts_nowhere():
    case = make_case(0)
    mask = torch.zeros_like(case.response_mask)
    mask[0, 3] = True  # one token, and five sequences without any
    loss, gradient, _ = loss_and_gradient("opo", Case(*case.tensors[:3], mask), mu=0.7)
    delta = (case.log_probs - case.old_log_probs)[0, 3]
    drive_0 = case.advantages[0]
    assert_close(loss, -drive_0 * delta + 0.35 * delta**2)
    assert (gradient[1:] == 0).all()
    assert_close(gradient[0, 3], -drive_0 + 0.7 * delta)

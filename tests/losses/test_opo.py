import pytest
import torch
from tests.losses.loss_cases import (
    SEEDS,
    Case,
    assert_close,
    loss_and_gradient,
    make_case,
    numerical_gradient,
)

from proxstep.errors import ProxstepError
from proxstep.losses import (
    LOSSES,
    Aggregation,
    adaptive_tau,
    opo,
    positivity,
    regression_target,
)


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


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_another_aggregation_is_refused(mode):
    with pytest.raises(ProxstepError, match=r"seq-mean-token-mean.*length_normalize"):
        opo(*make_case(0).tensors, aggregation=Aggregation(mode))


def test_an_unknown_surrogate_names_the_nearest():
    with pytest.raises(ProxstepError, match=r"surrogate is 'ratios'.*'ratio'"):
        opo(*make_case(0).tensors, surrogate="ratios")


def test_the_anchor_may_be_named():
    case = make_case(0)
    loss, _ = opo(
        log_probs=case.log_probs,
        anchor_log_probs=case.old_log_probs,
        advantages=case.advantages,
        response_mask=case.response_mask,
    )
    assert torch.equal(loss, LOSSES["opo"].loss(*case.tensors)[0])


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


def test_adaptive_tau_equals_the_formula():
    entropy, confidence = torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([1.0, 0.5, 0.0, 1.0])
    signal = torch.tensor([1.0, -1.0, 0.3, -1.0])
    expected = [0.5, 1 + 0.1 + 0.25, 1.2, 1.5]
    assert adaptive_tau(1.0, entropy, confidence, signal).tolist() == pytest.approx(expected)
    expected = [0.2, 0.35, 0.35, 0.35]
    actual = adaptive_tau(
        0.5,
        entropy,
        confidence,
        signal,
        entropy_coef=0.0,
        confidence_coef=2.0,
        high=0.35,
    )
    assert actual.tolist() == pytest.approx(expected)


def test_adaptive_tau_refuses_an_empty_range():
    ones = torch.ones(2)
    for hyper in ({"low": 0.0}, {"low": 2.0, "high": 1.0}):
        with pytest.raises(ProxstepError, match=r"low is|below low"):
            adaptive_tau(1.0, ones, ones, ones, **hyper)
    with pytest.raises(ProxstepError, match="tau is"):
        adaptive_tau(0.0, ones, ones, ones)

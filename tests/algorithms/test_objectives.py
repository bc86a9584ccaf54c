"""Every objective against its paper's formula, one token at a time, and what all of them share."""

import inspect
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.loss_cases import (
    MODES,
    SEEDS,
    Case,
    aggregations_of,
    assert_close,
    clip,
    counted,
    loop_aggregate,
    loss_and_gradient,
    make_case,
    numerical_gradient,
    ratio,
)

from proxstep.algorithms import LOSSES, Aggregation, find_objective, opo_by_sequence
from proxstep.errors import ProxstepError

HYPER = {
    "reinforce": {},
    "grpo": {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4},
    "dapo": {"clip_ratio_low": 0.15, "clip_ratio_high": 0.6},
    "gspo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2},
    "cispo": {"clip_ratio_low": 0.25, "clip_ratio_high": 0.35},
    "dro": {"beta": 0.7},
    "opo": {"mu": 1.3},
    "dr-grpo": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.25},
    "rloo": {},
}
TOKEN_CLIPPED = ("grpo", "dapo", "dr-grpo")


def token_values(name: str, case: Case, log_probs: torch.Tensor, hyper: dict) -> list[list[float]]:
    """The paper's value at each token; for GSPO and OPO the sequence's value at each of its tokens.

    CISPO's weight has no gradient: it is taken at case.log_probs, wherever log_probs is.
    """
    rows = []
    for b in range(log_probs.shape[0]):
        advantage = case.advantages[b].item()
        mask = case.response_mask[b].tolist()
        new, old = log_probs[b].tolist(), case.old_log_probs[b].tolist()
        fixed = case.log_probs[b].tolist()
        length = max(sum(mask), 1)
        delta = sum(n - o for n, o, m in zip(new, old, mask, strict=True) if m)
        row = []
        for t in range(log_probs.shape[1]):
            if name in ("reinforce", "rloo"):
                value = -advantage * new[t]
            elif name in TOKEN_CLIPPED:
                rho = ratio(new[t], old[t])
                clipped = clip(rho, 1 - hyper["clip_ratio_low"], 1 + hyper["clip_ratio_high"])
                value = -min(rho * advantage, clipped * advantage)
            elif name == "gspo":
                s = math.exp(delta / length)
                clipped = clip(s, 1 - hyper["clip_ratio_low"], 1 + hyper["clip_ratio_high"])
                value = -min(s * advantage, clipped * advantage)
            elif name == "cispo":
                low, high = 1 - hyper["clip_ratio_low"], 1 + hyper["clip_ratio_high"]
                value = -clip(ratio(fixed[t], old[t]), low, high) * advantage * new[t]
            elif name == "dro":
                value = -advantage * new[t] + hyper["beta"] / 2 * (new[t] - old[t]) ** 2
            else:
                value = -advantage * delta + hyper["mu"] / 2 * delta**2
            row.append(value)
        rows.append(row)
    return rows


def oracle(
    name: str, case: Case, log_probs: torch.Tensor, mode: str, hyper: dict, max_length: int = 9
) -> float:
    values = token_values(name, case, log_probs, hyper)
    return loop_aggregate(values, case.response_mask, mode, max_length)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_value_and_gradient_equal_the_formula(name, seed):
    case = make_case(seed)
    for mode in aggregations_of(name):
        aggregation = Aggregation(mode, max_length=9)
        loss, gradient, _ = loss_and_gradient(name, case, aggregation=aggregation, **HYPER[name])
        assert_close(loss, oracle(name, case, case.log_probs, mode, HYPER[name]))
        expected = numerical_gradient(
            lambda at, mode=mode: oracle(name, case, at, mode, HYPER[name]), case.log_probs
        )
        assert_close(gradient, expected, tolerance=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_defaults_equal_the_formula_with_the_papers_values(name):
    defaults = {
        "reinforce": ("seq-mean-token-sum", {}),
        "grpo": ("seq-mean-token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
        "dapo": ("token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
        "gspo": ("seq-mean-token-mean", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
        "cispo": ("token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
        "dro": ("token-mean", {"beta": 1.0}),
        "opo": (
            "seq-mean-token-mean",
            {"mu": 1.0, "surrogate": "log", "form": "work", "length_normalize": False},
        ),
        "dr-grpo": (
            "seq-mean-token-sum-norm",
            {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
        ),
        "rloo": ("seq-mean-token-sum", {}),
    }
    mode, hyper = defaults[name]
    assert LOSSES[name].default_loss_agg_mode == mode
    assert LOSSES[name].hyper_parameters == hyper
    case = make_case(3)
    loss, _ = LOSSES[name].loss(*case.tensors)
    width = case.log_probs.shape[1]
    assert_close(loss, oracle(name, case, case.log_probs, mode, hyper, max_length=width))


@pytest.mark.parametrize("name", [n for n in LOSSES if "clip_ratio_low" in HYPER[n]])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_at_ratio_one_a_clipped_objective_has_the_gradient_of_reinforce(name, seed, mode):
    case = make_case(seed).on_policy()
    aggregation = Aggregation(mode, max_length=9)
    _, gradient, metrics = loss_and_gradient(name, case, aggregation=aggregation)
    _, expected, _ = loss_and_gradient("reinforce", case, aggregation=aggregation)
    assert_close(gradient, expected)
    assert (metrics["clip_ratio"] == 0).all()


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 1000),
    owner=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_microbatches_add_up_in_loss_gradient_and_metrics(name, seed, owner):
    case = make_case(seed)
    for mode in aggregations_of(name):
        aggregation = counted(mode, case.response_mask)
        whole = loss_and_gradient(name, case, aggregation=aggregation)
        total_loss, gradient = 0.0, torch.zeros_like(case.log_probs)
        metrics = {key: torch.zeros_like(value) for key, value in whole[2].items()}
        for part in range(3):
            index = [b for b in range(6) if owner[b] == part]
            if not index:
                continue
            loss, part_gradient, part_metrics = loss_and_gradient(
                name, case.select(index), aggregation=aggregation
            )
            total_loss = total_loss + loss
            gradient[index] = part_gradient
            for key, value in part_metrics.items():
                metrics[key][index] = value
        assert_close(total_loss, whole[0])
        assert_close(gradient, whole[1])
        for key, value in whole[2].items():
            assert torch.equal(metrics[key], value)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_are_harmless(name, poison):
    case = make_case(1)
    outside = ~case.response_mask
    poisoned = Case(
        case.log_probs.masked_fill(outside, poison),
        case.old_log_probs.masked_fill(outside, poison),
        case.advantages,
        case.response_mask,
    )
    clean_loss, clean_gradient, clean_metrics = loss_and_gradient(name, case)
    loss, gradient, metrics = loss_and_gradient(name, poisoned)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[outside] == 0).all()
    for key, value in metrics.items():
        assert torch.equal(value, clean_metrics[key])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drift", [1e3, -1e3])
def test_a_drift_of_a_thousand_nats_stays_finite(name, dtype, drift):
    case = make_case(2, dtype=dtype)
    case = Case(case.log_probs, case.log_probs - drift, *case.tensors[2:])
    loss, gradient, metrics = loss_and_gradient(name, case)
    assert loss.dtype == dtype
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_detached_and_have_one_entry_per_sequence(name):
    case = make_case(0)
    leaf = case.log_probs.requires_grad_()
    loss, metrics = LOSSES[name].loss(leaf, *case.tensors[1:])
    assert loss.shape == ()
    assert metrics
    for value in metrics.values():
        assert value.shape == (6,)
        assert value.dtype == torch.float64
        assert not value.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_the_old_policy_and_the_advantages_carry_no_gradient(name):
    case = make_case(0)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors[:3]]
    loss, _ = LOSSES[name].loss(*leaves, case.response_mask)
    loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


def test_token_metrics_equal_the_loop():
    case = make_case(0)
    _, metrics = LOSSES["grpo"].loss(*case.tensors)
    for b in range(6):
        mask = case.response_mask[b]
        if not mask.any():
            assert all(value[b] == 0 for value in metrics.values())
            continue
        log_ratio = (case.log_probs[b] - case.old_log_probs[b])[mask]
        rho, advantage = log_ratio.exp(), case.advantages[b]
        is_clipped = rho > 1.2 if advantage > 0 else rho < 0.8
        assert_close(metrics["clip_ratio"][b], is_clipped.double().mean())
        assert_close(metrics["ratio"][b], rho.mean())
        assert_close(metrics["kl_old_policy"][b], -log_ratio.mean())
    _, metrics = LOSSES["cispo"].loss(*case.tensors, clip_ratio_low=0.2, clip_ratio_high=0.2)
    rho = (case.log_probs - case.old_log_probs).exp()
    for b in range(6):
        mask = case.response_mask[b]
        if mask.any():
            outside = (rho[b][mask] < 0.8) | (rho[b][mask] > 1.2)
            assert_close(metrics["clip_ratio"][b], outside.double().mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_gspo_metrics_are_those_of_the_sequence_ratio(seed):
    case = make_case(seed, with_empty=False)
    _, gradient, metrics = loss_and_gradient("gspo", case, clip_ratio_low=0.1, clip_ratio_high=0.1)
    length = case.response_mask.sum(dim=1)
    log_ratio = (case.log_probs - case.old_log_probs) * case.response_mask
    assert_close(metrics["ratio"], (log_ratio.sum(dim=1) / length).exp())
    has_gradient = (gradient != 0).any(dim=1)
    assert torch.equal(metrics["clip_ratio"] == 0, has_gradient)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_grpo_and_dapo_are_equal_at_equal_bounds(seed, mode):
    case = make_case(seed)
    hyper = {"clip_ratio_low": 0.17, "clip_ratio_high": 0.31, "aggregation": Aggregation(mode)}
    for one, other in zip(
        loss_and_gradient("grpo", case, **hyper)[:2],
        loss_and_gradient("dapo", case, **hyper)[:2],
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", SEEDS)
def test_cispo_never_drops_a_token(seed):
    case = make_case(seed, drift=2.0, with_empty=False)
    _, gradient, metrics = loss_and_gradient("cispo", case, clip_ratio_high=0.1)
    assert (metrics["clip_ratio"] > 0).any()
    assert ((gradient != 0) == case.response_mask).all()


def test_cispo_is_not_bounded_below_by_default():
    case = make_case(0, drift=0.0)
    far_below = Case(case.log_probs - 5.0, case.log_probs, *case.tensors[2:])
    _, metrics = LOSSES["cispo"].loss(*far_below.tensors)
    assert (metrics["clip_ratio"] == 0).all()
    _, metrics = LOSSES["cispo"].loss(*far_below.tensors, clip_ratio_low=0.9)
    assert (metrics["clip_ratio"][case.response_mask.any(dim=1)] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_dro_equals_opo_for_sequences_of_one_token(seed):
    case = make_case(seed)
    mask = torch.arange(7).expand(6, 7) == 2
    case = Case(*case.tensors[:3], mask)
    dro = loss_and_gradient("dro", case, beta=0.6)
    opo = loss_and_gradient("opo", case, mu=0.6)
    assert_close(dro[1], opo[1])
    # The values differ by A log pi_old, which has no gradient.
    assert_close(dro[0] - opo[0], -(case.advantages * case.old_log_probs[:, 2]).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_dro_is_not_opo_for_longer_sequences(seed):
    case = make_case(seed)
    sums = Aggregation("seq-mean-token-sum")
    dro = loss_and_gradient("dro", case, aggregation=sums)[1]
    assert not torch.allclose(dro, loss_and_gradient("opo", case)[1], rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("dapo", "dr-grpo")])  # both grpo
def test_wrong_inputs_are_refused(name, monkeypatch):
    function = inspect.unwrap(LOSSES[name].loss)  # past the shape checks of the test suite
    module = sys.modules["proxstep.algorithms.opo"]
    monkeypatch.setattr(module, "opo_by_sequence", inspect.unwrap(opo_by_sequence))
    log_probs, old, advantages, mask = make_case(0).tensors
    with pytest.raises(ProxstepError, match=r"advantages has shape \(6, 7\).*\(6,\)"):
        function(log_probs, old, log_probs, mask)
    with pytest.raises(ProxstepError, match=r"old_log_probs has shape \(6, 6\)"):
        function(log_probs, old[:, :-1], advantages, mask)
    with pytest.raises(ProxstepError, match=r"response_mask\.bool"):
        function(log_probs, old, advantages, mask.double())
    with pytest.raises(ProxstepError, match=r"response_mask has shape \(5, 7\)"):
        function(log_probs, old, advantages, mask[1:])
    with pytest.raises(ProxstepError, match=r"log_probs has shape \(6,\)"):
        function(log_probs[:, 0], old, advantages, mask)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr-grpo", "gspo", "cispo"])
@pytest.mark.parametrize("argument", ["clip_ratio_low", "clip_ratio_high"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_negative_clip_width_is_refused(name, argument, value):
    with pytest.raises(ProxstepError, match=argument):
        LOSSES[name].loss(*make_case(0).tensors, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [("dro", "beta"), ("opo", "mu")])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_curvature_that_is_not_positive_is_refused(name, argument, value):
    with pytest.raises(ProxstepError, match=f"{argument} is"):
        LOSSES[name].loss(*make_case(0).tensors, **{argument: value})


def test_the_table_says_which_objectives_are_sequence_level():
    levels = {name: objective.level for name, objective in LOSSES.items()}
    assert levels == {
        "reinforce": "sequence",
        "grpo": "token",
        "dapo": "token",
        "gspo": "sequence",
        "cispo": "token",
        "dro": "token",
        "opo": "sequence",
        "dr-grpo": "token",
        "rloo": "sequence",
    }
    assert all(name == objective.name for name, objective in LOSSES.items())


def test_an_unknown_objective_names_the_nearest():
    assert find_objective("gspo") is LOSSES["gspo"]
    with pytest.raises(ProxstepError, match="'reinforce'"):
        find_objective("reinforc")


@pytest.mark.parametrize("seed", SEEDS)
def test_dr_grpo_divides_every_sequence_by_the_same_length(seed):
    case = make_case(seed).on_policy()
    aggregation = Aggregation("seq-mean-token-sum-norm", max_length=11)
    loss, gradient, _ = loss_and_gradient("dr-grpo", case, aggregation=aggregation)
    expected = loss_and_gradient(
        "grpo", case, aggregation=Aggregation("seq-mean-token-sum"), **HYPER["grpo"]
    )
    assert_close(gradient, expected[1] / 11)
    assert_close(loss, expected[0] / 11)


def test_rloo_is_reinforce():
    assert LOSSES["rloo"].loss is LOSSES["reinforce"].loss

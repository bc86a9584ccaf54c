"""Every objective against its paper's formula, one token at a time, and their special cases.

What all of them share is in test_conformance.py.
"""

import pytest
import torch
from tests.algorithms.formulas import PAPERS, oracle
from tests.algorithms.loss_cases import (
    MODES,
    SEEDS,
    Case,
    assert_close,
    loss_and_gradient,
    make_case,
    numerical_gradient,
)

from proxstep.algorithms import ALGORITHMS, Aggregation

of_each = pytest.mark.parametrize("name", PAPERS)


def test_every_algorithm_has_its_formula():
    lacking = set(ALGORITHMS) - set(PAPERS)
    assert not lacking, f"write their formulas: PAPERS in tests/algorithms/formulas.py: {lacking}"


@of_each
@pytest.mark.parametrize("seed", SEEDS)
def test_value_and_gradient_equal_the_formula(name, seed):
    case, hyper = make_case(seed), PAPERS[name].others
    for mode in MODES:
        aggregation = Aggregation(mode, max_length=9)
        loss, gradient, _ = loss_and_gradient(name, case, aggregation=aggregation, **hyper)
        assert_close(loss, oracle(name, case, case.log_probs, mode, hyper))
        expected = numerical_gradient(
            lambda at, mode=mode: oracle(name, case, at, mode, hyper), case.log_probs
        )
        assert_close(gradient, expected, tolerance=1e-7)


@of_each
def test_defaults_equal_the_formula_with_the_papers_values(name):
    paper, algorithm = PAPERS[name], ALGORITHMS[name]
    mode, hyper = paper.loss_agg_mode, paper.defaults
    assert algorithm.default_loss_agg_mode == mode
    assert algorithm.loss_options(algorithm.defaults) == hyper
    assert algorithm.advantage == paper.advantage
    numbers = {key for key, value in hyper.items() if type(value) is float}
    assert {key for key, value in paper.others.items() if value != hyper[key]} == numbers
    case = make_case(3)
    loss, _ = algorithm.loss(*case.tensors)
    width = case.log_probs.shape[1]
    assert_close(loss, oracle(name, case, case.log_probs, mode, hyper, max_length=width))


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper.like_reinforce])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_at_ratio_one_a_token_ratio_has_the_gradient_of_reinforce(name, seed, mode):
    case = make_case(seed).on_policy()
    aggregation = Aggregation(mode, max_length=9)
    _, gradient, metrics = loss_and_gradient(name, case, aggregation=aggregation)
    _, expected, _ = loss_and_gradient("reinforce", case, aggregation=aggregation)
    assert_close(gradient, expected)
    assert (metrics.get("clip_ratio", torch.zeros(6)) == 0).all()


def test_token_metrics_equal_the_loop():
    case = make_case(0)
    _, metrics = ALGORITHMS["grpo"].loss(*case.tensors)
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
    _, metrics = ALGORITHMS["cispo"].loss(*case.tensors, clip_ratio_low=0.2, clip_ratio_high=0.2)
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
    _, metrics = ALGORITHMS["cispo"].loss(*far_below.tensors)
    assert (metrics["clip_ratio"] == 0).all()
    _, metrics = ALGORITHMS["cispo"].loss(*far_below.tensors, clip_ratio_low=0.9)
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


@pytest.mark.parametrize("seed", SEEDS)
def test_dr_grpo_divides_every_sequence_by_the_same_length(seed):
    case = make_case(seed).on_policy()
    aggregation = Aggregation("seq-mean-token-sum-norm", max_length=11)
    loss, gradient, _ = loss_and_gradient("dr-grpo", case, aggregation=aggregation)
    expected = loss_and_gradient(
        "grpo", case, aggregation=Aggregation("seq-mean-token-sum"), **PAPERS["grpo"].others
    )
    assert_close(gradient, expected[1] / 11)
    assert_close(loss, expected[0] / 11)


def test_rloo_is_reinforce():
    assert ALGORITHMS["rloo"].loss is ALGORITHMS["reinforce"].loss

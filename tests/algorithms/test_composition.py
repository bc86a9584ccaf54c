import dataclasses

import pytest
import torch
from tests.algorithms.loss_cases import (
    MODES,
    SEEDS,
    assert_close,
    counted,
    loss_and_gradient,
    make_case,
)

from proxstep.algorithms import (
    ALGORITHMS,
    Aggregation,
    Algorithm,
    sequence_coefficients,
)
from proxstep.algorithms.aggregate import aggregate
from proxstep.errors import ProxstepError

SEQUENCE_LEVEL = [name for name, found in ALGORITHMS.items() if found.level == "sequence"]
VARIANTS = {
    "gspo": [{"clip_ratio_low": 0.5, "clip_ratio_high": 0.5}],
    "opo": [
        {"surrogate": "ratio", "mu": 0.5},
        {"length_normalize": True},
    ],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_coefficients_times_sequence_gradients_are_the_gradient(name, seed):
    case = make_case(seed)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(6, 7, 4, generator=generator, dtype=torch.float64)
    for mode in MODES:
        for variant in [{}, *VARIANTS.get(name, [])]:
            hyper = variant | {"aggregation": counted(mode, case.response_mask)}
            theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
            log_probs = case.log_probs + features @ theta
            loss, _ = ALGORITHMS[name].loss(log_probs, *case.tensors[1:], **hyper)
            (expected,) = torch.autograd.grad(loss, theta, retain_graph=True)

            coefficient_B, value, metrics = sequence_coefficients(
                ALGORITHMS[name], log_probs, *case.tensors[1:], **hyper
            )
            sequence_log_prob = (log_probs * case.response_mask).sum(dim=1)
            weighted = -(coefficient_B * sequence_log_prob).sum()
            (actual,) = torch.autograd.grad(weighted, theta)
            assert_close(actual, expected)
            assert torch.equal(value, loss.detach())
            assert not coefficient_B.requires_grad
            assert not value.requires_grad
            assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_coefficients_are_advantages_over_the_count(seed):
    case = make_case(seed, with_empty=False)
    coefficient_B, _, _ = sequence_coefficients(ALGORITHMS["reinforce"], *case.tensors)
    assert_close(coefficient_B, case.advantages / 6)


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_a_sequence_without_response_tokens_has_coefficient_zero(name):
    case = make_case(0)
    coefficient_B, _, _ = sequence_coefficients(ALGORITHMS[name], *case.tensors)
    assert (coefficient_B == 0).tolist()[4]


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_microbatches_have_the_coefficients_of_the_whole_batch(name):
    case = make_case(1)
    hyper = {"aggregation": counted("seq-mean-token-mean", case.response_mask)}
    whole, _, _ = sequence_coefficients(ALGORITHMS[name], *case.tensors, **hyper)
    for part in ([0, 4], [5, 2, 1, 3]):
        coefficient_B, _, _ = sequence_coefficients(
            ALGORITHMS[name], *case.select(part).tensors, **hyper
        )
        assert torch.equal(coefficient_B, whole[part])


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_masked_positions_are_harmless(name):
    case = make_case(2)
    poisoned = case.log_probs.masked_fill(~case.response_mask, float("nan"))
    clean, _, _ = sequence_coefficients(ALGORITHMS[name], *case.tensors)
    actual, _, _ = sequence_coefficients(ALGORITHMS[name], poisoned, *case.tensors[1:])
    assert torch.equal(actual, clean)


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_works_where_gradients_are_off(name):
    case = make_case(0)
    expected, _, _ = sequence_coefficients(ALGORITHMS[name], *case.tensors)
    with torch.no_grad():
        actual, _, _ = sequence_coefficients(ALGORITHMS[name], *case.tensors)
    assert torch.equal(actual, expected)


def test_a_clipped_sequence_has_coefficient_zero():
    case = make_case(0, with_empty=False)
    _, _, metrics = loss_and_gradient("gspo", case)
    coefficient_B, _, _ = sequence_coefficients(ALGORITHMS["gspo"], *case.tensors)
    assert (metrics["clip_ratio"] == 1).any()
    assert torch.equal(coefficient_B == 0, metrics["clip_ratio"] == 1)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in SEQUENCE_LEVEL])
def test_a_token_level_objective_is_refused(name):
    with pytest.raises(ProxstepError, match=rf"{name} is a token-level objective") as caught:
        sequence_coefficients(ALGORITHMS[name], *make_case(0).tensors)
    assert all(able in str(caught.value) for able in SEQUENCE_LEVEL)


def test_an_objective_that_lies_about_its_level_is_refused():
    liar = dataclasses.replace(ALGORITHMS["dro"], name="liar", level="sequence")
    with pytest.raises(ProxstepError, match="liar is declared sequence-level"):
        sequence_coefficients(liar, *make_case(0).tensors)


def test_ones_own_objective_composes():
    def likelihood(log_probs, old_log_probs, advantages, response_mask, *, aggregation):
        return aggregate(-log_probs, response_mask, aggregation), {}

    case = make_case(0)
    coefficient_B, _, _ = sequence_coefficients(
        Algorithm("likelihood", likelihood, level="sequence", about="A test's."),
        *case.tensors,
        aggregation=Aggregation("seq-mean-token-sum", num_sequences=10),
    )
    assert_close(coefficient_B, case.response_mask.any(dim=1).double() / 10)

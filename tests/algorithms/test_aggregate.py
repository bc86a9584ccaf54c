import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.loss_cases import (
    MODES,
    SEEDS,
    assert_close,
    counted,
    loop_aggregate,
    make_case,
)

from proxstep.algorithms import LOSS_AGG_MODES, Aggregation
from proxstep.algorithms.aggregate import aggregate, aggregate_sequences
from proxstep.errors import ProxstepError


def test_the_modes_are_the_four_of_verl():
    assert LOSS_AGG_MODES == MODES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_loop(mode, seed):
    case = make_case(seed)
    value, mask = case.log_probs, case.response_mask
    expected = loop_aggregate(value.tolist(), mask, mode, value.shape[1])
    assert_close(aggregate(value, mask, Aggregation(mode)), expected)
    expected = loop_aggregate(value.tolist(), mask, mode, 9)
    assert_close(aggregate(value, mask, counted(mode, mask)), expected)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(MODES),
    owner=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_microbatches_add_up_to_the_whole_batch(seed, mode, owner):
    case = make_case(seed)
    value, mask = case.log_probs.requires_grad_(), case.response_mask
    aggregation = counted(mode, mask)
    parts = [[b for b in range(6) if owner[b] == part] for part in range(3)]
    total = sum(aggregate(value[part], mask[part], aggregation) for part in parts if part)
    whole = aggregate(value, mask, aggregation)
    assert_close(total.detach(), whole.detach())
    assert_close(torch.autograd.grad(total, value)[0], torch.autograd.grad(whole, value)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_reach_neither_value_nor_gradient(mode, poison):
    case = make_case(0)
    mask = case.response_mask
    clean = case.log_probs.clone().requires_grad_()
    poisoned = case.log_probs.masked_fill(~mask, poison).requires_grad_()
    for leaf in (clean, poisoned):
        aggregate(leaf, mask, Aggregation(mode)).backward()
    assert torch.equal(clean.grad, poisoned.grad)
    assert torch.isfinite(aggregate(poisoned, mask, Aggregation(mode)))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_count_is_zero(mode):
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert aggregate(torch.ones(2, 3), empty, Aggregation(mode)) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sequence_value_is_averaged_over_sequences_that_have_tokens(seed):
    case = make_case(seed)
    kept = case.response_mask.any(dim=1)
    actual = aggregate_sequences(
        case.advantages, case.response_mask, Aggregation("seq-mean-token-mean")
    )
    assert_close(actual, case.advantages[kept].mean())
    length = case.response_mask.sum(dim=1)
    actual = aggregate_sequences(case.advantages, case.response_mask, Aggregation("token-mean"))
    assert_close(actual, (case.advantages * length).sum() / length.sum())


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(
        ProxstepError, match=r"loss_agg_mode is 'token_mean'; did you mean token-mean"
    ):
        Aggregation("token_mean")


@pytest.mark.parametrize("count", ["num_sequences", "num_tokens", "max_length"])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(ProxstepError, match=f"{count} is 0"):
        Aggregation("token-mean", **{count: 0})

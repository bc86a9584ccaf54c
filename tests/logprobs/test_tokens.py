import pytest
import torch

from proxstep.logprobs.tokens import masked_mean, masked_sum


@pytest.fixture
def values_and_mask():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 6, generator=generator) < 0.5
    mask[0], mask[1] = True, False
    return values, mask


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_equals_a_loop_over_the_rows(reduce, values_and_mask):
    values, mask = values_and_mask
    for row, keep, actual in zip(values, mask, reduce(values, mask), strict=True):
        kept = [value.item() for value, is_kept in zip(row, keep, strict=True) if is_kept]
        expected = sum(kept) / (max(len(kept), 1) if reduce is masked_mean else 1)
        assert actual.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_reach_neither_value_nor_gradient(reduce, poison, values_and_mask):
    values, mask = values_and_mask
    clean = values.clone().requires_grad_()
    poisoned = values.masked_fill(~mask, poison).requires_grad_()
    reduce(clean, mask).sum().backward()
    reduce(poisoned, mask).sum().backward()
    assert torch.equal(reduce(clean, mask), reduce(poisoned, mask))
    assert torch.equal(clean.grad, poisoned.grad)
    assert (poisoned.grad[~mask] == 0).all()


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_a_row_without_a_true_position_is_zero(reduce):
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert reduce(torch.ones(2, 3), empty).tolist() == [0.0, 0.0]

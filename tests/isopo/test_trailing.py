from __future__ import annotations

import pytest
import torch

from proxstep.isopo.trailing import TrailingMeans


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_it_is_an_exponential_average_over_steps_and_every_sequence_counts_alike(decay) -> None:
    torch.manual_seed(0)
    trailing = TrailingMeans(decay)
    expected = None
    for _ in range(5):
        parts = [torch.rand(n, dtype=torch.float64) for n in (3, 1, 6)]
        for part in parts:
            trailing.add("layer.weight", {"fisher_sq": part})
            if expected is None:
                assert trailing.of("layer.weight") == {}
            else:  # fixed within a step
                assert trailing.of("layer.weight")["fisher_sq"] == pytest.approx(float(expected))
        new = torch.cat(parts).mean()
        expected = new if expected is None else decay * expected + (1 - decay) * new
        assert trailing.has_pending
        trailing.fold()
        assert not trailing.has_pending
        assert trailing.of("layer.weight")["fisher_sq"] == pytest.approx(float(expected))


def test_its_state_is_flat_and_comes_back() -> None:
    trailing = TrailingMeans(0.9)
    trailing.add("a.weight", {"norm_sq": torch.tensor([1.0, 3.0]), "fisher_sq": torch.ones(2)})
    trailing.add("b.bias", {"norm_sq": torch.tensor([4.0])})
    trailing.fold()
    state = trailing.state_dict()
    assert set(state) == {"a.weight/norm_sq", "a.weight/fisher_sq", "b.bias/norm_sq"}
    other = TrailingMeans(0.9)
    other.add("c", {"x": torch.ones(1)})
    other.load_state_dict(state)
    assert not other.has_pending
    assert other.state_dict() == state
    assert other.of("a.weight")["norm_sq"] == 2.0

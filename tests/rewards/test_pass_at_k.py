from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards.pass_at_k import pass_at_k, sampled_scores


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_it_is_the_share_of_all_subsets_with_a_right_one(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_it_is_unbiased() -> None:
    """The expectation over n independent completions is 1 - (1 - p)^k, exactly."""
    n, p = 5, Fraction(3, 10)
    for k in range(1, n + 1):
        expected = sum(
            p ** sum(draw) * (1 - p) ** (n - sum(draw)) * Fraction(pass_at_k(n, sum(draw), k))
            for draw in itertools.product([0, 1], repeat=n)
        )
        assert float(expected) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_what_is_not_defined(n: int, c: int, k: int) -> None:
    with pytest.raises(ProxstepError, match="is not defined"):
        pass_at_k(n, c, k)


def test_scores_of_a_whole_set() -> None:
    scores = sampled_scores([[1.0, None, 0.0, 0.9], [None] * 4])
    assert scores["avg@4"] == pytest.approx(1.9 / 3)
    assert list(scores) == ["avg@4", "pass@1", "pass@2", "pass@4"]
    assert (scores["pass@1"], scores["pass@2"], scores["pass@4"]) == (0.125, 0.25, 0.5)
    assert list(sampled_scores([[1.0] * 6])) == ["avg@6", *(f"pass@{k}" for k in (1, 2, 4, 6))]

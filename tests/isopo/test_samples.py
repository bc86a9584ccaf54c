"""What ranks gather of each other's positions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from tests.threads import Threads
from torch import Tensor

from proxstep.isopo.embedding import LookupGradients
from proxstep.isopo.hooks import PositionGradients
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.plan import Rows
from proxstep.isopo.plan import smallest as smallest_of
from proxstep.isopo.sampling import GatheredSamples, SampleStore
from proxstep.isopo.vector import VectorGradients

Part = tuple[Tensor, dict[str, PositionGradients]]
"""A rank's priorities, and gradients of each kind at its positions."""


def draw(seed: int, positions: list[int]) -> list[Part]:
    """Return ranks of so many positions, of which a third must not be sampled."""
    generator = torch.Generator().manual_seed(seed)

    def one(size: int) -> Part:
        def rows(width: int) -> Tensor:
            return torch.randn(size, width, generator=generator)

        token_T = torch.randint(1, 50, (size,), generator=generator)
        priority_T = torch.rand(size, generator=generator, dtype=torch.float64)
        priority_T[::3] = torch.inf
        return priority_T, {
            "outer": OuterGradients(rows(5), rows(3)),
            "vector": VectorGradients(rows(4)),
            "lookup": LookupGradients(rows(2), token_T, 50),
        }

    return [one(size) for size in positions]


def tensors(gradients: PositionGradients) -> list[Tensor]:
    values = [getattr(gradients, field.name) for field in fields(gradients)]
    return [value for value in values if isinstance(value, Tensor)]


def smallest(parts: list[Part], kind: str, count: int | None) -> list[list[Tensor]]:
    """Return each rank's rows of the smallest priorities among all ranks', the smallest first."""
    places = [(p, rank, t) for rank, (ps, _) in enumerate(parts) for t, p in enumerate(ps.tolist())]
    chosen = sorted(place for place in places if place[0] < torch.inf)[:count]
    mine = [[t for _, owner, t in chosen if owner == rank] for rank in range(len(parts))]
    return [
        [value[rows] for value in tensors(part[1][kind])]
        for part, rows in zip(parts, mine, strict=True)
    ]


CASES = pytest.mark.parametrize(
    ("seed", "positions", "count"),
    [
        (0, [30, 30], 10),
        (1, [4, 60, 9, 33, 1], 10),
        (2, [12, 3, 8], 100),
        (3, [7, 1, 1, 20], 5),
        (4, list(range(1, 34)), 25),
        (5, [1, 1], 5),
    ],
)


@CASES
@pytest.mark.parametrize("whole", [False, True])
def test_the_ranks_sample_has_a_row_for_each_position_and_no_other(
    seed: int, positions: list[int], count: int, whole: bool
) -> None:
    parts, limit = draw(seed, positions), None if whole else count

    def on_rank(rank: int) -> dict[str, Any]:
        priority_T, kinds = parts[rank]
        samples = GatheredSamples(priority_T, limit, None)
        return {kind: samples.of(kind, gradients)[0] for kind, gradients in kinds.items()}

    for found in Threads(len(parts)).run(on_rank):
        for kind, sample in found.items():
            expected = [torch.cat(p) for p in zip(*smallest(parts, kind, limit), strict=True)]
            assert len(sample.squares()) == len(expected[0])
            for value, right in zip(tensors(sample), expected, strict=True):
                assert torch.equal(value, right)


@CASES
def test_what_is_carried_over_are_the_rows_of_the_smallest_priorities(
    seed: int, positions: list[int], count: int
) -> None:
    parts = draw(seed, positions)
    chosen = torch.cat([priority_T for priority_T, _ in parts]).sort().values[:count]
    chosen = chosen[chosen < torch.inf]

    def on_rank(rank: int) -> dict[str, PositionGradients]:
        store, (priority_T, kinds) = SampleStore(count), parts[rank]
        index_K = smallest_of(priority_T, count)
        rows = Rows(priority_T[index_K], index_K, index_K, torch.ones(len(index_K)))
        for kind, gradients in kinds.items():
            store.add(kind, rows, gradients.at(index_K))
        store.fold(None)
        return {kind: sample for kind, (_, sample) in store.current.items()}

    order = torch.cat([priority_T for priority_T, _ in parts]).argsort()[: len(chosen)]
    for found in Threads(len(parts)).run(on_rank):
        for kind, sample in found.items():
            every = zip(*(tensors(kinds[kind]) for _, kinds in parts), strict=True)
            for value, whole in zip(tensors(sample), map(torch.cat, every), strict=True):
                assert torch.equal(value, whole[order])


def test_positions_drawn_by_importance_stand_for_all_without_bias() -> None:
    generator, store = torch.Generator().manual_seed(0), SampleStore(6)
    weight_T = torch.rand(30, generator=generator, dtype=torch.float64) ** 4
    value_T = weight_T * torch.rand(30, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(4000):
        random_T = torch.rand(30, generator=generator, dtype=torch.float64)
        priority_K, index_K = (random_T / weight_T).topk(6, largest=False)
        stands_K = store.weights(Rows(priority_K, index_K, index_K, weight_T[index_K]))
        found.append(stands_K @ value_T[index_K])
    sums = torch.stack(found)
    assert (sums.mean() - value_T.sum()).abs() < 4 * sums.std() / 4000**0.5
    assert sums.std() < 0.5 * value_T.sum()
    few = Rows(priority_K[:5], index_K[:5], index_K[:5], weight_T[index_K[:5]])
    assert torch.equal(store.weights(few), torch.ones_like(few.weight_K))

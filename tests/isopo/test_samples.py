"""What ranks gather of each other's positions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from tests.isopo.grids import log_probs, make_grid
from tests.models import tiny_qwen3
from tests.oracle import random_sequences
from tests.threads import Threads
from torch import Tensor

from proxstep.isopo import IsometricRule, Isopo
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


def test_fisher_norms_are_those_of_each_parameters_own_positions() -> None:
    """Materialized: sum_k w_k <G_k, G_b>^2 / sum_k w_k |G_k|^2, q, k and v apart."""
    torch.manual_seed(0)
    model = tiny_qwen3()
    sequences = [random_sequences(seed, 3) for seed in (0, 1)]
    grids = [make_grid(some, "right") for some in sequences]

    def backward(isopo: Isopo, step: int, coefficient_B: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        grid = grids[step]
        with isopo.microbatch(grid.sequence_id, coefficient_B, grid.completion) as microbatch:
            microbatch.objective(log_probs(model, grid)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = Isopo(model, "reinforce")
    each = [backward(plain, 1, row_B) for row_B in -torch.eye(3, dtype=torch.float64)]
    plain.remove()
    isopo = Isopo(model, IsometricRule(-1.0, scale="paper"), num_overlap_positions=6)
    backward(isopo, 0, torch.ones(3, dtype=torch.float64))
    isopo.step()
    backward(isopo, 1, torch.ones(3, dtype=torch.float64))
    found = {key: record.fisher_sq_B for key, record in isopo._log}
    store = isopo._drawing._store
    assert store is not None
    for key in (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"):
        rows, sample = store.current[key]
        assert isinstance(sample, OuterGradients)
        assert len(rows.priority_K) == 6
        position_KOI = sample.grad_TO[:, :, None] * sample.input_TI[:, None, :]
        stands_K = store.weights(rows)
        total = stands_K @ position_KOI.flatten(1).square().sum(1)
        for b, gradients in enumerate(each):
            cross_K = (position_KOI * gradients[key]).flatten(1).sum(1)
            expected = stands_K @ cross_K.square() / total
            assert torch.allclose(found[key][b], expected, rtol=1e-9)  # type: ignore[index]
    names = {tuple(store.current[key][0].key_K.tolist()) for key in store.current}
    assert len(names) > 1

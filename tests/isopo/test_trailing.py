from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tests.selection import square
from tests.threads import Threads
from torch import Tensor

from proxstep.isopo.means import Place, TrailingMeans


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


def test_a_microbatch_without_sequences_changes_no_average() -> None:
    trailing = TrailingMeans(0.5)
    for values in ([4.0], [], [2.0]):
        trailing.add("a", {"norm_sq": torch.tensor(values)})
        trailing.fold()
    assert trailing.of("a")["norm_sq"] == 3.0


@pytest.mark.parametrize("before", [[], [2.0]])
def test_a_sum_of_0_is_no_measurement(before: list[float]) -> None:
    """No gradient reached the parameter; some zeros beside others are lengths."""
    trailing = TrailingMeans(0.5)
    for values in (before, [0.0, 0.0], [0.0, 4.0]):
        trailing.add("a", {"norm_sq": torch.tensor(values)})
        trailing.fold()
    assert trailing.of("a")["norm_sq"] == 2.0


# -- over ranks ------------------------------------------------------------------------------------


Step = list[dict[Place, Tensor]]
"""What each rank measures: one value per sequence."""
PLACES = [(f"layers.{i}.weight", name) for i in range(40) for name in ("sample_sq", "fisher_sq")]


def draw(draw: np.random.Generator, places: list[Place]) -> dict[Place, Tensor]:
    """Return sizes so different that the order of addition tells; every second one in float32."""
    return {
        place: torch.tensor(
            10.0 ** draw.uniform(-9, 9, size=draw.integers(1, 5)),
            dtype=torch.float64 if place[1] == "fisher_sq" else torch.float32,
        )
        for place in places
    }


def some(draw: np.random.Generator) -> list[Place]:
    return [place for place in PLACES if draw.random() < 0.7]


def everything(random: np.random.Generator, num: int) -> list[Step]:
    return [[draw(random, PLACES) for _ in range(num)] for _ in range(3)]


def other_sequences(random: np.random.Generator, num: int) -> list[Step]:
    """A rank lacks what it has measured before; one of them everything."""
    first, second, third = everything(random, num)
    second = [draw(random, some(random)) for _ in range(num)]
    third[num // 2] = {}
    return [first, second, third]


def nothing_at_first(random: np.random.Generator, num: int) -> list[Step]:
    return [[{} for _ in range(num)], *everything(random, num)]


def other_parameters(random: np.random.Generator, num: int) -> list[Step]:
    """Some ranks lack what nobody has measured before."""
    return [[draw(random, some(random)) for _ in range(num)]]


def nothing_on_one(random: np.random.Generator, num: int) -> list[Step]:
    return [[draw(random, PLACES) for _ in range(num - 1)] + [{}]]


def another_order(random: np.random.Generator, num: int) -> list[Step]:
    shuffled = [PLACES[i] for i in random.permutation(len(PLACES))]
    return [[draw(random, PLACES) for _ in range(num - 1)] + [draw(random, shuffled)]]


def another_precision(random: np.random.Generator, num: int) -> list[Step]:
    step = [draw(random, PLACES) for _ in range(num)]
    return [[*step[:-1], {place: value_B.double() for place, value_B in step[-1].items()}]]


def summed_by_name(steps: list[Step], decay: float) -> dict[str, Tensor]:
    """Return the averages from sums that are added by name, one rank after another."""
    means: dict[str, dict[str, Tensor]] = {}
    for step in steps:
        sums: dict[Place, tuple[float, int, torch.dtype]] = {}
        for rank in step:
            for place, value_B in rank.items():
                total, count, _ = sums.get(place, (0.0, 0, None))
                sums[place] = (total + float(value_B.sum()), count + len(value_B), value_B.dtype)
        for (key, name), (total, count, dtype) in sums.items():
            new = torch.tensor(total, dtype=dtype) / count
            old = means.setdefault(key, {}).get(name)
            means[key][name] = new if old is None else decay * old + (1 - decay) * new
    return {f"{key}/{name}": mean for key, of in means.items() for name, mean in of.items()}


def fold_on_ranks(steps: list[Step], decay: float) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """Return the ranks' averages, and what the first one sent in the last step."""
    threads = Threads(len(steps[0]))

    def on_rank(rank: int) -> dict[str, Tensor]:
        trailing = TrailingMeans(decay)
        for step in steps:
            for (key, name), value_B in step[rank].items():
                trailing.add(key, {name: value_B})
            if rank == 0:
                threads.sent.clear()
            trailing.fold()
        return trailing.state_dict()

    return threads.run(on_rank), threads.sent


EXCHANGES = {
    everything: 1,
    other_sequences: 1,
    nothing_at_first: 1,
    other_parameters: 2,
    nothing_on_one: 2,
    another_order: 2,
    another_precision: 2,
}


@pytest.mark.parametrize(("measured", "num_ranks"), square(EXCHANGES, [2, 5, 33]))
def test_ranks_get_the_same_averages_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, measured: Any, num_ranks: int
) -> None:
    """Whatever each has measured; with names on the way only where the ranks' may differ."""
    steps = measured(np.random.default_rng(num_ranks), num_ranks)
    expected = summed_by_name(steps, 0.9)
    monkeypatch.setattr(Tensor, "item", None, raising=False)  # a copy for every number
    states, sent = fold_on_ranks(steps, 0.9)
    assert len(sent) == EXCHANGES[measured]
    assert len(pickle.dumps(sent[0])) <= 16 * len(PLACES) + 64
    for state in states:
        assert list(state) == list(expected)
        for name, mean in expected.items():
            assert state[name].dtype == mean.dtype
            assert torch.equal(state[name], mean), name

"""The estimates of experiments/directions.py, on figures whose answers are known."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest
import torch
from experiments import direction_steps, directions
from experiments.directions import Row
from scipy.stats import t


def row(own: list[float], gain: float = 1.0, kl: float = 4.0, common: float = 1.0) -> Row:
    """A row whose chains agree in gain and KL."""
    chains = len(own)
    gram_CC = torch.full((chains, chains), common).double()
    gram_CC.fill_diagonal_(kl)
    gains_CC = torch.full((chains, chains), gain).double()
    gains_CC.fill_diagonal_(1e9)  # a chain's own gradient is in no estimate
    return Row(gains_CC, gram_CC.repeat(6, 1, 1), torch.tensor(own).double())


def test_what_a_step_is_worth() -> None:
    found = row([8.0, 8.0, 8.0])
    assert found.efficiency == pytest.approx(1 / 2)
    assert found.common == pytest.approx(1 / 4)
    assert found.own == pytest.approx(2)


def test_a_step_that_gains_as_much_for_a_quarter_of_the_kl_saves_three_quarters() -> None:
    log_ratio = directions._twice_log_ratio(row([1.0] * 3, kl=1.0), row([1.0] * 3, kl=4.0))
    assert 1 - math.exp(-log_ratio) == pytest.approx(3 / 4)
    assert math.isnan(directions._twice_log_ratio(row([1.0] * 3, gain=-1.0), row([1.0] * 3)))


def test_of_a_mean_over_chains_the_jackknife_is_students_interval() -> None:
    own = [1.0, 2.0, 4.0, 9.0]
    found = directions.jackknifed(lambda one: one.own, row(own, kl=1.0))
    error = statistics.stdev(own) / 2
    assert found.value == pytest.approx(4.0)
    assert found.error == pytest.approx(error)
    assert found.high == pytest.approx(4.0 + t.ppf(0.975, 3) * error)


def test_the_prompts_are_a_source_of_error_of_their_own() -> None:
    grams_PCC = row([1.0] * 4).grams_PCC * torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None, None]
    found = directions.jackknifed(lambda one: one.kl, Row(torch.eye(4), grams_PCC, torch.ones(4)))
    assert found.value == pytest.approx(4 * 3.5)
    assert found.error == pytest.approx(4 * statistics.stdev([1, 2, 3, 4, 5, 6]) / 6**0.5)


def test_every_place_is_measured_as_it_says_now() -> None:
    results = directions.read()
    assert list(results) == list(direction_steps.PLACES)
    for key, place in direction_steps.PLACES.items():
        assert results[key]["settings"] == place.settings()
        rows = [Row.of(one) for one in results[key]["rows"].values()]
        assert len(rows) == len(place.methods) * len(place.optimizers)
        assert all(one.gains_CC.shape == (place.chains, place.chains) for one in rows)
        assert all(torch.equal(a.grams_PCC.mT, a.grams_PCC) for a, _ in pairwise(rows))

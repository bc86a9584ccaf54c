"""Successive halving: which runs a round has, what it keeps, and when the time is up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from proxstep.errors import ProxstepError
from proxstep.lab import halving
from proxstep.lab.halving import (
    Clock,
    choosing_cells,
    num_rounds,
    read_note,
    reported_cells,
    rounds,
    survivors,
    write_note,
)
from proxstep.lab.plan import Plan, Variant, parse_budget
from tests.engine import tiny_recipe

RATES = (0.1, 0.2, 0.3, 0.4)


def make_plan(tmp_path: Path, rates=RATES, seeds: int = 2) -> Plan:
    recipe = tiny_recipe(tmp_path)
    variants = [
        Variant(name, {"optimizer.learning_rate": rate}, recipe)
        for rate in rates
        for name in ("grpo", "opo")
    ]
    return Plan(tuple(variants), {"optimizer.learning_rate": list(rates)}, seeds, halving=True)


def scored(cells, best: dict[str, float]) -> dict[str, float]:
    """Scores that fall with the distance from an algorithm's best rate."""
    return {
        c.name: 1 - abs(c.variant.values["optimizer.learning_rate"] - best[c.variant.algorithm])
        for c in cells
    }


def test_each_round_halves_the_values_and_doubles_the_seeds(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    best = {"grpo": 0.2, "opo": 0.4}
    assert num_rounds(plan) == 2
    first = choosing_cells(plan, 0, {})
    assert [cell.seed for cell in first] == [1000] * 8
    scores = scored(first, best)
    second = choosing_cells(plan, 1, scores)
    assert [(c.seed, c.name) for c in second if c.variant.algorithm == "opo"] == [
        (seed, f"opo-learning_rate={rate}-seed{seed}")
        for seed in (1001, 1002)
        for rate in (0.3, 0.4)
    ]
    scores |= scored(second, best)
    assert {name: kept[0] for name, kept in survivors(plan, 2, scores).items()} == {
        "grpo": "learning_rate 0.2",
        "opo": "learning_rate 0.4",
    }
    reported = reported_cells(plan, scores)
    assert [c.name for c in reported] == [
        f"{name}-learning_rate={rate}-seed{seed}"
        for seed in (0, 1)
        for name, rate in (("grpo", 0.2), ("opo", 0.4))
    ]
    last = rounds(plan, 2, scores)[-1]
    assert (last.algorithm, last.seeds, last.kept) == ("opo", 3, ["learning_rate 0.4"])


def test_what_found_no_time_is_not_kept_before_what_ran(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (0.1, 0.2, 0.3))
    scores = {"opo-learning_rate=0.3-seed1000": 0.1}
    kept = survivors(plan, 2, scores)
    assert kept["opo"] == ["learning_rate 0.3"]
    assert kept["grpo"] == ["learning_rate 0.1"]  # nothing ran: the first


def test_a_value_without_a_score_is_kept_last_and_did_have_its_time(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (0.1, 0.2))
    chose = {f"opo-learning_rate={rate}-seed1000": s for rate, s in ((0.1, math.nan), (0.2, -1.0))}
    assert survivors(plan, 1, chose)["opo"] == ["learning_rate 0.2"]
    done = {cell.name: math.nan for cell in reported_cells(plan, chose)}
    write_note(tmp_path, plan, 3600.0, 1800.0, chose | done)
    *_, opo = read_note(tmp_path)
    assert opo == "opo after 1 choosing seeds: learning_rate 0.2 -1.000; kept learning_rate 0.2."


def test_one_value_needs_no_round(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (0.1,))
    assert num_rounds(plan) == 0
    assert len(reported_cells(plan, {})) == 4


def test_the_report_tells_of_it(tmp_path: Path) -> None:
    assert read_note(tmp_path) == []
    plan = make_plan(tmp_path, (0.1, 0.2))
    scores = scored(choosing_cells(plan, 0, {}), {"grpo": 0.1, "opo": 0.2})
    done = reported_cells(plan, scores)[:3]
    write_note(tmp_path, plan, 3600.0, 1800.0, scores | {cell.name: 0.5 for cell in done})
    budget, grpo, opo, left_out = read_note(tmp_path)
    assert budget.startswith("Budget of 60.0 minutes, 30.0 spent: successive halving")
    assert grpo == (
        "grpo after 1 choosing seeds: learning_rate 0.1 1.000, learning_rate 0.2 0.900; kept "
        "learning_rate 0.1."
    )
    assert opo.endswith("kept learning_rate 0.2.")
    assert left_out == "No time was left for opo-learning_rate=0.2-seed1."


def test_the_clock_goes_on_and_stops_what_would_not_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr(halving, "monotonic", lambda: now)
    clock = Clock(tmp_path, 100.0)
    half = clock.within(0.5, lambda: 20.0)
    assert half()
    now += 31
    assert not half()
    assert clock.within(1.0, lambda: 20.0)()
    clock.save()
    now += 1000
    assert Clock(tmp_path, 100.0).spent == 31.0


@pytest.mark.parametrize("text", ["2", "h", "0h", "-1h", "2 days", "1e999h"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ProxstepError, match="must be a time such as 2h"):
        parse_budget(text)

"""The choice of tuned values, and of resampled runs, against loops."""

from __future__ import annotations

from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from proxstep.lab import statistics as ours
from proxstep.lab.choosing import Chosen
from proxstep.lab.outcomes import Outcome
from proxstep.runs.reading import Run


def outcome(task: str, seed: int, tuned: str, final: float, area: float = 0.0) -> Outcome:
    run = Run(Path(), "opo", seed, {}, {}, [])
    return Outcome(run, tuned, task, final, final, area, [], [], [])


def pool(rng, *, tasks: int, seeds: int, values: int, missing: float = 0.0) -> list[Outcome]:
    return [
        outcome(f"task {t}", 10 + n, f"rate {v}", nan if lost else rng.normal(), rng.normal())
        for t in range(tasks)
        for n in range(seeds)
        for v in range(values)
        if (lost := rng.random() < missing) < 2
    ]


def chosen_by_loops(runs: list[Outcome], drawn: dict[str, list[int]], seed: int) -> str | None:
    """The value with the highest mean over tasks of the means over the other drawn seeds."""
    means = {}
    for value in dict.fromkeys(o.tuned for o in runs):
        of_tasks = []
        for task, seeds in drawn.items():
            finals = [
                o.final
                for other in seeds
                for o in runs
                if (o.task, o.run.seed, o.tuned) == (task, other, value)
                if other != seed and not isnan(o.final)
            ]
            if finals:
                of_tasks.append(sum(finals) / len(finals))
        if of_tasks:
            means[value] = sum(of_tasks) / len(of_tasks)
    return max(means, key=lambda value: means[value]) if means else None


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_resample_chooses_as_loops_over_its_runs_do(tasks: int, missing: float) -> None:
    rng = np.random.default_rng(tasks)
    runs = pool(rng, tasks=tasks, seeds=4, values=3, missing=missing)
    chosen = Chosen(runs)
    own = chosen.samples(lambda o: o.final)
    kept = [[o for o in chosen.outcomes if o.task == f"task {t}" and not isnan(o.final)]
            for t in range(tasks)]  # fmt: skip
    redraw = chosen.redraw(lambda o: o.area if not isnan(o.final) else nan)
    assert redraw is not None
    places = [rng.integers(len(one), size=(50, len(one))) for one in own]
    found = redraw(*places)
    table = {(o.task, o.run.seed, o.tuned): o for o in runs}
    for draw in range(50):
        drawn = {f"task {t}": [kept[t][i].run.seed for i in places[t][draw]] for t in range(tasks)}
        for t, (task, seeds) in enumerate(drawn.items()):
            for place, seed in enumerate(seeds):
                stays = kept[t][places[t][draw][place]]
                value = chosen_by_loops(runs, drawn, seed)
                again = table[task, seed, value] if value else stays
                expected = stays.area if isnan(again.final) else again.area
                assert found[t][draw, place] == expected


def test_every_run_once_is_what_is_reported() -> None:
    chosen = Chosen(pool(np.random.default_rng(0), tasks=2, seeds=5, values=3))
    redraw = chosen.redraw(lambda o: o.final)
    assert redraw is not None
    for again, own in zip(
        redraw(np.arange(5), np.arange(5)), chosen.samples(lambda o: o.final), strict=True
    ):
        assert again.tolist() == own.tolist()


def test_one_value_leaves_nothing_to_choose() -> None:
    assert Chosen([outcome("", n, "a", 0.5) for n in range(3)]).redraw(lambda o: o.final) is None


def test_the_interval_knows_of_a_choice_between_values_that_are_alike() -> None:
    """It is wider than that of the reported runs on average, and not where one is clearly best."""
    rng = np.random.default_rng(0)
    widths = {}
    for means in ((0.0, 0.0, 0.0), (0.0, 9.0, -9.0)):
        ratios = []
        for _ in range(20):
            table = rng.normal(means, 1.0, (5, 3))
            chosen = Chosen(
                [outcome("", n, str(v), table[n, v]) for n in range(5) for v in range(3)]
            )
            samples = chosen.samples(lambda o: o.final)
            one, fixed = (
                ours.estimate(ours.interquartile_mean, samples, redraw=redraw)
                for redraw in (chosen.redraw(lambda o: o.final), None)
            )
            ratios.append((one.high - one.low) / (fixed.high - fixed.low))
        widths[means] = np.mean(ratios)
    assert widths[0.0, 0.0, 0.0] > 1.2
    assert 0.9 < widths[0.0, 9.0, -9.0] < 1.1


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_the_best_of_equal_values_is_covered(runs: int) -> None:
    """`scripts/check_statistics.py grid` has 1,000 draws and other grids."""
    rng = np.random.default_rng(runs)
    hits = 0
    for _ in range(100):
        table = rng.normal(0.6, 0.05, (runs, 3))
        chosen = Chosen(
            [outcome("", n, str(v), table[n, v]) for n in range(runs) for v in range(3)]
        )
        samples, redraw = chosen.samples(lambda o: o.final), chosen.redraw(lambda o: o.final)
        found = ours.estimate(ours.interquartile_mean, samples, redraw=redraw)
        hits += found.low <= 0.6 <= found.high
    assert hits >= 92

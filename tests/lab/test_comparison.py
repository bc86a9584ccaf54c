"""From runs to tables and verdict: choice of tuned values, equal KL, pairs."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import replace
from itertools import product
from math import isnan, nan

import numpy as np
import pytest
import yaml
from rich.console import Console

from proxstep.errors import ProxstepError
from proxstep.lab.choosing import Chosen
from proxstep.lab.comparison import BEST, Comparison, compare_runs, contrast
from proxstep.lab.outcomes import Outcome
from proxstep.lab.report import write_report
from proxstep.lab.statistics import difference
from proxstep.lab.summary import summarize
from proxstep.lab.tables import comma_separated, markdown, terminal_tables
from proxstep.lab.verdict import verdict
from proxstep.runs.reading import find_runs, load_run

STEPS = (0, 2, 4, 6)


def curve(final: float, kl: float = 0.3, start: float = 0.2) -> list[dict]:
    """A straight line from start to final, KL and time along with it."""
    return [
        {
            "step": step,
            "score": start + (final - start) * step / 6,
            "kl_policy_initial": kl * step / 6,
            "elapsed_seconds": 10.0 * step,
        }
        for step in STEPS
    ]


@pytest.fixture
def make_runs(make_run, tmp_path):
    """Return a function that writes runs of algorithms by their finals, and reads them.

    No seed has the same luck with two algorithms, unless they share it.
    """

    def make(*, shared_luck: bool = False, **finals):
        for place, (name, values) in enumerate(finals.items()):
            turn = 0 if shared_luck else 2 * place
            for seed, (final, kl) in enumerate([*values[turn:], *values[:turn]]):
                make_run(name, seed, curve(final, kl))
        return find_runs([tmp_path])

    return make


def spread(middle: float, kl: float, seeds: int = 5, width: float = 0.02) -> list:
    """Finals around a middle, KL with a little spread."""
    shifts = np.linspace(-1, 1, seeds)
    return [(middle + width * x, kl * (1 + 0.05 * x)) for x in shifts[::-1]]


def test_an_outcome_reads_final_best_area_and_curves(make_run) -> None:
    records = curve(0.8)
    records[2]["score"] = 0.9
    outcome = Outcome.of(load_run(make_run(records=records)), [])
    assert (outcome.final, outcome.best) == (pytest.approx(0.8), 0.9)
    assert outcome.area == pytest.approx((0.2 / 2 + 0.4 + 0.9 + 0.8 / 2) / 3)
    assert outcome.score_at_kl(0.05) == pytest.approx(0.3)
    assert isnan(outcome.score_at_kl(0.31))
    assert outcome.score_after(10.0) == pytest.approx(0.3)
    assert outcome.kl_at_score(0.4) == pytest.approx(0.1)


def test_an_outcome_of_little_is_nan(make_run) -> None:
    outcome = Outcome.of(load_run(make_run(records=[{"step": 0, "score": 0.5}])), [])
    assert isnan(outcome.final)
    assert isnan(outcome.best)
    assert isnan(outcome.area)
    outcome = Outcome.of(load_run(make_run("b", records=[{"step": 1}])), [])
    assert outcome.scores == []


def test_what_one_evaluation_did_not_measure_is_not_interpolated(make_run) -> None:
    records = curve(0.8)
    records[2]["kl_policy_initial"] = None
    records[0]["elapsed_seconds"] = None
    run = load_run(make_run(records=records))
    outcome = Outcome.of(run, [])
    assert (outcome.kl, outcome.seconds) == ([], [])
    assert isnan(outcome.kl_at_score(0.4))
    (setting,) = compare_runs([run]).settings
    assert isnan(setting.kl)
    assert isnan(setting.standings[0].at_kl.value)


def without_score(records: list[dict], place: int) -> list[dict]:
    """The same, but of one evaluation no score is a number."""
    for record in records:
        record["score_mean_length"] = 3.0
    records[place]["score"] = None
    return records


def test_the_score_of_the_last_evaluation_is_none_of_the_ones_before(make_run) -> None:
    run = load_run(make_run(records=without_score(curve(0.8), -1)))
    outcome = Outcome.of(run, [])
    assert isnan(outcome.final)
    assert isnan(outcome.area)
    assert outcome.best == pytest.approx(0.6)
    assert isnan(outcome.score_at_kl(0.3))
    assert outcome.score_at_kl(0.15) == pytest.approx(0.5)
    assert outcome.kl_at_score(0.4) == pytest.approx(0.1)
    between = Outcome.of(load_run(make_run("b", records=without_score(curve(0.8), 1))), [])
    assert (between.final, between.kl_at_score(0.6)) == pytest.approx((0.8, 0.2))
    assert isnan(between.score_after(10.0))


def test_a_run_without_a_last_score_does_not_win(make_run, tmp_path) -> None:
    """It was the best of all, up to its last evaluation."""
    for seed in range(2):
        make_run("grpo", seed, curve(0.4 + seed / 100))
        make_run("opo", seed, without_score(curve(0.9), -1))
    runs = find_runs([tmp_path])
    comparison = compare_runs(runs)
    assert verdict(comparison) == "No verdict: fewer than two algorithms have a score."
    notes = [f"opo, seed {seed}: no score at its last evaluation." for seed in range(2)]
    assert [note for note in comparison.notes if "no score" in note] == notes
    grpo, opo = summarize(runs)
    assert (opo.final_score, opo.gain) == (None, None)
    assert grpo.final_score is not None
    assert "opo ends without a value for 0.3 nats" in write_report(runs, tmp_path / "x").read_text()


def fake(tuned: str, seed: int, final: float, make_run) -> Outcome:
    run = load_run(make_run("opo", seed, curve(final), name=f"opo-{tuned}-{seed}"))
    return Outcome(run, tuned, "", final, final, final, [0.0], [0.0], [final])


def test_no_seed_has_a_say_in_its_own_value(make_run) -> None:
    """Seed 0 alone does well at b: the others send it to a, and it sends them to b."""
    finals = {"a": (0.5, 0.5, 0.6), "b": (0.9, 0.4, 0.5)}
    outcomes = [fake(v, s, f, make_run) for v, row in finals.items() for s, f in enumerate(row)]
    chosen = Chosen(outcomes)
    assert [(o.run.seed, o.tuned, o.final) for o in chosen.outcomes] == [
        (0, "a", 0.5),
        (1, "b", 0.4),
        (2, "b", 0.5),
    ]
    assert chosen.votes == {"b": 2, "a": 1}


def test_one_seed_chooses_for_itself_and_nan_is_never_chosen(make_run) -> None:
    outcomes = [fake(v, 0, f, make_run) for v, f in (("a", nan), ("b", 0.1), ("c", 0.2))]
    assert [o.tuned for o in Chosen(outcomes).outcomes] == ["c"]


def test_two_algorithms_that_differ_are_told_apart_at_equal_kl_too(make_runs) -> None:
    comparison = compare_runs(make_runs(grpo=spread(0.6, 0.4), opo=spread(0.8, 0.2)))
    (setting,) = comparison.settings
    (pair,) = setting.pairs
    assert (pair.first, pair.second, pair.seeds) == ("opo", "grpo", 5)
    assert pair.final.value == pytest.approx(0.2)
    assert pair.better.value == 1.0
    assert setting.kl == pytest.approx(0.2 * 0.95)
    assert pair.at_kl.value == pytest.approx((0.6 - 0.4 / 2) * 0.95, rel=0.1)
    # At equal score opo is at KL 0.2 * (y - 0.2) / 0.6, grpo at 0.4 * (y - 0.2) / 0.4.
    assert pair.kl_saved.value == pytest.approx(2 / 3, rel=0.01)
    assert pair.kl_saved_by_second.value == pytest.approx(1 - 3, rel=0.02)
    assert pair.seeds_needed == 4  # of fewer, runs are not paired
    text = verdict(comparison)
    assert text.startswith("opo ends 0.200 [0.1")
    assert "above grpo (5 seeds); opo spends 67 % [6" in text
    assert text.endswith("less KL at equal score.")


def test_a_smaller_step_is_nobodys_saving_of_kl(make_run, tmp_path) -> None:
    """Both learn alike, and half the rate spends half the KL; each is best at another rate."""
    rates = [0.1, 0.2]
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({"vary": {"optimizer.learning_rate": rates}, "seeds": 5})
    )
    for name, rate, seed in product(("grpo", "opo"), rates, range(5)):
        best = rate == (0.2 if name == "grpo" else 0.1)
        own = curve((0.61 if best else 0.6) + seed / 100, kl=3 * rate)
        recipe = {"optimizer": {"learning_rate": rate}}
        make_run(name, seed, own, recipe, name=f"{name}-{rate}-{seed}")
    comparison = compare_runs(find_runs([tmp_path]))
    assert [list(comparison.chosen[name].votes) for name in ("grpo", "opo")] == [
        ["learning_rate 0.2"],
        ["learning_rate 0.1"],
    ]
    (pair,) = comparison.settings[0].pairs
    assert abs(pair.kl_saved.value) < 0.001
    assert "less KL" not in verdict(comparison)


def test_a_saving_of_kl_is_that_at_the_values_which_both_have(make_run, tmp_path) -> None:
    rates = {"grpo": [0.1, 0.2], "opo": [0.1, 0.2, 0.4]}
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({"vary": {"optimizer.learning_rate": rates["opo"]}, "seeds": 5})
    )
    shares = {0.1: 0.5, 0.2: 0.125, 0.4: 0.001}
    for name in rates:
        for rate, seed in product(rates[name], range(5)):
            kl = 3 * rate * (shares[rate] if name == "opo" else 1) * (1 + seed / 50)
            recipe = {"optimizer": {"learning_rate": rate}}
            own = curve((0.601 if name == "opo" else 0.6) + seed / 100, kl)
            make_run(name, seed, own, recipe, name=f"{name}-{rate}-{seed}")
    comparison = compare_runs(find_runs([tmp_path]))
    (pair,) = comparison.settings[0].pairs
    assert pair.first == "opo"
    assert pair.kl_saved.value == pytest.approx(0.75, abs=0.01)  # the root of 1/2 * 1/8 is 1/4
    assert verdict(comparison).endswith("less KL at equal score, both at the same learning_rate.")


@pytest.mark.filterwarnings("error")
def test_a_policy_that_has_not_moved_is_in_no_ratio_of_kl(make_runs) -> None:
    """Its KL is measured as a little below 0, as rounding has it."""
    runs = make_runs(grpo=spread(0.6, 0.4), opo=spread(0.8, 0.2))
    for record in (row for run in runs if run.algorithm == "opo" for row in run.records):
        record["kl_policy_initial"] = -1e-9
    (pair,) = compare_runs(runs).settings[0].pairs
    assert isnan(pair.kl_saved.value)
    assert pair.final.value == pytest.approx(0.2)


def test_two_that_do_not_differ_are_not_and_the_verdict_says_what_would_tell(make_runs) -> None:
    runs = make_runs(grpo=spread(0.6, 0.3, width=0.1), opo=spread(0.62, 0.3, width=0.1))
    comparison = compare_runs(runs)
    needed = comparison.settings[0].pairs[0].seeds_needed
    assert 20 < needed < 600
    assert verdict(comparison) == (
        f"opo and grpo cannot be told apart at 5 seeds: {needed - 5} more would be needed."
    )


def test_the_luck_of_a_seed_is_taken_off_where_both_have_it(make_runs) -> None:
    """Differences of 0.02 with a spread of 0.1, of which each seed has its own part."""
    sizes = {"grpo": spread(0.6, 0.3, width=0.1), "opo": spread(0.62, 0.3, width=0.101)}
    (pair,) = compare_runs(make_runs(shared_luck=True, **sizes)).settings[0].pairs
    assert pair.final.is_certain
    assert pair.seeds_needed == 4
    assert pair.better.low < 0.5  # which of two runs with any seeds ends higher is a matter of luck


@pytest.mark.parametrize("dropped", [0, 4])
def test_runs_are_paired_only_if_all_seeds_are_there_and_there_are_four(
    make_runs, tmp_path, dropped: int
) -> None:
    sizes = {"grpo": spread(0.6, 0.3, width=0.1), "opo": spread(0.62, 0.3, width=0.101)}
    make_runs(shared_luck=True, **sizes)
    for name in ("opo", "grpo") if dropped == 0 else ("opo",):
        for seed in (dropped, 1):
            shutil.rmtree(next(tmp_path.glob(f"{name}*{seed}")))
    (pair,) = compare_runs(find_runs([tmp_path])).settings[0].pairs
    assert pair.seeds == 3
    assert pair.final.low < -0.09


def test_two_settings_under_one_name_are_not_one_algorithm(make_run, tmp_path) -> None:
    """The last one by name would count, and the others would be lost without a word."""
    for seed in range(4):
        make_run("grpo", seed, curve(0.6 + seed / 100), name=f"grpo-{seed}")
        make_run("opo", seed, curve(0.8 + seed / 100), name=f"opo-a{seed}")
        make_run("opo", seed, curve(0.3 + seed / 100), name=f"opo-b{seed}")
    comparison = compare_runs(find_runs([tmp_path]))
    assert verdict(comparison).startswith("No verdict: opo has several runs of one seed")
    assert "opo has 8 runs over 4 seeds." in comparison.notes


def test_a_seed_without_a_score_at_the_chosen_value_is_told(make_run) -> None:
    finals = {"a": (0.5, 0.5, 0.5), "b": (0.9, 0.9, nan)}
    outcomes = [fake(v, s, f, make_run) for v, row in finals.items() for s, f in enumerate(row)]
    chosen = Chosen(outcomes)
    assert chosen.unmeasured == [(2, "b")]
    notes = Comparison([], {"opo": chosen}, "", [], []).notes
    assert "opo, seed 2: no score at b, which the other seeds chose." in notes


def test_runs_of_different_tasks_are_not_held_against_each_other(make_run) -> None:
    found = [fake("", seed, 0.8 + seed / 100, make_run) for seed in range(4)]
    ours, theirs = (Chosen([replace(o, task=task) for o in found]) for task in ("easy", "hard"))
    assert isnan(contrast(difference, ours, theirs, lambda o: o.final).value)
    assert contrast(difference, ours, ours, lambda o: o.final).value == 0.0


def test_of_three_the_verdict_says_who_is_clear_and_who_is_not(make_runs) -> None:
    runs = make_runs(dro=spread(0.3, 0.3), grpo=spread(0.605, 0.3), opo=spread(0.61, 0.3))
    text = verdict(compare_runs(runs))
    assert text.startswith("opo ends 0.310 [")
    assert "above dro; it cannot be told apart from grpo at 5 seeds: " in text


def test_there_is_no_verdict_from_one_seed_or_one_algorithm(make_runs, make_run) -> None:
    assert verdict(compare_runs([load_run(make_run())])).startswith("isopo alone was run")
    runs = make_runs(grpo=[(0.6, 0.3)], opo=[(0.7, 0.3)])
    assert verdict(compare_runs([r for r in runs if r.algorithm != "isopo"])).startswith(
        "No verdict from one seed"
    )


@pytest.fixture
def grid(make_run, tmp_path):
    """Two algorithms, three learning rates, four seeds; opo is best at 0.3, grpo at 0.1."""
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump({"vary": {"optimizer.learning_rate": [0.1, 0.3]}, "seeds": 4})
    )
    finals = {("grpo", 0.1): 0.6, ("grpo", 0.3): 0.3, ("opo", 0.1): 0.5, ("opo", 0.3): 0.8}
    for (name, rate), middle in finals.items():
        for seed, (final, kl) in enumerate(spread(middle, 0.3, seeds=4)):
            recipe = {"optimizer": {"learning_rate": rate}}
            make_run(name, seed, curve(final, kl), recipe, name=f"{name}-{rate}-{seed}")
    return find_runs([tmp_path])


def test_a_grid_is_reported_at_its_best_and_at_equal_values(grid) -> None:
    comparison = compare_runs(grid)
    assert [s.name for s in comparison.settings] == [BEST, "learning_rate 0.1", "learning_rate 0.3"]
    finals = {
        (s.name, row.algorithm): pytest.approx(row.final.value, abs=1e-9)
        for s in comparison.settings
        for row in s.standings
    }
    assert finals == {
        (BEST, "grpo"): 0.6,
        (BEST, "opo"): 0.8,
        ("learning_rate 0.1", "grpo"): 0.6,
        ("learning_rate 0.1", "opo"): 0.5,
        ("learning_rate 0.3", "grpo"): 0.3,
        ("learning_rate 0.3", "opo"): 0.8,
    }
    assert len(comparison.runs) == 8
    assert verdict(comparison).startswith(
        "Each at its best learning_rate, chosen on other seeds: opo ends 0.200 ["
    )
    assert "grpo: learning_rate 0.1 in 4; opo: learning_rate 0.3 in 4" in markdown(comparison)


def test_tables_fit_a_terminal_and_hold_what_the_page_does(grid, tmp_path) -> None:
    comparison = compare_runs(grid)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        for table in terminal_tables(comparison):
            console.print(table)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = [line for line in lines if line.startswith("opo") and "best of" in line]
    assert " ".join(row.split()).startswith("opo best of the grid 4 0.800 [0.7")
    page = write_report(grid, tmp_path / "page.html").read_text()
    assert verdict(comparison) in page
    assert "Differences, each algorithm at its best of the grid" in page
    assert "16 runs" in page
    assert "The grpo runs differ in" not in page


def test_csv_has_every_figure_with_all_digits(grid) -> None:
    comparison = compare_runs(grid)
    rows = list(csv.DictReader(io.StringIO(comma_separated(comparison))))
    assert len(rows) == 3 * (2 * 5 + 7)
    (row,) = [
        row
        for row in rows
        if (row["setting"], row["algorithm"], row["against"], row["measure"])
        == (BEST, "opo", "", "final")
    ]
    final = comparison.settings[0].standings[1].final
    assert (float(row["value"]), float(row["low"])) == (final.value, final.low)
    assert row["seeds"] == "4"


def test_tasks_are_averaged_and_are_no_tuning(make_run, tmp_path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"vary": {"task.difficulty": [1, 2]}}))
    for name, shift in (("grpo", 0.0), ("opo", 0.1)):
        for difficulty, middle in ((1, 0.8), (2, 0.4)):
            for seed in range(3):
                recipe = {"task": {"difficulty": difficulty}}
                records = curve(middle + shift + 0.01 * seed)
                make_run(name, seed, records, recipe, name=f"{name}-{difficulty}-{seed}")
    comparison = compare_runs(find_runs([tmp_path]))
    (setting,) = comparison.settings
    assert [row.seeds for row in setting.standings] == [3, 3]
    assert setting.standings[0].final.value == pytest.approx(0.61)
    assert setting.pairs[0].better.value == 1.0
    assert not comparison.tuned


@pytest.mark.parametrize("plan", [{"seeds": 4}, {"vary": None}, {"vary": ["seed"]}])
def test_a_plan_that_does_not_say_what_it_varies_is_named(make_run, tmp_path, plan) -> None:
    make_run()
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ProxstepError, match=r"plan\.yaml: lacks `vary`; restore it"):
        compare_runs(find_runs([tmp_path]))


@pytest.mark.parametrize("note", [{}, {"budget_seconds": "long", "spent_seconds": 1, "rounds": []}])
def test_a_damaged_note_of_a_halving_is_named(make_run, tmp_path, note) -> None:
    make_run()
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"vary": {}, "halving": True}))
    (tmp_path / "halving.yaml").write_text(yaml.safe_dump(note))
    with pytest.raises(ProxstepError, match=r"halving\.yaml: damaged; restore it"):
        compare_runs(find_runs([tmp_path]))


def test_all_can_be_compared_with_one(make_run, tmp_path) -> None:
    finals = {"plain": 0.6, "better": 0.8, "worse": 0.4, "alike": 0.61}
    for place, (name, final) in enumerate(finals.items()):
        luck = np.roll(spread(final, 0.3, width=0.02), 2 * place, axis=0)
        for seed, (own, kl) in enumerate(luck.tolist()):
            settings = {"label": name} if name != "plain" else None
            make_run("isopo", seed, curve(own, kl), settings, name=f"{name}-seed{seed}")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"vary": {}, "against": "isopo"}))
    comparison = compare_runs(find_runs([tmp_path]))
    (setting,) = comparison.settings
    assert [(p.first, p.second) for p in setting.pairs] == [
        (name, "isopo") for name in ("better", "alike", "worse")
    ]
    text = verdict(comparison)
    assert text.startswith("better ends 0.200 [0.1")
    assert "above isopo; worse ends 0.200 [0.1" in text
    assert "below isopo; alike cannot be told apart from isopo at 5 seeds" in text

"""The audit of a gain: intervals, trivial answers, and completions before and after."""

from __future__ import annotations

import pytest
import scipy.stats

from proxstep.lab.audit import Answers, audit, has_true_equations
from proxstep.lab.report import write_report
from proxstep.lab.statistics import mean_interval
from proxstep.runs.reading import find_runs

BASELINES = {
    "constant": {"what": "7", "score": 0.1},
    "copied": {"what": "the first number", "score": 0.05},
}


def rows(step: int, right: int, number: int = 60) -> list[dict]:
    return [
        {
            "step": step,
            "prompt": f"Question: {i} and 1?\nAnswer:",
            "completion": f" {i} + 1 = {i + 1}. The answer is {i + 1}." if i < right else " 7",
            "answer": str(i + 1),
            "reward": float(i < right),
        }
        for i in range(number)
    ]


def test_the_interval_is_students() -> None:
    values = [0.1, 0.25, 0.3, 0.2]
    found = mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 3, scipy.stats.tmean(values), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert mean_interval([0.5]).text() == "0.500"


def test_an_equation_counts_if_all_are_true() -> None:
    assert has_true_equations("12 / 4 = 3. 3 * 5 = 15. The answer is 15.")
    assert not has_true_equations("12 / 4 = 3. 3 * 5 = 16.")
    assert not has_true_equations("12 / 5 = 2.")
    assert not has_true_equations("7 / 0 = 1.")
    assert not has_true_equations("The answer is 15.")
    assert not has_true_equations("1 + 1 = 2.5")


def test_answers_are_counted() -> None:
    found = Answers.of(rows(0, right=20))
    assert (found.most_frequent, found.share) == ("7", 41 / 60)  # 6 + 1 is 7 as well
    assert found.with_equations == found.true_equations == pytest.approx(1 / 3)


def test_runs_are_audited_by_algorithm(make_run, tmp_path) -> None:
    for seed, right in enumerate((30, 36, 33)):
        samples = rows(0, right=12) + rows(6, right=right)
        make_run("isopo", seed, samples=samples, info={"baselines": BASELINES})
    found = audit(find_runs([tmp_path]))
    assert found is not None
    (isopo,) = found.algorithms
    assert (found.num_prompts, isopo.num_seeds) == (60, 3)
    assert found.constant == BASELINES["constant"]
    assert isopo.start.value == pytest.approx(0.2)
    assert isopo.gain.value == pytest.approx(0.35)
    assert isopo.gain.low == pytest.approx(0.35 - scipy.stats.t.ppf(0.975, 2) * 0.05 / 3**0.5)
    page = write_report(find_runs([tmp_path]), tmp_path / "page.html").read_text()
    assert "Is the gain real?" in page
    assert "The best constant answer, 7, would score 0.100" in page
    assert "copying\nthe first number of the prompt 0.050" in page
    assert "+0.350 [+0.226, +0.474]" in page


def test_a_baseline_that_was_no_number_is_left_out(make_run, tmp_path) -> None:
    samples = rows(0, right=12) + rows(6, right=30)
    baselines = {**BASELINES, "copied": {"what": "the first number", "score": None}}
    make_run("isopo", samples=samples, info={"baselines": baselines})
    page = write_report(find_runs([tmp_path]), tmp_path / "page.html").read_text()
    assert "The best constant answer, 7, would score 0.100." in page
    assert "copying" not in page


@pytest.mark.parametrize("samples", [None, rows(0, 3, 4) + rows(6, 3, 4), rows(6, 3)])
def test_runs_that_kept_little_are_not_audited(make_run, tmp_path, samples) -> None:
    make_run("isopo", samples=samples)
    runs = find_runs([tmp_path])
    assert audit(runs) is None
    page = write_report(runs, tmp_path / "page.html").read_text()
    assert "Is the gain real?" not in page

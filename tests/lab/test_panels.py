"""What the charts of a comparison are of."""

from __future__ import annotations

import pytest

from proxstep.lab.panels import charts_of
from proxstep.lab.summary import summarize
from proxstep.runs.reading import load_run
from tests.lab.conftest import two_evaluations


def test_entropies_are_of_the_same_prompts_where_all_runs_measured_them(make_run) -> None:
    """A step's is of the sequences that its update takes, which algorithms choose."""
    alike = [{**row, "evaluation_entropy": 0.7} for row in two_evaluations(0)]
    new, old = (
        [load_run(make_run("grpo", seed, records)) for seed in (first, first + 1)]
        for first, records in ((0, alike), (2, None))
    )
    for runs, field, last in ((new, "evaluation_entropy", 0.7), (new + old, "entropy", 0.4)):
        assert [chart.field for chart in charts_of(runs)][4] == field
        (summary,) = summarize(runs)
        assert summary.entropy is not None
        assert summary.entropy.mean == pytest.approx(last)

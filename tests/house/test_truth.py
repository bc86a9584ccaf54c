"""The plans of experiments/truth, what is kept of their runs, and the pages made of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from experiments import truth
from experiments.truth import Experiment
from rich.console import Console

from proxstep.lab.compare import find_done, make_jobs
from proxstep.training import lifecycle

NAMES = sorted(path.parent.name for path in truth.TRUTH.glob("*/plan.yaml"))
PLAN = """\
# A question.
steps: 2
task: {name: arithmetic, difficulty: 1}
compare:
  arms: {plain: {algorithm: reinforce}, other: {algorithm: isopo}}
  against: plain
  vary: {optimizer.learning_rate: [1e-5, 1e-4]}
  seeds: 2
"""
INFO = {
    "status": "finished",
    "proxstep_version": "0.1.0",
    "machine": "CPU",
    "started": "2026-11-21T01:32:11",
    "baselines": {"constant": 0.1},
}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(truth, "TRUTH", tmp_path / "truth")
    monkeypatch.setattr(truth, "ROOT", tmp_path)
    (tmp_path / "truth" / "one").mkdir(parents=True)
    (tmp_path / "truth" / "one" / "plan.yaml").write_text(PLAN)
    return Experiment("one")


def finish(
    experiment: Experiment, name: str, final: float, first: tuple[float | None, float] | None = None
) -> None:
    """Leave a run behind, and keep it."""
    leave(experiment, name, final, first)
    experiment.keep(name)


def leave(
    experiment: Experiment, name: str, final: float, first: tuple[float | None, float] | None = None
) -> None:
    """Write what a run leaves behind; of its first step score and KL, where it was evaluated."""
    score, kl = first or (None, None)
    folder = experiment.output / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(truth.dump_recipe(experiment.recipe(name)))
    (folder / "run.json").write_text(json.dumps(INFO))
    records = [
        {"step": 0, "score": 0.25, "kl_policy_initial": None, "elapsed_seconds": 1.0},
        {
            "step": 1,
            "score": score,
            "kl_policy_initial": kl,
            "reward": 0.5,
            "elapsed_seconds": 2.0,
        },
        {"step": 2, "score": final, "kl_policy_initial": 0.0123456789, "elapsed_seconds": 3.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_can_be_run_and_its_rows_are_of_it(name: str) -> None:
    experiment = Experiment(name)
    for variant in experiment.plan.variants:
        lifecycle.check(variant.recipe)
    own = [row["of"] for row in truth.read_rows(experiment.rows)]
    assert len(own) == len(set(own))
    assert set(own) <= set(experiment.digests.values())
    assert experiment.rows.stat().st_size < 2**20 if experiment.rows.exists() else True


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if Experiment(n).rows.exists()])
def test_a_page_is_that_of_the_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = Experiment(name)
    again = Experiment(name)
    again.output, again.figure = tmp_path / "runs" / name, tmp_path / "figure.svg"
    again.page = tmp_path / "page.md"
    shutil.copy(committed.page, again.page)
    again.publish()
    assert again.page.read_text() == committed.page.read_text()


def test_scores_at_equal_kl_are_of_the_values_that_were_measured_around_it(
    experiment: Experiment,
) -> None:
    """The first evaluation is at 2 or 3 mnat, the last at 12.3, and nobody gets to 16."""
    for name in experiment.cells:
        other, large = name.startswith("other"), "0.0001" in name
        final = 0.5 + 0.25 * other - 0.1 * large
        finish(experiment, name, final, (0.25, 0.003 if large and other else 0.002))
    experiment.publish()
    table = experiment.page.read_text().split("was first spent, in mnat")[1]
    assert "\n|  | 2 | 4 | 8 |\n" in table
    share = 6 / 10.3457
    less = 0.25 * share
    rows = [line for line in table.splitlines() if line[:7] in ("| plain", "| other")]
    plain, other = rows[:2]  # the next two are of another table
    assert plain.endswith(f" | {0.25 + 0.25 * share:.3f} |")
    assert other.startswith("| other | 0.250: +0.000 [")
    assert other.endswith(f"| {0.25 + 0.5 * share:.3f}: +{less:.3f} [+{less:.3f}, +{less:.3f}] |")


def test_no_kl_before_the_first_evaluation_is_read_off(experiment: Experiment) -> None:
    """Between no step and the first evaluation nothing was measured, and a chord is not."""
    for name in experiment.cells:
        finish(experiment, name, 0.75)
    experiment.publish()
    assert "was first spent, in mnat" not in experiment.page.read_text()


def test_savings_are_told_at_each_value_too(experiment: Experiment) -> None:
    for name in experiment.cells:
        kl = 0.002 if name.startswith("other") else 0.004
        finish(experiment, name, 0.75, (0.75, kl / 10 if "0.0001" in name else kl))
    experiment.publish()
    table = experiment.page.read_text().split("both at the same learning rate:")[1]
    assert "\n|  | 1e-5 | 0.0001 |\n" in table
    assert "\n| other | 50 % [50, 50] | 50 % [50, 50] |\n" in table


def test_a_row_stands_for_its_run(experiment: Experiment) -> None:
    names = list(experiment.cells)
    finish(experiment, names[0], 0.5)
    finish(experiment, names[1], 0.75)
    assert list(experiment.done()) == names[:2]
    row = experiment.done()[names[0]]
    assert row["series"]["score"] == [[0, 2], [0.25, 0.5]]
    assert row["series"]["kl_policy_initial"] == [[2], [0.0123457]]
    assert "baselines" not in row["info"]

    shutil.rmtree(experiment.output)
    experiment.restore()
    jobs = make_jobs(experiment.plan.cells(), experiment.output)
    find_done(jobs, experiment.output)
    assert [job.folder.name for job in jobs if job.code == 0] == names[:2]
    experiment.publish()
    text = experiment.page.read_text()
    assert "2 of 8 runs of [`plan.yaml`]" in text
    assert "| plain | 1e-5 (1, edge) | 1 | 0.500 | 12.3 |" in text
    experiment.page.write_text(text.replace("# one", "# One, by hand"))
    experiment.publish()
    assert experiment.page.read_text() == text.replace("# one", "# One, by hand")


def test_a_changed_arm_has_no_rows(experiment: Experiment) -> None:
    for name in list(experiment.cells)[:2]:
        finish(experiment, name, 0.5)
    path = experiment.folder / "plan.yaml"
    path.write_text(PLAN.replace("algorithm: isopo", "algorithm: isopo-npg"))
    assert [name.partition("-")[0] for name in Experiment("one").done()] == ["plain"]
    path.write_text(PLAN.replace("steps: 2", "steps: 3"))
    assert not Experiment("one").done()


def test_plans_share_the_runs_that_both_ask_for(experiment: Experiment) -> None:
    finish(experiment, next(iter(experiment.cells)), 0.5)
    (truth.TRUTH / "two").mkdir()
    arms = "arms: {base: {algorithm: reinforce}, third: {algorithm: grpo}}"
    text = "".join(
        f"  {arms}\n" if "arms:" in line else line for line in PLAN.splitlines(keepends=True)
    )
    (truth.TRUTH / "two" / "plan.yaml").write_text(text.replace("against: plain", "against: base"))
    two = Experiment("two")
    assert list(two.done()) == ["base-learning_rate=1e-05-seed0"]
    two.restore()
    assert truth.load_run(two.output / "base-learning_rate=1e-05-seed0").algorithm == "base"


def test_a_run_that_is_interrupted_has_no_row_and_ends_the_work(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, trained = list(experiment.cells), []

    def train(recipe: Any, progress: Any, *, overwrite: bool) -> str:
        name = Path(recipe.output_dir).name
        trained.append(name)
        if name == names[2]:
            return "interrupted"
        leave(experiment, name, 0.5)
        return "finished"

    finish(experiment, names[0], 0.5)
    monkeypatch.setattr(truth, "train", train)
    assert experiment.run(math.inf, Console(quiet=True)) == "interrupted"
    assert trained == names[1:3]
    assert list(experiment.done()) == names[:2]


def test_a_run_is_the_same_wherever_the_house_stands(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(iter(experiment.cells))
    recipe = experiment.recipe(name)

    def at(root: Path) -> str:
        monkeypatch.setattr(truth, "ROOT", root)
        (root / "policies" / "one").mkdir(parents=True, exist_ok=True)
        (root / "truth" / "a").mkdir(parents=True, exist_ok=True)
        above = "/truth/a/../.." if "there" in root.name else ""
        model = recipe.model.model_copy(update={"name": f"{root}{above}/policies/one"})
        return truth.digest(recipe.model_copy(update={"model": model, "output_dir": f"{root}/x"}))

    assert at(tmp_path / "here") == at(tmp_path / "there")
    assert at(tmp_path) != truth.digest(recipe)


def test_the_list_says_what_is_left(experiment: Experiment) -> None:
    finish(experiment, next(iter(experiment.cells)), 0.5)
    line, everything = truth.listing()
    assert line.startswith("one ")
    assert "1 of   8 runs" in line
    assert line.endswith("A question.")
    assert everything.startswith("all ")

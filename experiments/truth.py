"""The papers' claims, each tested by a plan, as `proxstep compare` would work through it.

    python experiments/truth.py --list                    # what there is, and its minutes
    python experiments/truth.py drift-fisher              # goes on where it was stopped
    python experiments/truth.py drift-fisher --minutes 20 # a piece of it
    python experiments/truth.py drift-fisher --page       # table, figure and page, from the rows

experiments/truth/NAME/plan.yaml is the plan. Each finished run becomes a line of rows.jsonl beside
it, and is never run again, on this machine or another, nor by another plan that asks for the same:
the initial policies are committed (experiments/policies), so that every machine begins with the
same weights. An arm whose settings were changed since has no lines; that a default of proxstep was
changed is not seen. The page is docs/findings/NAME.md; what stands between its markers is written
anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from rich.console import Console

from proxstep.config.loading import dump_recipe, with_absolute_paths
from proxstep.config.recipe import Recipe
from proxstep.config.yamlfile import read_yaml
from proxstep.lab.arms import Design
from proxstep.lab.comparison import Comparison, compare_runs
from proxstep.lab.plan import Cell, Plan
from proxstep.lab.plots import STYLE
from proxstep.lab.verdict import verdict
from proxstep.runs.durable import write_file
from proxstep.runs.reading import Run, find_runs, load_run, read_rows
from proxstep.runs.schema import FIELDS
from proxstep.training.lifecycle import train

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import Quiet, write_between
from experiments.truth_plots import draw
from experiments.truth_tables import parts_of, reference, tables

ROOT = Path(__file__).parents[1]
TRUTH = ROOT / "experiments" / "truth"
KEPT = (
    *("reward", "score", "kl_policy_initial", "kl_initial_policy", "evaluation_entropy"),
    *("grad_norm", "grad_response_efficiency", "advantage_range", "completions_mean_length"),
    *("completions_max_length", "elapsed_seconds", "seconds_update", "seconds_step"),
)
"""Fields of metrics.jsonl that a line of rows.jsonl has; geometry/... beside them."""
MOST_STEPS = 100
"""Steps that a line keeps of a field, the last among them: of longer runs every so many."""
SECONDS_A_TOKEN = {"arithmetic": 1.4e-3, "stories": 2e-2}
"""Processor seconds of a run by its task for each token that may be sampled; see `guess`."""
SECONDS_A_START = 12.0
BEGIN, END = "<!-- results: python experiments/truth.py {} -->", "<!-- end of the results -->"


class Experiment:
    """A plan with its rows.

    Args:
        name: Of its folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = TRUTH / name
        self.rows = self.folder / "rows.jsonl"
        self.output = ROOT / "outputs" / "truth" / name
        self.page = ROOT / "docs" / "findings" / f"{name}.md"
        self.figure = ROOT / "docs" / "figures" / "findings" / f"{name}.svg"

    @cached_property
    def design(self) -> Design:
        """The plan file's section `compare`."""
        return Design.of(read_yaml(self.folder / "plan.yaml"), f"{self.name}/plan.yaml")

    @cached_property
    def plan(self) -> Plan:
        """The plan."""
        own = self.design
        return Plan.of(
            self.folder / "plan.yaml", (), own.names(None), own.vary, own.seeds, design=own
        )

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """The plan's runs, by the names of their folders."""
        return {cell.name: cell for cell in self.plan.cells()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """What tells the row of each run from all others, in any plan, by the run's name."""
        return {name: digest(self.recipe(name)) for name in self.cells}

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of a run."""
        cell = self.cells[name]
        folder = str(self.output / name)
        return cell.variant.recipe.model_copy(update={"seed": cell.seed, "output_dir": folder})

    def done(self) -> dict[str, dict[str, Any]]:
        """Return the rows of the plan as it stands, of this file or another, in its order."""
        paths = sorted(TRUTH.glob("*/rows.jsonl"))
        rows = {row["of"]: row for path in paths for row in read_rows(path)}
        return {name: rows[of] for name, of in self.digests.items() if of in rows}

    def restore(self) -> None:
        """Make run folders of the rows, whatever an unfinished run has left there."""
        for name, row in self.done().items():
            folder = self.output / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(dump_recipe(with_absolute_paths(self.recipe(name))))
            (folder / "metrics.jsonl").write_text("".join(_records(row["series"])))
            write_file(folder / "run.json", json.dumps(row["info"]).encode())
        if any(self.output.glob("*/run.json")):
            self.plan.write(self.output)

    def run(self, ends: float, console: Console) -> str:
        """Work on the plan until a time, run by run; return how the last one ended."""
        done = self.done()
        for name in self.cells:
            if time.monotonic() > ends:
                return "late"
            if name in done:
                continue
            status = train(self.recipe(name), Quiet(), overwrite=True)
            if status != "finished":
                return status
            self.keep(name)
            done = self.done()
            score = done[name]["series"]["score"][1][-1]
            console.out(f"{self.name} {len(done)} of {len(self.cells)}, {name}: {score:.3f}")
        return "finished"

    def keep(self, name: str) -> None:
        """Add the row of a finished run."""
        row = {"run": name, "of": self.digests[name], **_row(load_run(self.output / name))}
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def minutes(self) -> tuple[float, float]:
        """Return the minutes of one core that the runs took, and that those without a row will."""
        rows = self.done()
        known: dict[str, list[float]] = {}
        for name, row in rows.items():
            seconds = row["series"]["elapsed_seconds"][1][-1] + SECONDS_A_START
            known.setdefault(self.cells[name].variant.algorithm, []).append(seconds)
        total, taken = 0.0, sum(seconds for of in known.values() for seconds in of)
        for name, cell in self.cells.items():
            if name not in rows:
                measured = known.get(cell.variant.algorithm)
                total += median(measured) if measured else _guess(cell)
        return taken / 60, total / 60

    def publish(self) -> None:
        """Write figure and page from the rows."""
        found = [f"None of {self._plan_text()} has run yet."]
        if rows := self.done():
            self.restore()
            comparison = compare_runs(find_runs([self.output / name for name in rows]))
            parts = parts_of(comparison, self.name)
            self.figure.parent.mkdir(parents=True, exist_ok=True)
            with mpl.rc_context({**STYLE, "svg.hashsalt": "proxstep"}):
                draw(comparison, parts).savefig(self.figure, metadata={"Date": None})
            found = list(self._results(comparison, parts, rows))
        begin = BEGIN.format(self.name)
        if not self.page.exists():
            self.page.parent.mkdir(parents=True, exist_ok=True)
            self.page.write_text(f"# {self.name}\n\n{begin}\n{END}\n", encoding="utf-8")
        write_between(self.page, begin, END, "\n\n".join(found))

    def _plan_text(self) -> str:
        plan = f"[`plan.yaml`](../../experiments/truth/{self.name}/plan.yaml)"
        return f"{len(self.cells)} runs of {plan}"

    def _results(
        self, comparison: Comparison, parts: list[Comparison], rows: dict[str, dict[str, Any]]
    ) -> Iterator[str]:
        machines = sorted({row["info"]["machine"] for row in rows.values()})
        dates = sorted({row["info"]["started"][:10] for row in rows.values()})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        yield f"{len(rows)} of {self._plan_text()}; {'; '.join(machines)}; {when}."
        yield from map(verdict, parts)
        if whose := reference(parts):
            yield f"![Each arm's score less {whose}](../figures/findings/{self.name}.svg)"
        yield from tables(comparison, parts, self.name)


def digest(recipe: Recipe) -> str:
    """Return what tells a run's recipe from all others, wherever it is run and however labeled."""
    own = with_absolute_paths(recipe).model_dump(
        mode="json", exclude_defaults=True, exclude={"label", "output_dir"}
    )
    text = json.dumps(own, sort_keys=True).replace(f"{ROOT}/", "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _guess(cell: Cell) -> float:
    recipe = cell.variant.recipe
    sampled = recipe.rollout.num_prompts * recipe.rollout.num_generations * recipe.steps
    tokens = sampled * recipe.rollout.max_completion_length
    evaluated = recipe.task.num_validation * recipe.rollout.max_completion_length
    tokens += evaluated * (recipe.steps // recipe.evaluation.every) * 0.5
    factor = 1.6 if recipe.geometry.rule != "none" else 1.0
    return SECONDS_A_START + tokens * SECONDS_A_TOKEN.get(recipe.task.name, 1.2e-4) * factor


def _row(run: Run) -> dict[str, Any]:
    """Return a run's own part of its row."""
    names = [name for record in run.records for name in record if name.startswith("geometry/")]
    series = {}
    for name in (*KEPT, *dict.fromkeys(names)):
        steps, values = map(thinned, run.series(name))
        if values:
            series[name] = [steps, [float(f"{value:.6g}") for value in values]]
    info = {key: v for key, v in run.info.items() if isinstance(v, str | int | float | bool)}
    return {"info": info, "series": series}


def thinned(values: list[Any]) -> list[Any]:
    """Return every so many of the values, counted from the last.

    >>> thinned(list(range(250)))[:2], len(thinned(list(range(250))))
    ([0, 3], 84)
    """
    every = max(1, -(-len(values) // MOST_STEPS))
    return values[::-every][::-1]


def _records(series: dict[str, list[list[Any]]]) -> Iterator[str]:
    """Yield the lines of a metrics.jsonl."""
    found: dict[int, dict[str, Any]] = {}
    for name, (steps, values) in series.items():
        for step, value in zip(steps, values, strict=True):
            found.setdefault(step, dict.fromkeys(FIELDS))[name] = value
    for step in sorted(found):
        yield json.dumps({**found[step], "step": step}) + "\n"


def listing() -> Iterator[str]:
    """Yield a line for each experiment, and one for all; several may share runs."""
    all_taken = all_left = 0.0
    for path in sorted(TRUTH.glob("*/plan.yaml")):
        found = Experiment(path.parent.name)
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        done, all_runs = len(found.done()), len(found.cells)
        taken, left = found.minutes()
        text = f"{done:3d} of {all_runs:3d} runs, {taken:4.0f} min taken, {left:4.0f} left"
        yield f"{found.name:24} {text}  {first}"
        all_taken, all_left = all_taken + taken, all_left + left
    yield f"{'all':24} {all_taken / 60:.1f} hours of one core taken, {all_left / 60:.1f} left"


def main() -> int:
    """Work on an experiment, or list them."""
    parser = argparse.ArgumentParser(description="The papers' claims, tested.")
    parser.add_argument("name", nargs="*", help="folders of experiments/truth")
    parser.add_argument("--list", action="store_true", help="list them with the minutes left")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--page", action="store_true", help="run nothing")
    arguments, console = parser.parse_args(), Console(width=170)
    if arguments.list or not arguments.name:
        for line in listing():
            console.out(line, highlight=False)
        return 0
    ends = time.monotonic() + 60 * arguments.minutes
    for name in arguments.name:
        if not (TRUTH / name / "plan.yaml").exists():
            parser.error(f"{name}: no such folder of {TRUTH.relative_to(ROOT)}; see --list")
        found = Experiment(name)
        status = "finished" if arguments.page else found.run(ends, console)
        found.publish()
        console.out(f"{len(found.done())} of {len(found.cells)} runs: {found.page}")
        if status != "finished":
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())

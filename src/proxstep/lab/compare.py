"""A plan worked through: each cell in its own process, several at a time, none of them twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from proxstep.config.loading import dump_recipe, with_absolute_paths
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.lab.halving import (
    CLOCK,
    NOTE,
    Clock,
    choosing_cells,
    choosing_seeds,
    num_rounds,
    reported_cells,
    write_note,
)
from proxstep.lab.plan import PLAN, Cell, Plan
from proxstep.runs.checkpoint import checkpoints
from proxstep.runs.children import die_with_parent
from proxstep.runs.console import cell
from proxstep.runs.folder import RunFolder
from proxstep.runs.lock import is_locked
from proxstep.runs.reading import is_evaluation
from proxstep.training.lifecycle import load_run_recipe

_MOST_SHOWN = 20


@dataclass
class Job:
    """One run of the comparison.

    Attributes:
        recipe: Its resolved recipe; the output folder is its own.
        engine: What runs the training.
        process: Its process, once started.
        code: Its exit code, once ended.
    """

    recipe: Recipe
    engine: str = "local"
    process: subprocess.Popen[bytes] | None = None
    code: int | None = field(default=None)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    @property
    def state(self) -> str:
        """Waiting, running, done or failed."""
        if self.code is not None:
            return "done" if self.code == 0 else "failed"
        return "waiting" if self.process is None else "running"

    def last_record(self) -> dict[str, Any]:
        """Return the newest line of the run's metrics, with the score of its last evaluation.

        None stands for a score that is not a number, or that there is none yet.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return {}
        lines = path.read_bytes().split(b"\n")[:-1]
        try:
            records = [json.loads(line) for line in lines]
            scores = [record.get("score") for record in records if is_evaluation(record)]
        except (ValueError, AttributeError):  # damaged; the run itself will say so
            return {}
        return {**records[-1], "score": scores[-1] if scores else None} if records else {}


def make_jobs(cells: Iterable[Cell], output: Path, engine: str = "local") -> list[Job]:
    """Return the jobs of a plan's cells, in their order."""
    return [
        Job(
            cell.variant.recipe.model_copy(
                update={"seed": cell.seed, "output_dir": str(output / cell.name)}
            ),
            engine,
        )
        for cell in cells
    ]


def clear(output: Path) -> None:
    """Delete the plan and the runs that a folder holds, and nothing else."""
    for path in _held(output):
        with RunFolder(path).locked():
            RunFolder(path).clear()
    for name in (PLAN, NOTE, CLOCK):
        (output / name).unlink(missing_ok=True)


def find_done(jobs: Sequence[Job], output: Path) -> None:
    """Find out what is done of a comparison that was stopped.

    Raises:
        ProxstepError: If the folder holds a run of anything else, with the ways out.
    """
    held = _held(output)
    planned = {job.folder: job for job in jobs}
    for path in held:
        if path not in planned or not _is_of(path, planned[path].recipe):
            raise ProxstepError(
                f"output {output} already holds {len(held)} runs, and {path.name} is none of this "
                "comparison: choose another folder, or delete them with --overwrite"
            )
        if RunFolder(path).status() == "finished":
            planned[path].code = 0


def _held(output: Path) -> list[Path]:
    return sorted(path.parent for path in output.glob("*/run.json"))


def _is_of(path: Path, recipe: Recipe) -> bool:
    """Whether a folder holds a run of a recipe, or of one that was stopped before it wrote any."""
    if not (path / "recipe.yaml").exists():
        return True
    held = load_run_recipe(path).model_dump(exclude={"output_dir"})
    return held == with_absolute_paths(recipe).model_dump(exclude={"output_dir"})


def run_plan(
    plan: Plan, output: Path, num_parallel: int, console: Console, budget: float | None
) -> list[Path]:
    """Run what is not done of a plan.

    Args:
        plan: The plan.
        output: Folder of the runs.
        num_parallel: Runs at a time.
        console: Shows how far it is.
        budget: Seconds for a halving over all processes that worked on the plan; None without one.

    Returns:
        The folders of the runs that there are.

    Raises:
        ProxstepError: If the folder holds another run, or a run failed.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, once the runs have stopped.
    """
    if budget is None:
        jobs = make_jobs(plan.cells(), output, plan.engine)
        find_done(jobs, output)
        run_jobs(jobs, num_parallel, console)
        return [job.folder for job in jobs]
    clock = Clock(output, budget)
    number = num_rounds(plan)
    seeds = [*choosing_seeds(number), *range(plan.seeds)]
    known_cells = [Cell(variant, seed) for seed in seeds for variant in plan.variants]
    known = make_jobs(known_cells, output, plan.engine)
    find_done(known, output)
    by_name = {job.folder.name: job for job in known}
    try:
        for done in range(number + 1):
            scores = _scores(known)
            last = done == number
            cells = reported_cells(plan, scores) if last else choosing_cells(plan, done, scores)
            jobs = [by_name[cell.name] for cell in cells]
            console.out(f"{'the reported runs' if last else f'choosing, round {done + 1}'}:")
            allowed = clock.within(1.0 if last else 0.5, partial(_longest, known))
            run_jobs(jobs, num_parallel, console, allowed)
    finally:
        clock.save()
    write_note(output, plan, budget, clock.spent, _scores(known))
    return [job.folder for job in known if job.code == 0]


def _scores(jobs: Sequence[Job]) -> dict[str, float]:
    found = {job.folder.name: job.last_record().get("score") for job in jobs if job.code == 0}
    return {name: nan if score is None else score for name, score in found.items()}


def _longest(jobs: Sequence[Job]) -> float:
    """Return the seconds of the longest run so far."""
    records = (job.last_record() for job in jobs if job.code == 0)
    return max((record.get("elapsed_seconds") or 0.0 for record in records), default=0.0)


def run_jobs(
    jobs: Sequence[Job],
    num_parallel: int,
    console: Console,
    allowed: Callable[[], bool] = lambda: True,
) -> None:
    """Run every job that is not done, showing how far each of them is.

    None is started when `allowed` says no; those that run are waited for. Ctrl-C and SIGTERM ask
    the running ones to stop at their step's end; what they wrote stays.

    Raises:
        ProxstepError: If a run failed, with the last line that it printed; the others are finished
            first.
        KeyboardInterrupt: After Ctrl-C or SIGTERM, once the runs have stopped.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    seen: dict[str, str] = {}
    pace = Pace(jobs)
    if live:
        live.start()
    try:
        while any(job.state == "running" or (job.code is None and allowed()) for job in jobs):
            _advance(jobs, num_parallel, allowed)
            if live:
                live.update(_overview(jobs, pace), refresh=True)
            else:
                _announce(jobs, seen, pace, console)
            time.sleep(0.5)
    except KeyboardInterrupt:
        _stop(jobs)
        raise
    finally:
        if live:
            live.update(_overview(jobs, pace), refresh=True)
            live.stop()
        signal.signal(signal.SIGTERM, before)
    failed = [job for job in jobs if job.code]
    if failed:
        raise ProxstepError(
            "\n".join(f"{job.folder.name} failed: {_reason(job)} (see {job.log})" for job in failed)
        )


def _advance(jobs: Sequence[Job], num_parallel: int, allowed: Callable[[], bool]) -> None:
    for job in jobs:
        if job.process is not None and job.code is None:
            job.code = job.process.poll()
    free = num_parallel - sum(job.state == "running" for job in jobs)
    waiting = (job for job in jobs if job.state == "waiting")
    # A run whose comparison was killed may still be at its last step.
    for job in islice((job for job in waiting if not is_locked(job.folder)), max(free, 0)):
        if allowed():
            job.process = _start(job)


def _start(job: Job) -> subprocess.Popen[bytes]:
    recipe = job.log.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(dump_recipe(job.recipe), encoding="utf-8")
    # begun, perhaps, but with nothing to go on from
    arguments = [str(recipe), "--engine", job.engine, "--overwrite"]
    if checkpoints(job.folder):
        arguments = ["--resume", str(job.folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "proxstep", "train", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )


def _stop(jobs: Sequence[Job]) -> None:
    running = [job.process for job in jobs if job.process is not None and job.code is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        process.wait()


class Pace:
    """How far the jobs are, and how long the rest will take at the pace so far.

    Args:
        jobs: All jobs, before any of them is started.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._begun = time.monotonic()
        self._before = self._steps()

    def _steps(self) -> int:
        return sum(
            job.recipe.steps if job.code == 0 else job.last_record().get("step", 0)
            for job in self._jobs
            if job.state != "waiting" or job.folder.exists()
        )

    def __str__(self) -> str:
        counts = Counter(job.state for job in self._jobs)
        text = f"{counts['done']} of {len(self._jobs)} done"
        if counts["failed"]:
            text += f", {counts['failed']} failed"
        steps = self._steps()
        if (taken := steps - self._before) <= 0:
            return text
        to_do = sum(job.recipe.steps for job in self._jobs if job.state != "failed")
        seconds = max(to_do - steps, 0) * (time.monotonic() - self._begun) / taken
        return f"{text}, {timedelta(seconds=round(seconds))} left" if seconds else text


def _overview(jobs: Sequence[Job], pace: Pace) -> Table:
    table = Table(box=None, pad_edge=False, caption=str(pace), caption_justify="left")
    for heading in ("run", "state"):
        table.add_column(heading)
    for heading in ("step", "reward", "greedy score", "s/step"):
        table.add_column(heading, justify="right")
    at_work = [job for job in jobs if job.state in ("running", "failed")]
    for job in jobs if len(jobs) <= _MOST_SHOWN else at_work[:_MOST_SHOWN]:
        record = job.last_record()
        step = f"{record.get('step', 0)}/{job.recipe.steps}"
        fields = (cell(record, name) for name in ("reward", "score", "seconds_step"))
        table.add_row(job.folder.name, job.state, step, *fields)
    return table


def _announce(jobs: Sequence[Job], seen: dict[str, str], pace: Pace, console: Console) -> None:
    for job in jobs:
        name = job.folder.name
        if job.state not in ("waiting", seen.get(name)):
            seen[name] = job.state
            text = f"{name}: {job.state}"
            if job.code == 0:
                text += f", greedy score {cell(job.last_record(), 'score')}"
            if job.code is not None and job.process:
                text += f" ({pace})"
            console.out(text)


def _reason(job: Job) -> str:
    if job.code is not None and job.code < 0:
        return f"killed by {signal.Signals(-job.code).name}"
    return _last_line(job.log)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"

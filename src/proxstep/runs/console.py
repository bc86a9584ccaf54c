"""What a person sees of a run: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from proxstep.config.recipe import Recipe
from proxstep.runs.waiting import Wait, told

COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "d"),
    "reward": ("reward", ".3f"),
    "score": ("greedy", ".3f"),
    "kl_policy_initial": ("KL(π‖π₀)", ".4f"),
    "kl_initial_policy": ("KL(π₀‖π)", ".4f"),
    "entropy": ("entropy", ".3f"),
    "grad_norm": ("|grad|", ".3g"),
    "completions_mean_length": ("length", ".1f"),
    "seconds_step": ("s/step", ".2f"),
}
"""Field of the metrics: heading and format; π is the policy, π₀ the initial one."""
NUM_SHOWN = 12
_REDRAWS = 4


def advice(recipe: Recipe) -> list[str]:
    """Return a line for each setting of the recipe that has no effect or a surprising one."""
    update, regularizer = recipe.update, recipe.regularizer
    lines = []
    idle = recipe.objective.algorithm.on_policy
    if idle and update.num_updates == 1:
        lines.append(
            f"one update per rollout: every ratio is 1, so {recipe.objective.name} {idle} "
            "(raise update.num_minibatches or update.num_iterations)"
        )
    scaled = ("group-zscore", "batch-normalized", "group-centered-batch-scaled")
    if regularizer.in_reward and recipe.objective.advantage in scaled:
        lines.append(
            f"regularizer.kl_in reward under {recipe.objective.advantage}: where the rewards are "
            "equal the penalty alone is scaled up to a full advantage, whatever its kl_coef (use "
            "group-centered or leave-one-out advantages, or rollout.dynamic_sampling_max_batches)"
        )
    if regularizer.in_loss and regularizer.kl_coef > 0 and regularizer.kl_estimator == "k1":
        lines.append(
            "regularizer.kl_estimator k1 in the loss is noise: its expected gradient is 0 (use "
            "exact or k2, or regularizer.kl_in reward)"
        )
    return lines


def cell(record: Mapping[str, Any], field: str) -> str:
    """Return a field's text, a dash where it was not measured."""
    value = record.get(field)
    return "-" if value is None else format(value, COLUMNS[field][1])


class TerminalProgress:
    """A progress bar over the last evaluated steps and the newest one, redrawn in place.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            console=console,
        )
        self._rows: list[Mapping[str, Any]] = []
        self._waits: list[Wait] = []
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._begun = False

    def note(self, text: str) -> None:
        """Show a line, above the table during the run."""
        self._console.print(text, markup=False)

    @contextmanager
    def wait(
        self, what: str, total: float | None = None, unit: str = "", *, brief: bool = False
    ) -> Iterator[Wait]:
        """Show a wait below everything else while it lasts; of several, the innermost."""
        del brief
        waited = Wait(what, total, unit)
        self._waits.append(waited)
        own = self._live is None
        if own:
            self._start(transient=True)
        try:
            yield waited
        finally:
            self._waits.remove(waited)
            if own:
                self.end()

    def _start(self, *, transient: bool) -> None:
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REDRAWS,
            transient=transient,
        )
        self._live.start()

    def begin(self, recipe: Recipe) -> None:
        """Draw the empty table."""
        self.end()
        for text in advice(recipe):
            self._console.print(text)
        self._task = self._bar.add_task(
            f"{recipe.algorithm} on {recipe.task.name}", total=recipe.steps
        )
        self._begun = True
        self._start(transient=False)

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a step; steps without an evaluation make room for the next."""
        if self._rows and self._rows[-1].get("score") is None:
            self._rows.pop()
        self._rows.append(record)
        self._bar.update(self._task, completed=record["step"])
        if self._live is not None:
            self._live.refresh()

    def end(self) -> None:
        """Leave the last state on the screen."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _render(self) -> Group:
        shown: list[Any] = [self._table(), self._bar] if self._begun else []
        if waits := self._waits[-1:]:
            self._spinner.update(text=Text(f"{waits[0]}", overflow="ellipsis", no_wrap=True))
            shown.append(self._spinner)
        return Group(*shown)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading, _ in COLUMNS.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows[-NUM_SHOWN:]:
            table.add_row(*(cell(row, field) for field in COLUMNS))
        return table


class PlainProgress:
    """One line for each step, for logs and pipes.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._waits: list[Wait] = []
        self._is_recorded = False

    def note(self, text: str) -> None:
        """Write a line."""
        self._console.out(text)

    @contextmanager
    def wait(
        self, what: str, total: float | None = None, unit: str = "", *, brief: bool = False
    ) -> Iterator[Wait]:
        """Write a line now and then while it lasts, of several waits about the innermost."""
        waited = Wait(what, total, unit)
        if brief and self._is_recorded:
            yield waited
            return
        self._waits.append(waited)
        try:
            with told(self._tell) if len(self._waits) == 1 else nullcontext():
                yield waited
        finally:
            self._waits.remove(waited)

    def _tell(self) -> None:
        for waited in self._waits[-1:]:
            self._console.out(str(waited))

    def begin(self, recipe: Recipe) -> None:
        """Say what runs."""
        self._console.out(f"{recipe.algorithm} on {recipe.task.name}, {recipe.steps} steps")
        for text in advice(recipe):
            self._console.out(text)

    def record(self, record: Mapping[str, Any]) -> None:
        """Write one line of what was measured."""
        parts = [
            f"{heading} {cell(record, field)}"
            for field, (heading, _) in COLUMNS.items()
            if record.get(field) is not None
        ]
        self._is_recorded = True
        self._console.out("  ".join(parts))

    def end(self) -> None:
        """Do nothing."""


def make_progress(console: Console) -> TerminalProgress | PlainProgress:
    """Return the live table in a terminal, plain lines otherwise."""
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)

"""What a person sees of a run: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from proxstep.config.recipe import Recipe

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


def advice(recipe: Recipe) -> list[str]:
    """Return what a reader of the run should know of its recipe beforehand, a line for each."""
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
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._status = console.status("")

    def note(self, text: str) -> None:
        """Show what goes on before the run begins, in place; during the run, above the table."""
        if self._live.is_started:
            self._console.print(text, markup=False)
            return
        self._status.start()
        self._status.update(text)

    def begin(self, recipe: Recipe) -> None:
        """Draw the empty table."""
        self._status.stop()
        for text in advice(recipe):
            self._console.print(text)
        self._task = self._bar.add_task(
            f"{recipe.algorithm} on {recipe.task.name}", total=recipe.steps
        )
        self._live.start()

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a step; steps without an evaluation make room for the next."""
        if self._rows and self._rows[-1].get("score") is None:
            self._rows.pop()
        self._rows.append(record)
        self._bar.update(self._task, completed=record["step"])
        self._live.update(Group(self._table(), self._bar), refresh=True)

    def end(self) -> None:
        """Leave the last state on the screen."""
        self._status.stop()
        self._live.stop()

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

    def note(self, text: str) -> None:
        """Write a line."""
        self._console.out(text)

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
        self._console.out("  ".join(parts))

    def end(self) -> None:
        """Nothing is left to do."""


def make_progress(console: Console) -> TerminalProgress | PlainProgress:
    """Return the live table in a terminal, plain lines otherwise."""
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)

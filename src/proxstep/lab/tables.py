"""The tables of a comparison: once as rows of text, then for a terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan

from rich import box
from rich.table import Table
from rich.text import Text

from proxstep.lab.comparison import Comparison, Pair, Setting
from proxstep.lab.statistics import MOST_SEEDS, Estimate
from proxstep.lab.verdict import verdict

_ESTIMATES = ("final", "best", "area", "at_kl", "after")
_AGAINST = ("final", "better", "area", "at_kl", "after", "kl_saved")
_NOTE = (
    "Interquartile means over seeds with 95 % bootstrap intervals, widened for few seeds. Area: "
    "mean score over the steps. Best: of each run's evaluations, chosen by its own score."
)


@dataclass(frozen=True)
class TextTable:
    """A table as text.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Cells.
        caption: What must be known to read it.
        narrow: Number of leading columns that fit a terminal of 100 columns.
        of_wide: What must be known to read the columns after these.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str
    narrow: int
    of_wide: str = ""

    @property
    def whole_caption(self) -> str:
        """What must be known to read all columns."""
        return f"{self.caption} {self.of_wide}".strip()


def text_tables(comparison: Comparison) -> list[TextTable]:
    """Return the scores and, of two algorithms and more, the pairs of the first setting."""
    tables = [_scores(comparison)]
    if comparison.settings[0].pairs:
        tables.append(_pairs(comparison.settings[0]))
    return tables


def terminal_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield the tables for a terminal of 100 columns."""
    for found in text_tables(comparison):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
        table.title, table.title_justify = Text(found.title, style="bold"), "left"
        table.caption = Text(found.caption)
        for number, column in enumerate(found.columns[: found.narrow]):
            table.add_column(
                Text(column),
                justify="right" if number else "left",
                overflow="fold",
                vertical="bottom",
            )
        for row in found.rows:
            table.add_row(*map(Text, row[: found.narrow]))
        yield table


def markdown(comparison: Comparison) -> str:
    """Return verdict and tables as Markdown."""
    parts = [verdict(comparison)]
    for table in text_tables(comparison):
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        body = "\n".join(f"| {' | '.join(map(_as_cell, line))} |" for line in lines)
        parts.append(f"**{table.title}**\n\n{body}\n\n{table.whole_caption}")
    return "\n\n".join(parts) + "\n"


def comma_separated(comparison: Comparison) -> str:
    """Return every figure in a line of its own, with all its digits, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "algorithm", "against", "measure", "seeds", "value", "low", "high"])
    for setting in comparison.settings:
        for row in setting.standings:
            for name in _ESTIMATES:
                key = [setting.name, row.algorithm, "", name, row.seeds]
                writer.writerow([*key, *_numbers(getattr(row, name))])
        for pair in setting.pairs:
            key = [setting.name, pair.first, pair.second]
            for name in _AGAINST:
                writer.writerow([*key, name, pair.seeds, *_numbers(getattr(pair, name))])
            writer.writerow([*key, "seeds_needed", pair.seeds, pair.seeds_needed, "", ""])
    return text.getvalue()


def _numbers(found: Estimate) -> list[str]:
    return ["" if isnan(x) else repr(x) for x in (found.value, found.low, found.high)]


def _as_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _scores(comparison: Comparison) -> TextTable:
    tuned = bool(comparison.tuned)
    rows = [
        [
            row.algorithm,
            *([setting.name] if tuned else []),
            str(row.seeds),
            *(getattr(row, name).text() for name in _ESTIMATES),
        ]
        for setting in comparison.settings
        for row in setting.standings
    ]
    first = comparison.settings[0]
    columns = ["algorithm", *(["at"] if tuned else []), "seeds", "final", "best", "area"]
    caption = f"{_votes(comparison)} {_NOTE}" if tuned else _NOTE
    own = " Where values are equal it is the KL and time of those runs."
    return TextTable(
        "Scores",
        [*columns, "at equal KL", "at equal time"],
        rows,
        caption,
        narrow=len(columns),
        of_wide=_budgets(first) + (own if tuned else ""),
    )


def _votes(comparison: Comparison) -> str:
    """Say at which values each algorithm is reported."""
    if comparison.halving:
        return " ".join(comparison.halving)
    told = []
    for algorithm, chosen in comparison.chosen.items():
        votes = [f"{value} in {number}" for value, number in chosen.votes.items()]
        told.append(f"{algorithm}: {', '.join(votes)}")
    return (
        "The best of the grid is chosen for each seed by the mean final score of the others: "
        f"{'; '.join(told)}."
    )


def _budgets(setting: Setting) -> str:
    told = []
    if not isnan(setting.kl):
        told.append(
            f"At equal KL: when KL(policy || initial) first reached {setting.kl:.4g} nats per "
            "token, the most that every run spent."
        )
    if not isnan(setting.seconds):
        told.append(f"At equal time: after {setting.seconds:.1f} s.")
    return " ".join(told)


def _pairs(setting: Setting) -> TextTable:
    rows = [
        [
            f"{pair.first} - {pair.second}",
            pair.final.text("+"),
            pair.better.text(),
            _needed(pair),
            pair.kl_saved.percent(),
            pair.area.text("+"),
            pair.at_kl.text("+"),
            pair.after.text("+"),
        ]
        for pair in setting.pairs
    ]
    columns = [
        "pair",
        "final",
        "P(first is higher)",
        "seeds needed",
        "less KL at equal score",
        "area",
        "at equal KL",
        "at equal time",
    ]
    title = "Differences" + (f", each algorithm at its {setting.name}" if setting.name else "")
    caption = (
        "Intervals are for one pair at a time; the verdict takes all pairs into account. From "
        "four seeds on, where both have the same ones, runs of one seed are compared, which share "
        "prompts and luck (not in P). Seeds needed: of each algorithm, to tell a final difference "
        "as large as this one in four of five comparisons; a rough figure, as it rests on the "
        "seeds that there are."
    )
    return TextTable(title, columns, rows, caption, narrow=5)


def _needed(pair: Pair) -> str:
    if pair.seeds < 2:
        return "\N{EN DASH}"
    return f"{MOST_SEEDS}+" if pair.seeds_needed >= MOST_SEEDS else str(pair.seeds_needed)

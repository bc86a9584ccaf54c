"""Write the reference pages of docs/ from the code, so that the two cannot disagree."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from proxstep.algorithms import ALGORITHMS, Algorithm
from proxstep.config.explain import describe_keys
from proxstep.runs.schema import FIELDS, PREFIXES

DOCS = Path(__file__).parents[1] / "docs"


def recipe_page() -> str:
    """Return the page of a recipe's keys."""
    lines = [
        "# Keys of a recipe",
        "",
        "Made by `make reference` from the sections and the declarations; `proxstep train --keys`",
        "prints it.",
        "",
        "Two more keys stand for others: `algorithm` for `objective.name` and `geometry.rule`, and",
        "`per_algorithm`, a mapping from algorithms to parts of a recipe that hold for them alone.",
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    for key, kind, default, text in describe_keys():
        cells = [f"`{key}`", kind, f"`{default}`", text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Return the page of the metrics."""
    lines = [
        "# Fields of metrics.jsonl",
        "",
        "Made by `make reference` from `proxstep/runs/schema.py`. One JSON object a line, one line",
        "a step; every field is in every line, null where it was not measured. The file only",
        "grows, except that resuming a run drops the steps after its checkpoint and does them",
        "again.",
        "",
        "| field | |",
        "|---|---|",
        *(f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in FIELDS.items()),
        "",
        "Fields whose names depend on the run:",
        "",
        "| prefix | |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in PREFIXES.items()),
    ]
    return "\n".join(lines) + "\n"


def algorithms_page() -> str:
    """Return docs/algorithms.md with its table made anew from the declarations."""
    rows = [_row(algorithm) for algorithm in ALGORITHMS.values()]
    head = [
        "| name | level | what it is | loss | keys | advantage, aggregation |",
        "|" + "---|" * 6,
    ]
    text = (DOCS / "algorithms.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n".join(["", *head, *rows, ""]) + END + rest.split(END)[1]


BEGIN, END = "<!-- from the declarations: make reference -->", "<!-- end of the declarations -->"


def _row(algorithm: Algorithm) -> str:
    keys = ", ".join(f"`{key}` {value}" for key, value in algorithm.defaults.items()) or "none"
    cells = (
        f"`{algorithm.name}`",
        algorithm.level,
        algorithm.about,
        _formula(algorithm),
        keys,
        f"{algorithm.advantage}, {algorithm.default_loss_agg_mode}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _formula(algorithm: Algorithm) -> str:
    """Return the first formula of the loss's docstring: its lines from "L = " on."""
    doc = inspect.getdoc(getattr(algorithm.loss, "func", algorithm.loss)) or ""
    lines = re.search(r"^L = .*(?:\n\S.*)*", doc, re.MULTILINE)
    return "<br>".join(f"`{line}`" for line in lines.group().split("\n")) if lines else ""


PAGES = {
    "recipe.md": recipe_page,
    "metrics.md": metrics_page,
    "algorithms.md": algorithms_page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

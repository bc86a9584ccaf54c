"""Write the reference pages of docs/ from the code, so that the two cannot disagree."""

from __future__ import annotations

from pathlib import Path

from proxstep.config.explain import describe_keys
from proxstep.runs.schema import FIELDS, PREFIXES

DOCS = Path(__file__).parents[1] / "docs"


def recipe_page() -> str:
    """Return the page of a recipe's keys."""
    lines = [
        "# Keys of a recipe",
        "",
        "Made by `make reference` from `proxstep/config/sections.py`; `proxstep train --keys`",
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
        "grows, but resuming a run drops the steps after its checkpoint and does them again.",
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


PAGES = {"recipe.md": recipe_page, "metrics.md": metrics_page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

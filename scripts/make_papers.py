"""Write docs/papers.md: the two papers, item by item, with code, checks and what became of it."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts.paper_items import ISOPO, OPO, Item  # noqa: E402
from tests.theory.registry import CORRECTED, FALSE, PRINTED, Statement  # noqa: E402
from tests.theory.statements import STATEMENTS  # noqa: E402

PAGE = ROOT / "docs" / "papers.md"
PAPERS = (
    ("ISOPO", "arXiv 2512.23353", "theory.md#isopo-arxiv-251223353", ISOPO),
    ("OPO", "arXiv 2601.12415", "theory.md#opo-arxiv-260112415", OPO),
)
HOLDS = {
    PRINTED: "exact",
    CORRECTED: "exact, with a correction",
    FALSE: "does not hold as printed; what does is exact",
}
INTRODUCTION = """\
# The papers, item by item

Made by `make reference` from `scripts/paper_items.py` and `tests/theory`. Everything that is
numbered or named in the two papers, in their order: where it is computed, what checks it, and its
status.

- **exact**: computed, and checked on random instances by `test_statement` in
  [`tests/theory/test_statements.py`](../tests/theory/test_statements.py). Corrections are
  remarks in [theory](theory.md).
- **reproduced in small**, **not reproduced in small**: an experiment of a size for a CPU did or
  did not show it.
- **not run yet**: it takes a GPU. The recipe with the paper's settings is named.

Functions of `maths` are exact mathematics of small categorical policies, in `tests/theory/maths`;
the others are the library's own. Experiments are logged in [the log](../experiments/LOG.md).
"""


def papers_page() -> str:
    """Return the page."""
    by_number = {(s.paper, s.number): s for s in STATEMENTS}
    lines = [INTRODUCTION]
    for paper, source, theory, items in PAPERS:
        lines += [
            f"## {paper} ({source})",
            "",
            f"Remarks on each statement: [theory]({theory}).",
            "",
        ]
        lines += ["| item | what it says | code | checked by | status |", "|---|---|---|---|---|"]
        lines += [_row(item, by_number.get((paper, item.number))) for item in items]
        lines.append("")
    return "\n".join(lines)


def _row(item: Item, statement: Statement | None) -> str:
    says, status, checks = item.says, item.status, [_check(check) for check in item.checks]
    if statement is not None:
        says = statement.says
        status = "; ".join(filter(None, [HOLDS[statement.holds], item.status]))
        checks.insert(0, f"`{statement.test_id}`")
    code = [_function(name) for name in item.code]
    cells = [item.number, _escaped(says), "<br>".join(code), "<br>".join(checks), _escaped(status)]
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


def resolved(name: str) -> object:
    """Return what a dotted name stands for, below proxstep or below tests.theory."""
    package = "tests.theory" if name.startswith("maths.") else "proxstep"
    return pkgutil.resolve_name(f"{package}.{name}")


def _function(name: str) -> str:
    place = ROOT / ("tests/theory" if name.startswith("maths.") else "src/proxstep")
    parts = name.split(".")
    files = (place.joinpath(*parts[:n]).with_suffix(".py") for n in range(len(parts), 0, -1))
    path = next(file for file in files if file.exists())
    return f"[`{name}`](../{path.relative_to(ROOT)})"


def _check(check: str) -> str:
    path, _, name = check.partition("::")
    target = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
    return f"[`{name or path}`]({target})"


def main() -> None:
    """Write the page."""
    PAGE.write_text(papers_page(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A comparison as one page to share: everything inline, nothing that asks a network."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from proxstep.config.yamlfile import dump_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.audit import audit
from proxstep.lab.comparison import compare_runs
from proxstep.lab.panels import band_note, drawn_runs, panel_groups
from proxstep.lab.samples import first_samples
from proxstep.lab.strokes import COLORS, COLORS_ON_DARK, strokes
from proxstep.lab.summary import COLUMNS, summarize
from proxstep.lab.svg import MOST_POINTS, color, panel_svg
from proxstep.lab.tables import text_tables
from proxstep.lab.verdict import verdict
from proxstep.runs.reading import (
    MISSING,
    Run,
    as_text,
    by_algorithm,
    flatten,
    shorten,
)

_HERE = Path(__file__).parent
_TEMPLATE = "report.html.jinja"


def write_report(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the comparison as one self-contained HTML page, replacing an earlier one at once.

    Raises:
        ProxstepError: There are no runs, or the path is a folder.
    """
    path = Path(path)
    if not runs:
        raise ProxstepError(f"{path}: no runs to report; train some first.")
    if path.is_dir():
        raise ProxstepError(f"{path}: is a folder; name the page, such as {path / 'report.html'}.")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE).render(_page_content(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(page.encode("utf-8", "replace"))  # a completion may hold lone surrogates
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _page_content(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that the template shows, as text except for the charts."""
    everyone, comparison = runs, compare_runs(runs)
    runs = comparison.runs
    groups = by_algorithm(runs)
    looks = strokes(groups)
    # A policy that names the script by its hash lets no other one run, whatever a completion holds.
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    return {
        "verdict": verdict(comparison),
        "tables": text_tables(comparison),
        "everyone": everyone,
        "algorithms": list(groups),
        "facts": _facts(runs),
        "columns": COLUMNS,
        "results": [[column.cell(row) for column in COLUMNS] for row in summarize(runs)],
        "looks": looks,
        "color": color,
        "palettes": {"light": COLORS, "dark": COLORS_ON_DARK},
        "style": Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
        "panel_groups": panel_groups(comparison),
        "panel_svg": panel_svg,
        "band_note": band_note(runs),
        "most_points": MOST_POINTS,
        "drawn": list(by_algorithm(drawn_runs(comparison))),
        "notes": comparison.notes,
        "differences": _differences(groups),
        "audit": audit(runs),
        "samples": {name: first_samples(members) for name, members in groups.items()},
        "recipes": {name: dump_yaml(members[0].recipe) for name, members in groups.items()},
        "provenance": [_provenance(run) for run in everyone],
        "runs": runs,
        "missing": MISSING,
    }


def _differences(groups: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """Return the keys in which the algorithms' recipes differ, each with the value of every one."""
    settings = [
        [{key: shorten(as_text(value)) for key, value in flatten(run.recipe)} for run in runs]
        for runs in groups.values()
    ]
    keys = dict.fromkeys(key for runs in settings for one in runs for key in one)
    rows = [
        [key, *(" | ".join(sorted({one.get(key, MISSING) for one in runs})) for runs in settings)]
        for key in keys
        if key not in ("algorithm", "seed", "output_dir")
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


def _provenance(run: Run) -> list[str]:
    keys = ("started", "machine", "proxstep_version", "torch_version", "transformers_version")
    status, *rest = (str(run.info.get(key) or MISSING) for key in ("status", *keys))
    last = str(run.records[-1]["step"])
    return [run.algorithm, str(run.seed), status, last, *rest, str(run.path)]


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """Return what the page says of all runs at once, distinct values side by side."""
    return {
        "model": _distinct(_nested(run.recipe, "model", "name") for run in runs),
        "task": _distinct(_nested(run.recipe, "task", "name") for run in runs),
        "steps": _distinct(run.recipe.get("steps") for run in runs),
        "num_parameters": _distinct(_with_commas(run.info.get("num_parameters")) for run in runs),
        "machine": _distinct(run.info.get("machine") for run in runs),
        "started": _distinct(_day(run.info.get("started")) for run in runs),
    }


def _nested(tree: dict[str, Any], section: str, key: str) -> Any:
    inner = tree.get(section)
    return inner.get(key) if isinstance(inner, dict) else inner


def _with_commas(number: Any) -> str | None:
    return f"{number:,}" if isinstance(number, int) else None


def _day(moment: Any) -> str | None:
    """Return the date of an ISO moment."""
    return moment[:10] if isinstance(moment, str) else None


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(MISSING if value is None else str(value) for value in values))

"""mkdocs.yml: every page has one place in the navigation, and nothing comes from another server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def entries(nav: Any) -> Iterator[str]:
    """The pages of the navigation; a folder stands for those in it."""
    if isinstance(nav, list):
        for item in nav:
            yield from entries(item)
    elif isinstance(nav, dict):
        yield from entries(list(nav.values()))
    elif nav.endswith("/"):
        yield from (page.relative_to(DOCS).as_posix() for page in sorted((DOCS / nav).glob("*.md")))
    else:
        yield nav


def pages() -> set[str]:
    return {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_every_page_has_one_place() -> None:
    counted = Counter(entries(CONFIG["nav"]))
    assert [entry for entry, times in counted.items() if times > 1] == []
    assert pages() - set(counted) == set(), "put it into the nav of mkdocs.yml"


def test_every_entry_is_there() -> None:
    for entry in entries(CONFIG["nav"]):
        own = entry.removeprefix("repository/")
        assert (DOCS / entry).exists() or (own != entry and (ROOT / own).exists()), entry


def test_a_page_in_no_section_is_found() -> None:
    assert "kl-budget.md" in set(entries(CONFIG["nav"]))
    assert "kl-budget.md" not in set(entries(CONFIG["nav"][:1]))


def test_a_build_stops_at_a_warning_and_links_are_looked_at() -> None:
    assert CONFIG["strict"] is True
    assert set(CONFIG["validation"]["links"].values()) == {"warn"}
    assert CONFIG["validation"]["nav"]["omitted_files"] == "warn"


def test_nothing_is_fetched_by_the_reader() -> None:
    assert CONFIG["theme"]["highlightjs"] is False  # the theme's comes from a CDN
    for path in (ROOT / "scripts" / "site").iterdir():
        assert path.is_dir() or "://" not in path.read_text().replace('"://" not in', "")

"""The how-to guides show what the examples hold, and parts of recipes that are recipes."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from tests.house.test_docs import ROOT, blocks, name_of

from proxstep.config.loading import resolve
from proxstep.config.yamlfile import parse_yaml

GUIDES = sorted((ROOT / "docs" / "howto").glob("*.md"))
EXAMPLES = [path.read_text() for path in sorted((ROOT / "examples").glob("my_reward*"))]
EXAMPLES += [path.read_text() for path in sorted((ROOT / "examples").glob("*.*y"))]
EXAMPLES += [path.read_text() for path in sorted((ROOT / "examples").glob("*.sh"))]


def unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_what_is_shown_of_an_example_is_its_text(page: Path) -> None:
    """Python that is not whole, rows of a table, lines of a shell script."""
    shown = [*blocks(page, "py"), *blocks(page, "json")]
    shown += [text for text in blocks(page, "text") if text.startswith("  ")]
    for text in shown:
        assert any(unindented(text) in unindented(example) for example in EXAMPLES), text


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_parts_of_recipes_resolve(page: Path) -> None:
    for text in blocks(page, "yaml"):
        part = parse_yaml(dedent(text), page.name)
        resolve({"algorithm": "isopo", **part}, {}, page.name)


def test_the_recipe_of_the_reward_is_the_example_s() -> None:
    (text,) = blocks(ROOT / "docs" / "howto" / "task-and-reward.md", "yaml")
    assert text in (ROOT / "examples" / "my_reward.yaml").read_text()


def test_every_guide_leads_further() -> None:
    """A guide is a path; what it does not say stands in a page of the reference."""
    for page in GUIDES:
        assert "](../" in page.read_text(), page

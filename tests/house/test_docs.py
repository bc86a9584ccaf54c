"""The documentation says what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from experiments.objectives import markdown_of
from tests.isopo.test_install import IDS, TOKENS
from tests.models import tiny_qwen3

from proxstep.cli import arguments as cli
from proxstep.config.names import KEYS_FILE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page by its place in the repository: two folders may have a trl.md."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "tutorial.md"], ids=name_of)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/ with a model and a batch at hand, the README's with nothing.

    The tutorial's are in test_tutorial.py.
    """
    monkeypatch.chdir(tmp_path)
    if page.name == "README.md":
        return exec("\n".join(blocks(page, "python")), {})
    for code in blocks(page, "python"):
        model = tiny_qwen3()
        before = [p.detach().clone() for p in model.parameters()]
        advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
        names = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "input_ids": TOKENS,
            "attention_mask": (IDS >= 0).long(),
            "completion_mask": (IDS >= 0) & (torch.arange(5) >= 2),
            "advantages": advantages,
            "coefficients": advantages / 2,
        }
        exec(code, names)
        grads = [p.grad for p in names["model"].parameters()]
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved or all(g is not None for g in grads)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    """Every proxstep command of a shell block is one that the parser takes."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["proxstep"]:
                own, _ = cli.split_keys(words[1:])
                cli.make_parser().parse_args(own)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_reference_pages_are_current() -> None:
    path = ROOT / "scripts" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = dict(module.reference())
    for name, text in pages.items():
        assert (ROOT / "docs" / name).read_text() == text, f"run make reference: {name}"
    made = {
        f"{folder}/{path.name}"
        for folder in ("algorithms", "figures/algorithms")
        for path in (ROOT / "docs" / folder).iterdir()
    }
    assert made <= set(pages), "pages of algorithms that are no more"
    assert KEYS_FILE.read_text() == module.keys_file(), "run make reference: keys.json"


def test_recipes_that_are_named_exist() -> None:
    texts = [page.read_text() for page in PAGES] + list(cli.EXAMPLES.values())
    named = {name for text in texts for name in re.findall(r"recipes/[\w-]+\.yaml", text)}
    assert len(named) > 1
    for name in named:
        assert (ROOT / name).exists(), name


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets


def test_the_table_of_objectives_is_of_the_committed_rows() -> None:
    report = json.loads((ROOT / "experiments" / "objectives" / "rows.json").read_text())
    rows = report["rows"]
    assert len(rows) == 5 * len(report["variants"])
    assert markdown_of(rows) in (ROOT / "docs" / "algorithms.md").read_text()

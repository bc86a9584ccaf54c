"""What is released is what is meant: versions, extras, changelog, and what looks at them."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import proxstep

ROOT = Path(__file__).parents[2]
DIST = runpy.run_path(str(ROOT / "scripts" / "check_dist.py"))
INSTALL = runpy.run_path(str(ROOT / "scripts" / "check_install.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
TRACKED = {"src/proxstep/__init__.py", "src/proxstep/py.typed", "recipes/a.yaml", "tests/b.py"}


def rows(title: str) -> list[list[str]]:
    """The cells of the page's table whose first column has that title."""
    (table,) = re.findall(rf"^\| {title} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_there_is_one_version() -> None:
    text = (ROOT / "src" / "proxstep" / "__init__.py").read_text(encoding="utf-8")
    assert DIST["version_of"](text) == proxstep.__version__
    assert "version" in PROJECT["dynamic"]
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_page_names_every_extra() -> None:
    assert {name.strip("`") for name, _ in rows("extra")} == {"none", *EXTRAS}


def test_every_extra_is_tried_or_said_not_to_be() -> None:
    assert set(INSTALL["TRIALS"]) == {"none", *EXTRAS} - {"dev", "verl", "vllm"}


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        ("torch", PROJECT["dependencies"][0]),
        ("transformers", EXTRAS["train"][0]),
        ("TRL", EXTRAS["trl"][1]),
        ("verl", EXTRAS["verl"][1]),
    ],
)
def test_the_lower_bounds_are_the_oldest_tested(package: str, asked: str) -> None:
    (oldest,) = [row[1] for row in rows("package") if row[0] == package]
    found = re.match(rf"{package.lower()}>=([\d.]+)", asked)
    assert found is not None
    assert (oldest + ".0").startswith(found[1] + ".")


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    dated = r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}"
    assert all(re.fullmatch(dated, release) for release in releases[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_the_release_workflow_publishes_what_make_dist_built() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert any("make dist" in step.get("run", "") for step in jobs["build"]["steps"])
    assert "permissions" not in jobs["build"]
    publish = jobs["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert "${{" not in "".join(step.get("run", "") for step in jobs["build"]["steps"])
    assert "secrets." not in text


def test_a_wheel_with_too_much_or_too_little_is_named() -> None:
    wanted = DIST["expected_in_wheel"](TRACKED, "1.0.0")
    assert "proxstep/recipes/a.yaml" in wanted
    assert not [name for name in wanted if "tests" in name]
    found = (wanted - {"proxstep/py.typed"}) | {"tests/b.py"}
    assert DIST["differences"]("the wheel", found, wanted) == [
        "the wheel lacks proxstep/py.typed",
        "the wheel should not hold tests/b.py",
    ]
    assert DIST["unequal"]({"a": b"1"}, {"a": b"2"})


def test_a_tag_needs_its_version_and_its_section() -> None:
    check = DIST["unreleasable"]
    assert check("v1.2.0", "1.2.0", "## [1.2.0] - 2026-12-01\n") == []
    assert len(check("v1.2.1", "1.2.0", "## [Unreleased]\n")) == 2


@pytest.mark.parametrize(
    ("status", "output", "error", "words"),
    [
        (0, "ready", "", ""),
        (1, "ready", "", "status 1"),
        (0, "", "", "does not say ready"),
        (0, "ready", "UserWarning", "error stream"),
    ],
)
def test_a_failed_trial_is_told(status: int, output: str, error: str, words: str) -> None:
    done = subprocess.CompletedProcess(["x"], status, output, error)
    trial: Any = INSTALL["Trial"](("x",), ("ready",))
    why = INSTALL["failure"](trial, done)
    assert why.startswith(words) if not words else words in why
    assert bool(why) == bool(words)

"""What is printed works: a line of a page follows from those before it, and the quick ones run."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from tests.house.test_docs import PAGES, ROOT, blocks, name_of

from proxstep.algorithms import ALGORITHMS
from proxstep.cli import arguments as cli
from proxstep.cli import commands
from proxstep.config.loading import load_recipe
from proxstep.config.reading import recipe_names

Overrides = list[tuple[str, str]]
SMALL = [
    "--steps=10",
    "--device=cpu",
    "--model.warmup_score=0",
    "--task.num_validation=4",
    "--rollout.num_prompts=2",
    "--rollout.num_generations=2",
    "--evaluation.num_probe_prompts=2",
]


def lines_of(text: str) -> list[list[str]]:
    """The words of each line, up to a remark or a redirection."""
    calls = re.findall(r"^ *((?:proxstep|\S*python) .*)", text.replace("\\\n", " "), re.MULTILINE)
    lines = (shlex.split(call, comments=True) for call in calls)
    return [list(takewhile(lambda word: not word.startswith(">"), words)) for words in lines]


def printed(page: Path, program: str) -> list[list[str]]:
    """The words of each line of the page's shell blocks that calls a program, in order."""
    lines = [line for block in blocks(page, "bash") for line in lines_of(block)]
    return [line for line in lines if line[:1] == [program]]


def parsed(words: list[str]) -> tuple[Namespace, Overrides]:
    own, overrides = cli.split_keys(words[1:])
    return cli.make_parser().parse_args(own), overrides


class Page:
    """What the lines of a page have made so far."""

    def __init__(self, page: Path) -> None:
        self.text = page.read_text()
        self.made: set[str] = set()
        self.measured: set[str] = set()
        self.steps: dict[str, int] = {}

    def is_there(self, name: str) -> bool:
        """Whether a line before this one made it, in the folder or above it."""
        return any(str(part) in self.made for part in (Path(name), *Path(name).parents))

    def check(self, arguments: Namespace, overrides: Overrides) -> None:
        getattr(self, f"_{arguments.command}", lambda *_: None)(arguments, overrides)

    def _recipe_file(self, name: str) -> bool:
        """Whether it is ours; the page must show any other file."""
        assert name in recipe_names() or f"`{name}`" in self.text, f"no recipe {name}"
        return name in recipe_names()

    def _train(self, arguments: Namespace, overrides: Overrides) -> None:
        if arguments.resume:
            assert arguments.resume in self.made
            assert int(dict(overrides)["steps"]) > self.steps[arguments.resume]
            return
        if not self._recipe_file(arguments.recipe):
            named = re.search(r"^output_dir: (\S+)", self.text, re.MULTILINE)
            assert named is not None
            self.made.add(named.group(1))
            return
        recipe = load_recipe(arguments.recipe, overrides)
        if not (arguments.dry_run or arguments.print_command):
            self.made.add(recipe.output_dir)
            self.steps[recipe.output_dir] = recipe.steps
            if recipe.geometry.diagnose_every:
                self.measured.add(recipe.output_dir)

    def _eval(self, arguments: Namespace, overrides: Overrides) -> None:
        del overrides
        assert self.is_there(arguments.target) or self._recipe_file(arguments.target)

    def _compare(self, arguments: Namespace, overrides: Overrides) -> None:
        self.made.add(str(arguments.output))
        if not self._recipe_file(arguments.recipe):
            return
        for name in arguments.algorithms.split(","):
            load_recipe(arguments.recipe, [*overrides, ("algorithm", name)])

    def _report(self, arguments: Namespace, overrides: Overrides) -> None:
        del overrides
        assert all(self.is_there(run) for run in arguments.runs)

    def _diagnose(self, arguments: Namespace, overrides: Overrides) -> None:
        del overrides
        assert arguments.run_folder in self.measured


@pytest.fixture(autouse=True)
def same_algorithms() -> Iterator[None]:
    """Forget what a line's external_lib has registered."""
    algorithms, modules = dict(ALGORITHMS), set(sys.modules)
    yield
    for registry, before in ((ALGORITHMS, algorithms), (sys.modules, modules)):
        for name in [name for name in registry if name not in before]:
            if registry is ALGORITHMS or name.startswith("proxstep_user_"):
                del registry[name]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_line_needs_what_lines_before_it_make(page: Path) -> None:
    so_far = Page(page)
    for words in printed(page, "proxstep"):
        so_far.check(*parsed(words))


def test_the_check_refuses_what_would_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for line in ("diagnose runs/arithmetic", "train --resume runs/arithmetic --steps 30"):
        page.write_text(f"```bash\nproxstep train arithmetic\nproxstep {line}\n```\n")
        with pytest.raises(AssertionError):
            test_a_line_needs_what_lines_before_it_make(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_are_there_with_their_options(page: Path) -> None:
    for words in [*printed(page, "python"), *printed(page, ".venv/bin/python")]:
        if words[1] != "-m":
            text = (ROOT / words[1]).read_text()
            options = [word.partition("=")[0] for word in words if word.startswith("--")]
            assert all(f'"{option}"' in text for option in options), words


@pytest.mark.parametrize("name", cli.EXAMPLES)
def test_examples_of_the_help_parse(name: str) -> None:
    lines = [line for line in lines_of(cli.EXAMPLES[name]) if line[:1] == ["proxstep"]]
    assert lines
    for words in lines:
        arguments, overrides = parsed(words)
        if getattr(arguments, "recipe", None):
            load_recipe(arguments.recipe, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/diagnostics.md", "docs/trl.md"])
def test_quick_lines_run_in_their_order(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With few completions and problems; what needs another model or verl is left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / "cache"))
    ran = 0
    for words in printed(ROOT / page, "proxstep"):
        more: list[str] = []
        if re.search("verl|gsm8k|smollm2", " ".join(words)):
            continue
        if words[1] in ("train", "compare") and "--resume" not in words:
            more = SMALL if words[1] == "train" else [*SMALL, "--seeds=1", "--jobs=1"]
        assert commands.main([*words[1:], *more]) == 0, (words, capsys.readouterr().err)
        ran += 1
    assert ran > 1

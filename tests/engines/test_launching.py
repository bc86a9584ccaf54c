"""Which engine `proxstep train` runs: by --engine, by what began the run, or none that is there."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.command_case import TINY, mistake, run
from tests.selection import slow

from proxstep.cli import commands as cli
from proxstep.config.recipe import Recipe
from proxstep.runs.folder import RunFolder

Calls = list[tuple[Any, ...]]
ARITHMETIC = Path(__file__).parents[2] / "recipes" / "arithmetic.yaml"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """An engine of each name, which notes what it was asked for; work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    found: Calls = []

    def made(name: str) -> types.ModuleType:
        def train(recipe: Recipe, progress: Any, *, overwrite: bool) -> str:
            found.append((name, "train", recipe.steps, overwrite))
            return "finished"

        def resume(folder: str, progress: Any) -> str:
            found.append((name, "resume", folder))
            return "interrupted"

        module = types.ModuleType(f"tests.engine_{name}")
        vars(module).update(train=train, resume=resume)
        if name != "local":
            vars(module)["command"] = lambda recipe: f"{name} for {recipe.steps} steps\n"
        return module

    for name in cli.ENGINES:
        module = made(name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.ENGINES, name, module.__name__)
    return found


@pytest.mark.parametrize("engine", cli.ENGINES)
def test_the_engine_that_is_named_trains(
    capsys: pytest.CaptureFixture[str], calls: Calls, engine: str
) -> None:
    assert run(capsys, "train", "tiny.yaml", "--engine", engine, "--steps=7") == "done: run\n"
    run(capsys, "train", "--overwrite", "tiny.yaml", f"--engine={engine}")
    assert calls == [(engine, "train", 7, False), (engine, "train", 2, True)]


def test_without_a_name_it_is_the_local_one(
    capsys: pytest.CaptureFixture[str], calls: Calls
) -> None:
    run(capsys, "train", "tiny.yaml")
    assert calls == [("local", "train", 2, False)]


@pytest.mark.parametrize("engine", [None, *cli.ENGINES])
def test_a_run_is_resumed_by_the_engine_that_began_it(
    capsys: pytest.CaptureFixture[str], calls: Calls, engine: str | None
) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(Path("tiny.yaml").read_text())
    RunFolder("run").update_info(status="running", **({"engine": engine} if engine else {}))
    assert cli.main(["train", "--resume", "run"]) == 130
    assert "proxstep train --resume run" in capsys.readouterr().out
    assert calls == [(engine or "local", "resume", "run")]


def test_a_run_of_an_unknown_engine(capsys: pytest.CaptureFixture[str], calls: Calls) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps({"engine": "abacus"}))
    message = mistake(capsys, "train", "--resume", "run")
    assert message.startswith("run: its run.json says engine 'abacus', which is none of local, trl")
    assert calls == []


@pytest.mark.parametrize("option", [["--engine", "local"], ["--engine=trl"], ["--print-command"]])
def test_resuming_takes_no_engine(
    capsys: pytest.CaptureFixture[str], calls: Calls, option: list[str]
) -> None:
    Path("run").mkdir()
    assert "give nothing else" in mistake(capsys, "train", "--resume", "run", *option)
    assert calls == []


@pytest.mark.parametrize("engine", ["trl", "verl"])
def test_a_command_is_printed_and_nothing_runs(
    capsys: pytest.CaptureFixture[str], calls: Calls, engine: str
) -> None:
    words = ["train", "tiny.yaml", "--engine", engine, "--steps", "9"]
    assert run(capsys, *words, "--print-command") == f"{engine} for 9 steps\n"
    assert yaml.safe_load(run(capsys, *words, "--dry-run"))["steps"] == 9
    assert calls == []


@pytest.mark.parametrize("option", [[], ["--engine", "local"]])
def test_the_local_engine_has_no_command(
    capsys: pytest.CaptureFixture[str], calls: Calls, option: list[str]
) -> None:
    message = mistake(capsys, "train", "tiny.yaml", "--print-command", *option)
    assert message.endswith("add --engine trl or --engine verl")
    assert calls == []


@pytest.mark.parametrize("engine", ["trl", *slow("verl")])
def test_a_missing_extra_is_one_message(tmp_path: Path, engine: str) -> None:
    code = (
        "import importlib.metadata as metadata, sys\n"
        "found = metadata.version\n"
        "def version(name):\n"
        f"    if name == {engine!r}: raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
        "from proxstep.cli.commands import main\n"
        f"sys.exit(main(['train', {str(ARITHMETIC)!r}, '--engine', {engine!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    assert "is not installed" in message
    assert f'pip install "proxstep[{engine}]"' in message
    assert not list(tmp_path.iterdir())


def test_the_command_line_loads_no_engine() -> None:
    code = (
        "import sys; from proxstep.cli import commands; commands.make_parser(); "
        "heavy = {'trl', 'verl', 'ray', 'transformers', 'datasets', 'accelerate'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

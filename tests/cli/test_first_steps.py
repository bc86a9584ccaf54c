"""The first hour: commands that start at once, recipes by name, eval and resume."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from proxstep.cli import arguments as cli
from proxstep.cli import installed
from proxstep.cli.completion import completion_script
from proxstep.config.loading import load_recipe
from proxstep.config.names import task_names
from proxstep.config.reading import RECIPES, recipe_names
from tests.cli.command_case import mistake, run

ROOT = Path(__file__).parents[2]
QUICK = [
    ["--help"],
    ["--version"],
    ["recipes"],
    ["train", "--keys"],
    ["train", "--help"],
    ["init", "table"],
    ["completion", "bash"],
    ["trian"],
    ["train", "none.yaml"],
    ["train", "arithmetic", "--algorithm", "grop"],
    ["train", "arithmetic", "--stps", "3"],
    ["train", "arithmetic", "--optimizer.name", "adam"],
    ["eval", "arithmetic", "--tsk.name", "gsm8k"],
    ["compare", "arithmetic", "--algorithms", "grpo,opoo"],
    ["compare", "arithmetic", "--algorithms", "grpo,opo", "--objective.mu", "1"],
]


def test_what_needs_no_torch_does_not_import_it() -> None:
    code = """
import sys
from proxstep.cli import main
for words in ARGUMENTS:
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    heavy = sorted({"torch", "transformers", "pydantic"} & set(sys.modules))
    print(words, code, heavy, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code.replace("ARGUMENTS", repr(QUICK))],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == len(QUICK)
    for number, line in enumerate(lines):
        assert line.endswith(f" {0 if number < 7 else 2} []"), line


def test_versions_are_of_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    with pytest.raises(SystemExit):
        cli.make_parser().parse_args(["--version"])
    release = torch.__version__.partition("+")[0]  # no +cu130 in the metadata of PyPI's
    assert f"(torch {release}" in capsys.readouterr().out


def test_recipes_are_listed_and_travel_in_the_wheel(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "recipes")
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(recipe_names()) != set()
    for name in recipe_names():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 4, line
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["force-include"] == {"recipes": "proxstep/recipes"}


@pytest.mark.parametrize("task", task_names())
def test_init_writes_a_recipe_that_is_one(capsys: pytest.CaptureFixture[str], task: str) -> None:
    assert f"wrote {task}.yaml" in run(capsys, "init", task)
    assert load_recipe(f"{task}.yaml").task.name == task
    text = Path(f"{task}.yaml").read_text().splitlines()
    for number, line in enumerate(text):
        if ": " in line and "#" not in line:
            assert "# " in text[number - 1], line
    assert "there already" in mistake(capsys, "init", task)


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["torch>=2.6", "rich>=14; extra == 'train'", "proxstep[train]; extra == 'trl'"]
    asked += ["trl!=1.15.*,<1.17,>=1.14.2; extra == 'trl'", "verl>=0.9; extra == 'verl'"]
    has = {"rich": "14.1", "trl": "1.15.0", "torch": "2.8"}
    monkeypatch.setattr(installed, "requires", lambda name: asked)
    monkeypatch.setattr(installed, "installed", has.get)
    monkeypatch.setattr(installed, "beside_trl", lambda: "")
    printed = run(capsys, "doctor").splitlines()
    assert "engine local: ready" in printed
    assert any(
        line.startswith("engine trl: trl 1.15.0 is not !=1.15.*,<1.17,>=1.14.2; pip install ")
        for line in printed
    )
    assert 'engine verl: no verl; pip install "proxstep[verl]"' in printed
    has["verl"] = "0.9.1"
    printed = run(capsys, "doctor").splitlines()
    (line,) = (line for line in printed if line.startswith("engine verl: torch sees no GPU"))
    assert 'pip install "verl[vllm]==0.9.1"' in line
    del has["rich"]
    printed = run(capsys, "doctor").splitlines()
    assert 'engine local: no rich; pip install "proxstep[train]"' in printed
    assert any(
        line.startswith("engine trl: what engine local misses, trl 1.15") for line in printed
    )


def test_doctor_says_that_trl_and_verl_do_not_go_together(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["trl>=1.14.2; extra == 'trl'", "verl>=0.9; extra == 'verl'"]
    has = {"trl": "1.16.0"}

    def version(package: str) -> str:
        if package not in has:
            raise PackageNotFoundError(package)
        return has[package]

    monkeypatch.setattr(installed, "requires", lambda name: asked)
    monkeypatch.setattr(installed, "version", version)
    monkeypatch.setattr("proxstep.config.releases.version", version)
    for both in (False, True):
        if both:
            has["verl"] = "0.9.1"
        printed = run(capsys, "doctor")
        assert f"trl 1.16.0, verl {'0.9.1' if both else 'not installed'}" in printed
        assert "\nengine trl: ready\n" in printed
        assert "\nengine verl: verl 0.9 does not load a model beside TRL 1.16.0" in printed
        assert "environment of its own, or pip uninstall trl\n" in printed
    del has["trl"]
    printed = run(capsys, "doctor")
    assert "\nengine verl: torch sees no GPU" in printed
    assert "engine trl: no trl" in printed
    assert "in an environment of its own, since verl 0.9" in printed


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("proxstep tr", "train"),
        ("proxstep train --objective.al", "--objective.alpha"),
        ("proxstep train dap", "dapo"),
        ("proxstep init tab", "table"),
    ],
)
def test_bash_completes(line: str, expected: str) -> None:
    words = line.split()
    script = f"{completion_script('bash')}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n"
    done = subprocess.run(
        ["bash", "-c", script + '_proxstep; echo "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == expected


def losses(run_folder: str) -> list[Any]:
    lines = Path(run_folder, "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_a_finished_run_is_extended_and_its_checkpoints_scored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(capsys, "train", "tiny.yaml", "--steps=4", "--output_dir=whole")
    run(capsys, "train", "tiny.yaml")
    assert "the run in run has 2 steps" in mistake(capsys, "train", "--resume=run", "--steps=1")
    printed = run(capsys, "train", "--resume", "run", "--steps", "4")
    assert "steps 2 is now 4" in printed
    assert losses("run") == losses("whole")
    assert len(losses("run")) == 5

    older = Path("run/checkpoints/step-000002")
    assert f"{older}\n" in run(capsys, "eval", older)
    printed = run(capsys, "eval", older, "--task.num_validation", "3")
    assert "on 3 prompts of arithmetic" in printed
    (older / "model.safetensors").write_bytes(b"")
    assert f"{older} is damaged: " in mistake(capsys, "eval", older)


def test_eval_takes_a_models_folder(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    printed = run(capsys, "eval", models / "plain", "--task.num_validation", "3")
    assert "on 3 prompts of arithmetic" in printed
    assert f"{models / 'plain'}\n" in printed
    assert "unknown key tsk" in mistake(capsys, "eval", models / "plain", "--tsk.name", "gsm8k")

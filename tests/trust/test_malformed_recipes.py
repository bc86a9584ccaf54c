"""Suite 5: malformed recipes and arguments: no traceback, and each error names its key or file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proxstep.cli import commands as cli
from proxstep.config.explain import describe_keys
from proxstep.config.recipe import algorithm_names

WRONG = [
    "[[1]]",
    "{a: 1}",
    ".nan",
    "-.inf",
    "9" * 5000,
    "!!python/object/apply:os.system [touch canary]",
    "&a [*a]",
    "2026-01-01",
]
"""No key takes any of these."""
SOME_WRONG = [*WRONG[:2], *(pytest.param(text, marks=pytest.mark.slow) for text in WRONG[2:])]

DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "list": b"- 1\n",
    "text": b"just words\n",
    "number": b"3\n",
    "unclosed list": b"steps: [1, 2\n",
    "unclosed mapping": b"model: {name: x\n",
    "unclosed quote": b"output_dir: 'x\n",
    "tab": b"model:\n\tname: x\n",
    "duplicate": b"steps: 1\nsteps: 2\n",
    "duplicate below": b"model: {name: x, name: y}\n",
    "undefined alias": b"steps: *x\n",
    "recursive": b"model: &m {lora: *m}\n",
    "recursive list": b"task: {rewards: &r [*r]}\n",
    "recursive part": b"per_algorithm: &p {opo: *p}\n",
    "laughs": b"a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
    b"c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n",
    "deep": b"steps: " + b"[" * 3000,
    "deep and closed": b"steps: " + b"[" * 60 + b"]" * 60,
    "digits": b"steps: " + b"9" * 5000,
    "object": b"steps: !!python/object/apply:os.system [touch canary]\n",
    "module": b"steps: !!python/module:os\n",
    "binary tag": b"steps: !!binary '%%%'\n",
    "unknown tag": b"steps: !mine 3\n",
    "directive": b"%YAML 1.1\n---\nseed: 010\n",
    "two documents": b"---\nsteps: 1\n---\nsteps: 2\n",
    "date": b"steps: 2026-99-99\n",
    "nul": b"steps: \x00\n",
    "control": b"steps: \x07\n",
    "latin-1": "output_dir: läufe\n".encode("latin-1"),
    "utf-16": "steps: 3\n".encode("utf-16"),
    "utf-32": "steps: 3\n".encode("utf-32"),
    "zip": b"PK\x03\x04\x00\x00\xff\xfe",
    "pickle": b"\x80\x04\x95\x00\x00\xff.",
    "json": b'{"steps": }\n',
    "merge": b"<<: 3\n",
    "number as key": b"1: 2\n",
    "null as key": b"~: 2\n",
    "list as key": b"[1, 2]: 3\n",
    "mapping as key": b"{a: 1}: 3\n",
    "surrogate": b'output_dir: "\\ud800"\n',
    "bad escape": b'output_dir: "\\q"\n',
    "indent": b"model:\n  name: x\n dtype: y\n",
    "colon": b"a: b: c\n",
}

ARGUMENTS: list[list[str]] = [
    [],
    ["trian", "r.yaml"],
    ["train"],
    ["train", "r.yaml", "s.yaml"],
    ["train", "missing.yaml"],
    ["train", "."],
    ["train", "r.yaml/x"],
    ["train", "x" * 5000],
    ["train", "a\0b"],
    ["train", ""],
    ["train", "r.yaml", "--engine", "tlr"],
    ["train", "r.yaml", "--engine"],
    ["train", "r.yaml", "--print-command"],
    ["train", "r.yaml", "--steps"],
    ["train", "r.yaml", "--"],
    ["train", "r.yaml", "--=3"],
    ["train", "r.yaml", "--.steps=3"],
    ["train", "r.yaml", "--steps.=3"],
    ["train", "r.yaml", "--steps.more=3"],
    ["train", "r.yaml", "--model.name.x=3"],
    ["train", "r.yaml", "--steps=3", "--steps.x=4"],
    ["train", "r.yaml", "--learning_rate=1e-5"],
    ["train", "r.yaml", "--algorithm=grop"],
    ["train", "r.yaml", "--algorithm=[1]"],
    ["train", "r.yaml", "--algorithm=isopo+grpo"],
    ["train", "r.yaml", "--per_algorithm=3"],
    ["train", "r.yaml", "--per_algorithm.opo.nonsense=3"],
    ["train", "r.yaml", "--per_algorithm.grop.steps=3"],
    ["train", "r.yaml", "--task.train=my_data.jsonl"],
    ["train", "r.yaml", "--model.name=missing.gguf"],
    ["train", "r.yaml", "--model.name=folder.gguf"],
    ["train", "r.yaml", "--model.name=noise.gguf"],
    ["eval", "r.yaml", "--model.name=text.gguf"],
    ["train", "r.yaml", "-x"],
    ["train", "--resume"],
    ["train", "--resume", "missing"],
    ["train", "--resume", "r.yaml"],
    ["train", "--resume", "a\0b"],
    ["train", "--resume", "x" * 5000],
    ["train", "--resume", "folder"],
    ["train", "--resume", "damaged"],
    ["train", "r.yaml", "--resume", "folder"],
    ["eval"],
    ["eval", "missing"],
    ["eval", "folder"],
    ["eval", "damaged"],
    ["eval", "a\0b"],
    ["eval", "x" * 5000],
    ["eval", "r.yaml", "--output"],
    ["eval", "r.yaml", "--output", "folder"],
    ["eval", "r.yaml", "--output", "r.yaml/x"],
    ["eval", "r.yaml", "--step", "3"],
    ["compare"],
    ["compare", "r.yaml"],
    ["compare", "r.yaml", "--algorithms", ""],
    ["compare", "r.yaml", "--algorithms", "opo,opo"],
    ["compare", "r.yaml", "--algorithms", "opo,grop"],
    ["compare", "r.yaml", "--algorithms", "opo", "--seeds", "0"],
    ["compare", "r.yaml", "--algorithms", "opo", "--seeds", "many"],
    ["compare", "r.yaml", "--algorithms", "opo", "--jobs", "-1"],
    ["compare", "r.yaml", "--algorithms", "opo", "--output", "r.yaml"],
    ["compare", "r.yaml", "--algorithms", "opo", "--output", "a\0b"],
    ["compare", "r.yaml", "--algorithms", "opo", "--figure", "x.foo"],
    ["compare", "r.yaml", "--algorithms", "opo", "--seed", "3"],
    ["compare", "r.yaml", "--algorithms", "opo", "--step", "3"],
    ["compare", "missing.yaml", "--algorithms", "opo"],
    ["report"],
    ["report", "missing"],
    ["report", "folder"],
    ["report", "damaged"],
    ["report", "a\0b"],
    ["report", "x" * 5000],
    ["report", "folder", "--steps", "3"],
    ["diagnose"],
    ["diagnose", "missing"],
    ["diagnose", "folder"],
    ["diagnose", "damaged"],
    ["diagnose", "a\0b"],
    ["diagnose", "x" * 5000],
    ["diagnose", "folder", "--step", "first"],
    ["toy"],
    ["toy", "bandits"],
    ["toy", "bandit"],
    ["toy", "bandit", "--out", ""],
    ["toy", "bandit", "--out", "r.yaml"],
    ["toy", "bandit", "--out", "a\0b"],
    ["toy", "bandit", "--out", "x" * 5000],
    ["toy", "bandit", "--out", "new", "--seeds", "0"],
    ["toy", "bandit", "--out", "new", "--steps", "x"],
    ["toy", "saturation", "--out", "new", "--steps", "3"],
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("algorithm: grpo\n")
    Path("folder").mkdir()
    Path("damaged").mkdir()
    Path("folder.gguf").mkdir()
    Path("noise.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 40)
    Path("text.gguf").write_text("no model\n")
    Path("damaged/recipe.yaml").write_bytes(b"algorithm: grpo\n")
    for name in ("run.json", "metrics.jsonl", "diagnostics.jsonl"):
        Path("damaged", name).write_bytes(b"\xff{[")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one message of a command; anything that it raises fails the test."""
    status = cli.main(list(arguments))
    error = capsys.readouterr().err
    assert status == 2, (arguments, status)
    assert error.startswith("error: "), arguments
    assert "Traceback" not in error
    assert not Path("canary").exists()
    return error


def keys() -> list[tuple[str, str]]:
    """Every key, with an algorithm that has it."""
    found = []
    for key, *_ in describe_keys():
        key, _, algorithm = key.partition(" ")
        found.append((key, algorithm.strip("()") or "isopo"))
    return found


@pytest.mark.parametrize("wrong", SOME_WRONG, ids=lambda text: text[:20])
def test_every_key_with_what_no_key_takes(
    wrong: str, capsys: pytest.CaptureFixture[str], counted: Callable[..., None]
) -> None:
    for key, algorithm in keys():
        command = ("train", "r.yaml", "--dry-run", f"--algorithm={algorithm}", f"--{key}={wrong}")
        assert key in refused(capsys, *command), key
    counted("malformed recipes and arguments: a traceback, or no key named", len(keys()))


@pytest.mark.slow
def test_every_key_misspelt_and_misplaced(
    capsys: pytest.CaptureFixture[str], counted: Callable[..., None]
) -> None:
    tried = 0
    for key, algorithm in keys():
        section, _, name = key.rpartition(".")
        own = ("device", "seed", "engine")  # names of the top level and of an option
        misplaced = [name] if section and name not in own else []
        for odd in (f"{key}_{key[-1]}", f"{key[:-1]}~", *misplaced):
            command = ("train", "r.yaml", "--dry-run", f"--algorithm={algorithm}", f"--{odd}=1")
            error = refused(capsys, *command)
            assert f"unknown key {odd}" in error or f" {odd}" in error, odd
            tried += 1
    counted("malformed recipes and arguments: a traceback, or no key named", tried)


@pytest.mark.parametrize("command", ["train", "eval", "compare"])
def test_documents_that_are_no_recipe(
    command: str, capsys: pytest.CaptureFixture[str], counted: Callable[..., None]
) -> None:
    more = ["--algorithms=opo"] if command == "compare" else []
    for name, content in DOCUMENTS.items():
        file = Path("odd.yaml")
        file.write_bytes(content)
        assert "odd.yaml" in refused(capsys, command, "odd.yaml", *more), name
    counted("malformed recipes and arguments: a traceback, or no key named", len(DOCUMENTS))


def test_arguments_of_every_command(
    capsys: pytest.CaptureFixture[str], counted: Callable[..., None]
) -> None:
    for arguments in ARGUMENTS:
        assert len(refused(capsys, *arguments)) < 6000
    counted("malformed recipes and arguments: a traceback, or no key named", len(ARGUMENTS))


def test_parts_of_every_algorithm(
    capsys: pytest.CaptureFixture[str], counted: Callable[..., None]
) -> None:
    for name in algorithm_names():
        part = f"--per_algorithm.{name}.objective.nonsense=3"
        error = refused(capsys, "train", "r.yaml", "--dry-run", part)
        assert f"per_algorithm.{name}: unknown key objective.nonsense" in error
    counted("malformed recipes and arguments: a traceback, or no key named", len(algorithm_names()))

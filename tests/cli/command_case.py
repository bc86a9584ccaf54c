"""A recipe of two steps, and commands that are run or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxstep.cli import commands as cli
from proxstep.runs.folder import RunFolder

TINY = """\
algorithm: reinforce
steps: 2
output_dir: run
device: cpu
model: {name: embedded, warmup_score: 0.0}
task: {name: arithmetic, difficulty: 1, num_validation: 4}
rollout: {num_prompts: 2, num_generations: 2, max_completion_length: 3}
evaluation: {num_probe_prompts: 2}
"""
REWARDS = """\
def one(x):
    return [1.0]


def good(prompts, completions, **columns):
    return [0.5] * len(completions)
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that succeeds and return what it printed."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that is refused and return its one message."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err.removeprefix("error: ").rstrip("\n")


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(
    models: Path, rows: list[Any] | Path, *more: Any, model: str = "plain"
) -> tuple[Any, ...]:
    """Arguments of a run on rows of one's own."""
    if isinstance(rows, list):
        rows = jsonl(Path("rows.jsonl"), rows)
    keys = {
        "task.name": "table",
        "task.train": rows,
        "task.num_validation": 2,
        "task.difficulty": 3,
        "model.warmup_score": 0.6,
        "model.name": models / model,
    }
    return ("train", "tiny.yaml", *(f"--{key}={value}" for key, value in keys.items()), *more)


def sums(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(number)]


def chats(number: int) -> list[dict[str, Any]]:
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in sums(number)]


def make_run(path: Path, recipe: str = f"{TINY}seed: 0\n") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(recipe)
    RunFolder(path).update_info(status="running")

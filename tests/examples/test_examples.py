"""Every example runs as a user would run it, and what it prints shows that it works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STRICT = ("-W", "error")


def ran(folder: Path, *words: str | Path, seconds: float = 300) -> str:
    """What a command of Python's prints, started in a folder that has nothing of ours."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout


def numbers(text: str, name: str) -> list[float]:
    """The numbers behind a name, in the order in which they are printed."""
    return [float(number) for number in re.findall(rf"{name} (-?[\d.]+\d)", text)]


@pytest.mark.parametrize("name", ["plain_loop", "isopo_with_muon", "transformers_loop"])
def test_the_reward_rises(tmp_path: Path, name: str) -> None:
    rewards = numbers(ran(tmp_path, *STRICT, EXAMPLES / f"{name}.py"), "reward")
    assert len(rewards) == 4
    assert rewards[-1] > 0.85
    assert rewards[-1] > rewards[0] + 0.4


def test_the_budget_holds_where_the_learning_rate_is_too_large(tmp_path: Path) -> None:
    printed = ran(tmp_path, *STRICT, EXAMPLES / "kl_budget_loop.py")
    rewards, medians, most = (numbers(printed, n) for n in ("reward", "median", "most"))
    assert len(rewards) == len(medians) == len(most) == 3
    _, without, with_budget = rewards
    assert without < 0.5
    assert with_budget > 0.9
    assert medians[2] < 1.2 * 0.03
    assert most[2] < 0.05 * most[1]


def test_a_line_for_each_layer(tmp_path: Path) -> None:
    printed = ran(tmp_path, *STRICT, EXAMPLES / "layer_diagnostics.py")
    rows = re.findall(r"^(\S+\.(?:weight|bias)) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.M)
    assert len(rows) == 7
    assert sum(float(share) for _, share, _, _ in rows) == pytest.approx(1.0, abs=0.01)
    assert all(0.0 < float(cosine) < 1.0 for _, _, cosine, _ in rows)
    assert "Measured   128 sequences in 1 microbatch" in printed


@pytest.mark.slow
def test_the_script_of_trl_learns(tmp_path: Path) -> None:
    printed = ran(tmp_path, EXAMPLES / "trl_script.py")
    first, last = numbers(printed, "reward")[0], numbers(printed, "last five:")[0]
    assert last > first + 0.15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_table_and_a_reward_teach_a_model_that_is_made_here(tmp_path: Path) -> None:
    ran(tmp_path, *STRICT, EXAMPLES / "make_tiny_model.py", "tiny-model")
    recipe = (EXAMPLES / "my_reward.yaml").read_text()
    (line,) = re.findall(r"proxstep (train .*--model\.name \./tiny-model.*)", recipe)
    words = line.replace("examples/", f"{EXAMPLES}/").split()
    printed = ran(tmp_path, "-m", "proxstep", *words)
    assert "done: runs/my-reward" in printed
    lines = (tmp_path / "runs" / "my-reward" / "metrics.jsonl").read_text().splitlines()
    rewards = [record["reward"] for record in map(json.loads, lines[1:])]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "trl"])
def test_an_algorithm_of_a_file_trains_and_resumes(tmp_path: Path, engine: str) -> None:
    """With ISOPO's geometry too; the run's recipe finds the file again."""
    words = [
        "train",
        "--engine",
        engine,
        "arithmetic",
        "--external_lib",
        str(EXAMPLES / "my_objective.py"),
    ]
    words += ["--algorithm", "isopo+hinge", "--objective.margin", "0.01", "--steps", "2"]
    words += ["--update.num_iterations", "2", "--optimizer.learning_rate", "1e-2"]
    words += ["--task.difficulty", "1", "--rollout.max_completion_length", "2"]
    words += ["--task.num_validation", "4", "--evaluation.num_probe_prompts", "2"]
    words += ["--model.warmup_score", "0", "--output_dir", "run"]
    ran(tmp_path, "-m", "proxstep", *words)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 2\n", "steps: 3\n"))
    ran(tmp_path, "-m", "proxstep", "train", "--resume", "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all("objective/beyond_margin" in json.loads(line) for line in lines[1:])


def test_the_list_of_the_examples_is_whole() -> None:
    text = (EXAMPLES / "README.md").read_text()
    named = set(re.findall(r"\]\(([^)]+)\)", text))
    held = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert named == held - {"README.md"}

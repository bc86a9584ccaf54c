"""Commands that work: what they print and what they leave behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proxstep.algorithms import ALGORITHMS
from proxstep.cli import commands as cli
from proxstep.config.loading import load_recipe
from proxstep.config.recipe import algorithm_names
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.runs.stop import StopRequest
from proxstep.training import demo_model, lifecycle
from tests.cli.command_case import chats, mistake, run, table
from tests.config.recipe_case import leaves

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
COMMANDS = ("train", "eval", "compare", "report")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("algorithm", [*algorithm_names(), "isopo+opo"])
def test_a_dry_run_prints_the_recipe_and_touches_nothing(
    capsys: pytest.CaptureFixture[str], here: Path, algorithm: str
) -> None:
    overrides = [("algorithm", algorithm), ("optimizer.learning_rate", "1e-6"), ("seed", "7")]
    words = [word for key, value in overrides for word in (f"--{key}", value)]
    printed = run(capsys, "train", "tiny.yaml", "--dry-run", *words)
    assert sorted(path.name for path in here.iterdir()) == ["tiny.yaml"]
    Path("printed.yaml").write_text(printed)
    assert load_recipe("printed.yaml") == load_recipe("tiny.yaml", overrides)
    assert run(capsys, "train", "printed.yaml", "--dry-run") == printed


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_passes_a_dry_run_from_anywhere(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    printed = run(capsys, "train", path, "--dry-run")
    assert yaml.safe_load(printed)["algorithm"] == load_recipe(path).algorithm
    for line in path.read_text().splitlines():  # the examples in the comments name real keys
        words = line.lstrip("# ").rstrip("\\").split()
        keys = [word[2:] for word in words if word.startswith("--") and "." in word]
        known = set(leaves(load_recipe(path).model_dump()))
        assert set(keys) <= known, line


def test_keys_lists_every_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    printed = run(capsys, "train", "--keys")
    lines = [line for line in printed.splitlines() if line.startswith("--")]
    listed = {line.split()[0].removeprefix("--") for line in lines}
    assert all(re.search(r"  \(.+; default .+\)$", line) for line in lines)
    assert "--steps  (int; default 100)\n    Rollout steps.\n" in printed
    assert "--objective.mu (opo)  (float | auto; default 1.0)\n" in printed
    for objective in ALGORITHMS:
        recipe = load_recipe("tiny.yaml", [("algorithm", objective)])
        assert set(leaves(recipe.model_dump())) - {"objective.name"} <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert f"examples:\n  proxstep {command} " in out
    assert ("--objective.alpha 0.2" in out) == (command != "report")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, expected in (
        ("--help", "{train,eval,compare,diagnose,report,toy,recipes,init,doctor,completion}"),
        ("--version", "proxstep 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([argument])
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "pydantic" else find(name)
    )
    message = mistake(capsys, "train", "tiny.yaml")
    assert message == 'pydantic is missing: pip install "proxstep[train]"'


def test_train_eval_report_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "train", "tiny.yaml", "--logging.tracker=tensorboard")
    assert printed.endswith("done: run\n")
    assert "\x1b" not in printed
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("step")] == [
        ["step", str(step)] for step in (0, 1, 2)
    ]
    assert json.loads(Path("run/run.json").read_text())["status"] == "finished"
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert latest_checkpoint(Path("run")).name == "step-000002"
    assert list(Path("run").glob("events.out.tfevents.*"))
    recipe = load_recipe("tiny.yaml", [("logging.tracker", "tensorboard")])
    assert load_recipe("run/recipe.yaml") == recipe

    assert mistake(capsys, "train", "--resume", "run") == (
        "run: the run is finished, at step 2 of 2; a larger --steps extends it"
    )

    printed = run(capsys, "eval", "run", "--output", "scored.jsonl")
    assert printed.startswith("greedy score 0.")
    assert "on 4 prompts of arithmetic" in printed
    assert "run/checkpoints/step-000002\n" in printed
    rows = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion", "answer", "reward"}] * 4

    printed = run(capsys, "eval", "tiny.yaml", "--task.num_validation", "3")
    assert "on 3 prompts of arithmetic" in printed
    assert "tokens, embedded\n" in printed

    printed = run(capsys, "report", "run", "--output", "pages/run.html", "--figure", "new/a.svg")
    assert "reinforce" in printed
    assert "report: pages/run.html" in printed
    assert Path("pages/run.html").read_text().startswith("<!doctype html")
    assert "<svg" in Path("new/a.svg").read_text()

    before = Path("run/run.json").read_bytes()
    assert "already holds a run" in mistake(capsys, "train", "tiny.yaml")
    assert Path("run/run.json").read_bytes() == before
    run(capsys, "train", "tiny.yaml", "--overwrite", "--algorithm=isopo", "--steps=1")
    assert latest_checkpoint(Path("run")).name == "step-000001"
    assert not list(Path("run").glob("events.out.tfevents.*"))
    assert load_recipe("run/recipe.yaml").algorithm == "isopo"


def test_chats_go_through_the_template(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    run(capsys, *table(models, chats(4), "--steps=1", model="chat"))
    sample = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == [{"role": "user", "content": "2+1="}]


def test_half_a_character_in_the_data_does_not_lose_an_evaluation(
    capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": "\ud83d"} for i in range(4)]
    _, *keys = table(models, rows)
    keys = [*keys, "--task.rewards=exact_match", "--output=scored.jsonl"]
    run(capsys, "eval", *keys)
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in scored] == ["\ud83d"] * 2


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as interrupted:
        interrupted.setattr(StopRequest, "made", True)
        assert cli.main(["train", "tiny.yaml"]) == 130
    out, err = capsys.readouterr()
    advice = "interrupted; the run is complete up to here: proxstep train --resume run"
    assert (out.splitlines()[-1], err) == (advice, "")
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    assert run(capsys, "train", "--resume", "run").endswith("done: run\n")
    assert latest_checkpoint(Path("run")).name == "step-000002"


def test_a_second_ctrl_c_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "train", stop)
    assert cli.main(["train", "tiny.yaml"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_first_warm_up_is_the_only_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    scores = []

    def warm_up(*arguments: Any, task: str, name: str) -> None:
        difficulty, score, note = arguments[2:]
        assert (task, name) == ("arithmetic", "embedded")
        scores.append((difficulty, score))
        note("warm-up step 25: 30% of the answers are right or noisy")

    monkeypatch.setattr(demo_model, "warm_up", warm_up)
    monkeypatch.setenv("PROXSTEP_CACHE", str(here / "cache"))
    keys = ("--model.warmup_score=0.3", "--steps=1")
    for more in ((), ("--overwrite",)):
        printed = run(capsys, "train", "tiny.yaml", *more, *keys).splitlines()
        assert "reinforce on arithmetic, 1 steps" in printed
        assert scores == [(1, 0.3)]


@pytest.mark.parametrize("task", ["sums", "countdown"])
def test_a_task_with_worked_steps(capsys: pytest.CaptureFixture[str], task: str) -> None:
    keys = (f"--task.name={task}", "--task.difficulty=3", "--steps=1")
    run(capsys, "train", "tiny.yaml", *keys)
    printed = run(capsys, "eval", "run")
    assert f"on 4 prompts of {task}" in printed


def test_a_checkpoint_brings_its_own_tokenizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "train", "tiny.yaml")
    monkeypatch.setattr(
        demo_model, "ensure_embedded_model", lambda *_: pytest.fail("it warms a model up")
    )
    printed = run(capsys, "eval", "run", "--task.difficulty=2")
    assert "run/checkpoints/step-000002\n" in printed


def test_one_gpu_runs_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("proxstep.lab.compare.run_jobs", lambda jobs, n, console: seen.append(n))
    monkeypatch.setattr(cli, "_summarize", lambda *_: 0)
    command = ["compare", "tiny.yaml", "--algorithms=opo"]
    for more in (["--device=auto"], ["--device=cpu"], ["--device=auto", "--jobs=3"]):
        assert cli.main([*command, *more, "--overwrite"]) == 0
    assert seen == [1, 16, 3]


@pytest.mark.usefixtures("unloaded")
def test_keys_may_come_before_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    after = run(capsys, "train", "tiny.yaml", "--dry-run", "--steps", "5", "--seed=3")
    assert yaml.safe_load(after)["steps"] == 5
    for arguments in (
        ["--steps", "5", "tiny.yaml", "--seed=3", "--dry-run"],
        ["--seed=3", "--dry-run", "--steps", "5", "tiny.yaml"],
        ["--dry-run", "--engine", "local", "--seed", "3", "--steps=5", "tiny.yaml"],
    ):
        assert run(capsys, "train", *arguments) == after


@pytest.mark.parametrize("held", ["", '{"step": 10, "su'], ids=["empty", "cut off"])
def test_diagnose_ends_with_a_verdict_where_no_diagnostics_are_whole(
    tmp_path: Path, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (tmp_path / "diagnostics.jsonl").write_text(held)
    assert cli.main(["diagnose", str(tmp_path)]) == 0
    assert "not learning: 1 steps are too few to tell" in capsys.readouterr().out
    assert cli.main(["diagnose", str(tmp_path), "--step", "10"]) == 2

"""Comparing algorithms: what is planned, how runs go side by side, and what a failure says."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from proxstep.cli import commands as cli
from proxstep.config.loading import load_recipe
from proxstep.config.yamlfile import read_yaml
from proxstep.errors import ProxstepError
from proxstep.lab import compare
from proxstep.lab.compare import Job, Pace, clear, find_done, make_jobs, run_jobs
from proxstep.lab.plan import Cell, Plan, Variant
from proxstep.runs.folder import RunFolder
from proxstep.runs.lock import is_locked
from proxstep.runs.reading import find_runs, load_samples
from tests.engine import tiny_recipe

TINY = """\
algorithm: reinforce
steps: 2
device: cpu
model: {name: embedded, warmup_score: 0.0}
task: {name: arithmetic, difficulty: 1, num_validation: 4}
rollout: {num_prompts: 2, num_generations: 2, max_completion_length: 3}
evaluation: {num_probe_prompts: 2}
"""
RECORD = {"step": 3, "reward": 0.5, "score": None, "seconds_step": 0.1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll often; the processes of these tests end at once."""
    sleep = time.sleep
    monkeypatch.setattr("proxstep.lab.compare.time.sleep", lambda seconds: sleep(0.01))


def pretend(monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]) -> list[str]:
    """Let the jobs of an algorithm run a program instead of training; return the order of starts.

    The program finds its run folder, already made, as sys.argv[1].
    """
    started: list[str] = []

    def start(job: Job) -> subprocess.Popen[bytes]:
        job.folder.mkdir(parents=True)
        job.log.parent.mkdir(exist_ok=True)
        started.append(job.folder.name)
        program = programs[job.recipe.algorithm]
        with job.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", program, str(job.folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    monkeypatch.setattr(compare, "_start", start)
    return started


def jobs_of(tmp_path: Path, *algorithms: str, seeds: int = 1) -> list[Job]:
    variants = [
        Variant(algorithm, {}, tiny_recipe(tmp_path / "unused", algorithm))
        for algorithm in algorithms
    ]
    cells = [Cell(variant, seed) for seed in range(seeds) for variant in variants]
    return make_jobs(cells, tmp_path / "out")


def pipe() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=200), file


def test_every_algorithm_is_planned_with_every_seed_seed_by_seed(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "reinforce", "isopo+opo", seeds=3)
    assert [job.folder.name for job in jobs] == [
        f"{algorithm}-seed{seed}" for seed in range(3) for algorithm in ("reinforce", "isopo+opo")
    ]
    assert [job.recipe.seed for job in jobs] == [0, 0, 1, 1, 2, 2]
    assert {job.state for job in jobs} == {"waiting"}
    assert jobs[1].log == tmp_path / "out" / "logs" / "isopo+opo-seed0.log"
    same = {"seed", "output_dir"}
    assert jobs[0].recipe.model_dump(exclude=same) == jobs[4].recipe.model_dump(exclude=same)


def test_taken_folders_are_refused_or_cleared_of_runs_alone(tmp_path: Path) -> None:
    find_done([], tmp_path / "none")
    for name in ("opo-seed0", "opo-seed1"):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).update_info(status="finished")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ProxstepError, match=f"output {tmp_path} already holds 2 runs, and opo-see"):
        find_done([], tmp_path)
    assert (tmp_path / "opo-seed0" / "run.json").exists()
    (tmp_path / "plan.yaml").write_text("seeds: 3")
    clear(tmp_path)
    held = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert held == ["notes", "notes/mine.txt", "opo-seed0", "opo-seed1"]
    find_done([], tmp_path)
    assert (tmp_path / "notes" / "mine.txt").exists()


def test_what_is_done_of_a_comparison_is_not_done_again(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "grpo", "opo", "dro")
    for job, status in zip(jobs, ("finished", "running", "failed"), strict=True):
        RunFolder(job.folder).create(job.recipe, torch.device("cpu"), 1)
        RunFolder(job.folder).update_info(status=status)
    again = jobs_of(tmp_path, "grpo", "opo", "dro")
    find_done(again, tmp_path / "out")
    assert [job.state for job in again] == ["done", "waiting", "waiting"]
    other = [Job(job.recipe.model_copy(update={"steps": 9})) for job in jobs]
    with pytest.raises(ProxstepError, match="3 runs, and dro-seed0 is none of this comparison"):
        find_done(other, tmp_path / "out")


def test_the_last_record_carries_the_last_score(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, "grpo")
    assert job.last_record() == {}
    job.folder.mkdir(parents=True)
    lines = [json.dumps({**RECORD, "step": step}) for step in (2, 3)]
    path = job.folder / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0, "score": 0.25}) + "\n" + "\n".join(lines))
    assert job.last_record() == {**RECORD, "step": 2, "score": 0.25}
    path.write_text(path.read_text() + "\n")
    assert job.last_record() == {**RECORD, "step": 3, "score": 0.25}
    path.write_text(path.read_text() + json.dumps({**RECORD, "score_mean_length": 3.0}) + "\n")
    assert job.last_record()["score"] is None  # its last evaluation gave none
    path.write_text("")
    assert job.last_record() == {}


def test_a_run_without_a_score_counts_as_done_without_one(tmp_path: Path) -> None:
    """As where the reward function applied to no validation prompt at the end."""
    jobs = jobs_of(tmp_path, "grpo", "opo", "dro")
    lines = {
        "grpo": [{"step": 0, "score": 0.5, "score_mean_length": 3.0}],
        "opo": [{"step": 0, "score": None, "score_mean_length": 3.0}],
        "dro": [],
    }
    for job in jobs:
        job.folder.mkdir(parents=True)
        last = {"step": 3, "score": None, "score_mean_length": 3.0, "elapsed_seconds": 7.0}
        rows = [*lines[job.recipe.algorithm], last] if lines[job.recipe.algorithm] else []
        (job.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
        job.code = 0
    scores = compare._scores(jobs)
    assert all(map(math.isnan, scores.values()))
    assert list(scores) == ["grpo-seed0", "opo-seed0", "dro-seed0"]
    assert compare._longest(jobs) == 7.0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("num_parallel", [1, 2, 9])
def test_only_so_many_run_at_a_time_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_parallel: int
) -> None:
    program = "import time; time.sleep(0.03)"
    started = pretend(monkeypatch, {"grpo": program, "opo": program})
    jobs = jobs_of(tmp_path, "grpo", "opo", seeds=2)
    most = 0
    advance = compare._advance

    def watched(*arguments: object) -> None:
        nonlocal most
        advance(*arguments)  # type: ignore[arg-type]
        most = max(most, sum(job.state == "running" for job in jobs))

    monkeypatch.setattr(compare, "_advance", watched)
    console, file = pipe()
    run_jobs(jobs, num_parallel, console)
    assert most == min(num_parallel, 4)
    assert started == [job.folder.name for job in jobs]
    assert {job.state for job in jobs} == {"done"}
    written = re.sub(r" \(. of 4 done.*\)$", "", file.getvalue(), flags=re.MULTILINE).splitlines()
    assert sorted(written) == sorted(
        line
        for job in jobs
        for line in (f"{job.folder.name}: running", f"{job.folder.name}: done, greedy score -")
    )


@pytest.mark.usefixtures("quick")
def test_a_failure_names_the_run_and_its_last_line_after_the_others_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "grpo": "print('first\\nerror: device cuda is not available here'); raise SystemExit(2)",
        "opo": "import sys; open(sys.argv[1] + '/finished', 'w')",
        "dro": "raise SystemExit(1)",
    }
    pretend(monkeypatch, programs)
    jobs = jobs_of(tmp_path, "grpo", "opo", "dro")
    console, file = pipe()
    with pytest.raises(ProxstepError) as caught:
        run_jobs(jobs, 1, console)
    first, second = str(caught.value).splitlines()
    assert first == (
        "grpo-seed0 failed: error: device cuda is not available here (see "
        f"{tmp_path}/out/logs/grpo-seed0.log)"
    )
    assert second == f"dro-seed0 failed: it printed nothing (see {tmp_path}/out/logs/dro-seed0.log)"
    assert (tmp_path / "out" / "opo-seed0" / "finished").exists()
    assert [job.state for job in jobs] == ["failed", "done", "failed"]
    assert "grpo-seed0: failed (0 of 3 done, 1 failed)\n" in file.getvalue()


def test_ctrl_c_stops_the_running_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import signal, sys, time\n"
        "def stop(*_):\n    open(sys.argv[1] + '/stopped', 'w').close(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open(sys.argv[1] + '/ready', 'w').close()\n"
        "time.sleep(60)\n"
    )
    pretend(monkeypatch, {"grpo": program, "opo": program})
    jobs = jobs_of(tmp_path, "grpo", "opo")
    sleep = time.sleep

    def press_ctrl_c(seconds: float) -> None:
        while not (jobs[0].folder / "ready").exists():
            sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("proxstep.lab.compare.time.sleep", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 1, pipe()[0])
    assert (jobs[0].folder / "stopped").exists()
    assert jobs[0].process is not None
    assert jobs[0].process.poll() == 130
    assert jobs[1].process is None


@pytest.mark.usefixtures("quick")
def test_a_terminal_shows_every_run_with_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({**RECORD, "score": 0.125})
    program = f"import sys; print({line!r}, file=open(sys.argv[1] + '/metrics.jsonl', 'w'))"
    pretend(monkeypatch, {"grpo": program, "isopo": program})
    file = io.StringIO()
    run_jobs(
        jobs_of(tmp_path, "grpo", "isopo"),
        1,
        Console(file=file, force_terminal=True, width=100, color_system=None),
    )
    last = file.getvalue()[file.getvalue().rindex("greedy score") :].splitlines()
    assert "2 of 2 done" in [line.strip() for line in last]
    rows = [line.split() for line in last if "-seed0" in line]
    assert rows == [
        ["grpo-seed0", "done", "3/3", "0.500", "0.125", "0.10"],
        ["isopo-seed0", "done", "3/3", "0.500", "0.125", "0.10"],
    ]


def test_the_pace_counts_steps_taken_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("proxstep.lab.compare.time.monotonic", lambda: now)
    jobs = jobs_of(tmp_path, "grpo", "opo", seeds=2)
    jobs[0].code = 0
    pace = Pace(jobs)
    assert str(pace) == "1 of 4 done"
    jobs[1].folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "score": 0.0}) + "\n" for step in (0, 1, 2)]
    (jobs[1].folder / "metrics.jsonl").write_text("".join(lines))
    now += 20
    assert str(pace) == "1 of 4 done, 0:01:10 left"  # 2 steps in 20 s; 1 + 3 + 3 to do
    jobs[3].code = -9
    assert str(pace) == "1 of 4 done, 1 failed, 0:00:40 left"


@pytest.mark.usefixtures("quick")
def test_a_run_that_still_ends_its_step_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL of the comparison before."""
    started = pretend(monkeypatch, {"grpo": "", "opo": ""})
    jobs = jobs_of(tmp_path, "grpo", "opo")
    monkeypatch.setattr(compare, "is_locked", lambda path: path == jobs[0].folder and not started)
    run_jobs(jobs, 1, pipe()[0])
    assert started == ["opo-seed0", "grpo-seed0"]


def test_two_algorithms_from_the_command_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real thing: two processes that train, one page about both."""
    assert os.environ["PROXSTEP_CACHE"]
    keys = ["--optimizer.learning_rate", "1e-4", "--output", "out", "--jobs", "2"]
    command = ["compare", "tiny.yaml", "--algorithms", "grpo,isopo", "--seeds", "1", *keys]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "grpo-seed0: done, greedy score 0." in out
    assert "isopo-seed0: done, greedy score 0." in out
    assert "One seed only for grpo, isopo" in out
    assert "report: out/report.html" in out
    runs = find_runs([here / "out"])
    assert [(run.algorithm, run.seed, run.info["status"]) for run in runs] == [
        ("grpo", 0, "finished"),
        ("isopo", 0, "finished"),
    ]
    for run in runs:
        recipe = load_recipe(run.path / "recipe.yaml")
        assert recipe.optimizer.learning_rate == 1e-4
        assert (recipe.task.difficulty, recipe.steps) == (1, 2)
        log = (here / "out" / "logs" / f"{run.path.name}.log").read_text()
        assert log.endswith(f"done: out/{run.path.name}\n")
    plan = read_yaml(here / "out" / "plan.yaml")
    assert (plan["algorithms"], plan["vary"], plan["seeds"]) == (["grpo", "isopo"], {}, 1)
    assert cli.main(command) == 0  # nothing is run again
    assert [run.info["started"] for run in find_runs([here / "out"])] == [
        run.info["started"] for run in runs
    ]
    capsys.readouterr()
    other = [*command, "--steps", "3"]
    assert cli.main(other) == 2
    assert "holds another plan, out/plan.yaml: its steps of grpo is 2." in capsys.readouterr().err
    first, second = ([sample["prompt"] for sample in load_samples(run)] for run in runs)
    assert first == second
    assert "isopo" in (here / "out" / "report.html").read_text()


def test_an_engine_is_the_plans_and_refuses_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "tiny.yaml", "--algorithms", "grpo,opo", "--engine", "trl"]
    assert cli.main([*words, "--output", "out", "--guard", "halve"]) == 2
    assert "guard halve" in capsys.readouterr().err
    assert not (here / "out" / "plan.yaml").exists()
    recipe = load_recipe(here / "tiny.yaml")
    plan = Plan((Variant("grpo", {}, recipe),), {}, 1, engine="trl")
    assert [job.engine for job in make_jobs(plan.cells(), here, plan.engine)] == ["trl"]
    plan.write(here)
    with pytest.raises(ProxstepError, match=r"holds another plan, .*engine"):
        Plan(plan.variants, {}, 1).continuing(here)


PARENT = """
import subprocess, sys
from proxstep.runs.children import die_with_parent
child = subprocess.Popen(["sleep", "60"], start_new_session=True, preexec_fn=die_with_parent())
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(500):
        if not is_alive(child):
            return
        time.sleep(0.02)
    pytest.fail("an orphan is left")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "engine"),
    [
        (signal.SIGTERM, "local"),
        (signal.SIGINT, "local"),
        (signal.SIGKILL, "local"),
        (signal.SIGTERM, "trl"),
    ],
)
def test_a_comparison_that_is_stopped_stops_its_runs_and_goes_on(
    here: Path, number: int, engine: str
) -> None:
    """Three runs, two at a time: one is done, the others are in the middle."""
    (here / "tiny.yaml").write_text(f"{TINY}logging: {{checkpoint_every: 1}}\n")
    words = ["compare", "tiny.yaml", "--algorithms", "grpo,opo,gspo", "--output", "out"]
    words += ["--engine", engine]
    command = [sys.executable, "-m", "proxstep", *words, "--jobs", "2", "--steps", "100"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [here / "out" / f"{name}-seed0" / "metrics.jsonl" for name in ("grpo", "gspo")]
    while not rows[1].exists() or not rows[1].read_text().count("\n") > 2:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    process.wait()
    folders = [path.parent for path in (here / "out").glob("*/run.json")]
    while any(is_locked(folder) for folder in folders):  # after SIGKILL they end their step
        assert number == signal.SIGKILL
        time.sleep(0.1)
    began = {path: path.info()["started"] for path in map(RunFolder, folders)}
    done = [path for path in began if path.status() == "finished"]
    assert len(done) < 3
    assert cli.main(command[3:]) == 0
    runs = find_runs([here / "out"])
    assert [run.info["status"] for run in runs] == ["finished"] * 3
    for path, started in began.items():
        assert path.info()["started"] == started  # continued, not begun again
    for run in runs:
        assert [record["step"] for record in run.records] == list(range(101))

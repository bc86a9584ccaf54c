"""Kill a comparison of 60 tiny runs five times at random, and hold it against an unbroken one.

    python scripts/check_plan.py /tmp/plan whole     # some minutes on one core
    python scripts/check_plan.py /tmp/plan broken    # the same, killed five times,
    python scripts/check_plan.py /tmp/plan rest      # and then to its end
    python scripts/check_plan.py /tmp/plan equal     # the two tables, to the bit

Linux alone: orphans are looked for in /proc. With --fork the runs are forks of the comparison,
which saves the imports of each, most of the time of so small a run; everything else is what
`proxstep compare` does. What came out is in experiments/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RECIPE = """\
algorithm: grpo
steps: 2
device: cpu
model: {name: embedded}
task: {name: arithmetic, difficulty: 3, num_validation: 16}
rollout: {num_prompts: 4, num_generations: 4, max_completion_length: 6}
evaluation: {num_probe_prompts: 2, every: 1}
"""
KINDS = ("SIGINT", "SIGTERM", "SIGKILL", "SIGKILL of all", "SIGKILL of a run, then of compare")
TIMES = ("seconds_", "elapsed_seconds")


def command(folder: Path, name: str, *, fork: bool) -> list[str]:
    """Return the command of a comparison, of 60 runs."""
    program = (
        [sys.executable, __file__, "--compare"] if fork else [sys.executable, "-m", "proxstep"]
    )
    return [
        *(*program, "compare", str(folder / "tiny.yaml")),
        *("--algorithms", "grpo,opo,isopo", "--seeds", "5", "--jobs", "1"),
        *("--vary", "optimizer.learning_rate=1e-4,3e-4,1e-3,3e-3"),
        *("--output", str(folder / name), "--csv", str(folder / f"{name}.csv")),
    ]


class Fork:
    """A process that was forked, as far as a comparison asks."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """Return its exit code, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int | None:
        """Wait for its end."""
        return self.poll(0)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)


def compare_with_forks(words: list[str]) -> int:
    """Run a command line whose comparison forks its runs."""
    from proxstep.cli import main
    from proxstep.lab import compare
    from proxstep.runs.children import die_with_parent
    from proxstep.training import lifecycle

    assert lifecycle  # imported before the forks

    def fork(arguments: list[str], **options: Any) -> Fork:
        prepare = die_with_parent()
        pid = os.fork()
        if pid:
            return Fork(pid)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        prepare()
        for descriptor in (1, 2):
            os.dup2(options["stdout"].fileno(), descriptor)
        code = 1
        try:
            code = main(arguments[3:])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    compare.subprocess = SimpleNamespace(
        Popen=fork, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    return main(words)


def processes(of: Path) -> list[int]:
    """Return the processes, but for this one, that name a folder in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(of).encode() in words:
                found.append(int(entry.name))
    return found


def kill(kind: str, compare: subprocess.Popen[bytes], folder: Path) -> float:
    """Kill a comparison in one of the ways; return the seconds until nothing of it is left."""
    runs = [process for process in processes(folder) if process != compare.pid]
    if kind in ("SIGINT", "SIGTERM"):
        compare.send_signal(getattr(signal, kind))
    elif kind == "SIGKILL":
        compare.kill()
    else:
        for process in runs:
            os.kill(process, signal.SIGKILL)
        if kind != "SIGKILL of all":
            time.sleep(2)
        compare.kill()
    compare.wait()
    begun = time.monotonic()
    while processes(folder):
        if time.monotonic() - begun > 60:
            raise SystemExit(f"orphans after {kind}: {processes(folder)}")
        time.sleep(0.05)
    return time.monotonic() - begun


def broken(folder: Path, seed: int, *, fork: bool) -> None:
    """Run the comparison, killed once in each way."""
    draw = random.Random(seed)
    for kind in draw.sample(KINDS, len(KINDS)):
        before = len(list((folder / "broken").glob("*/run.json")))
        words = command(folder, "broken", fork=fork)
        compare = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while len(list((folder / "broken").glob("*/run.json"))) <= before:
            time.sleep(0.1)  # until it has begun a run of its own
            if compare.poll() is not None:
                break
        wait = draw.uniform(0, 6) if fork else draw.uniform(5, 40)
        time.sleep(wait)
        if compare.poll() is not None:
            raise SystemExit(f"it ended before it was killed, with {compare.returncode}")
        seconds = kill(kind, compare, folder / "broken")
        print(
            f"{kind} after {wait:.1f} s, {finished(folder / 'broken')} of 60 finished; "
            f"all processes gone {seconds:.2f} s later",
            flush=True,
        )


def finished(folder: Path) -> int:
    """Return how many runs are finished."""
    infos = [json.loads(path.read_text()) for path in folder.glob("*/run.json")]
    return sum(info["status"] == "finished" for info in infos)


def equal(folder: Path) -> None:
    """Hold the tables and every run's metrics against each other, times left out."""
    tables = []
    for name in ("whole", "broken"):
        lines = (folder / f"{name}.csv").read_text().splitlines()
        tables.append([line for line in lines if ",after," not in line])
    metrics = [measured(folder / name) for name in ("whole", "broken")]
    if len(metrics[0]) != 60 or tables[0] != tables[1] or metrics[0] != metrics[1]:
        raise SystemExit("they differ")
    numbers = sum(len(row) for rows in metrics[0].values() for row in rows)
    print(f"equal to the bit: {len(tables[0]) - 1} figures of the tables, {numbers} of 60 runs")


def measured(folder: Path) -> dict[str, list[dict]]:
    """Return every run's metrics without times."""
    return {
        path.parent.name: [
            {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.glob("*/metrics.jsonl"))
    }


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["whole", "broken", "rest", "equal"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true")
    # A shell ignores SIGINT for what it starts in the background, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[1:2] == ["--compare"]:
        sys.exit(compare_with_forks(sys.argv[2:]))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    names = {"whole": "whole", "rest": "broken"}
    if arguments.part in names:
        subprocess.run(command(folder, names[arguments.part], fork=arguments.fork), check=True)
    elif arguments.part == "broken":
        broken(folder, arguments.seed, fork=arguments.fork)
    else:
        equal(folder)


if __name__ == "__main__":
    main()

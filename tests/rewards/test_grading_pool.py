from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.selection import slow

from proxstep.errors import ProxstepError
from proxstep.rewards import grading_pool
from proxstep.rewards.grading_pool import GradingPool, shared_pool

HANG = ("2", r"9^{9^{9^{9}}}")


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    pool = GradingPool(1, cpu_seconds=1.0)
    yield pool
    pool.close()


def pids(pool: GradingPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def worker_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    path = tmp_path / "worker.py"
    path.write_text(source)
    monkeypatch.setattr(grading_pool, "WORKER", path)


READY = "import os, sys, time\nos.write(1, b'R')\nfor line in sys.stdin.buffer:\n    "


def test_processes_start_with_the_first_question_and_no_sooner(pool: GradingPool) -> None:
    assert pool.grade([]) == []
    assert pids(pool) == []
    assert pool.grade([("2", "2.0")]) == [True]
    assert len(pids(pool)) == 1


def test_results_come_in_order_from_several_processes() -> None:
    pool = GradingPool(2)
    pairs = [("7", f"{i % 9}.0") for i in range(300)]
    assert pool.grade(pairs) == [i % 9 == 7 for i in range(300)]
    assert len(pids(pool)) == 2
    running = pids(pool)
    pool.close()
    assert not any(map(is_running, running))
    assert pool.grade([("2", "2.0")]) == [True]  # and it starts again
    pool.close()


@pytest.mark.slow
def test_a_hang_costs_one_answer_and_one_process(pool: GradingPool) -> None:
    pool.grade([("2", "2.0")])
    before = pids(pool)
    assert pool.grade([("2", "2.0"), HANG, ("2", "3.0"), HANG, ("2", "2.00")]) == [
        True,
        None,
        False,
        None,
        True,
    ]
    assert not any(map(is_running, before))


@pytest.mark.slow
def test_a_process_that_was_killed_while_idle_is_replaced(pool: GradingPool) -> None:
    pool.grade([("2", "2.0")])
    os.kill(pids(pool)[0], signal.SIGKILL)
    time.sleep(0.2)
    assert pool.grade([("2", "2.0")]) == [True]


@pytest.mark.parametrize(
    "body",
    [
        "os._exit(1)",
        "os.kill(os.getpid(), 11)",
        "os.write(1, b'?')",
        "time.sleep(600)",
        pytest.param("os.kill(os.getpid(), 19)", marks=pytest.mark.slow),
    ],
    ids=["exit", "crash", "nonsense", "sleep", "stopped"],
)
def test_a_lost_process_costs_its_answer_alone(
    body: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_script(
        monkeypatch, tmp_path, f"{READY}if b'bad' in line: {body}\n    os.write(1, b'1')\n"
    )
    pool = GradingPool(2, wall_seconds=1.0)
    pairs = [("a", "b"), ("a", "bad"), ("a", "b"), ("a", "bad"), ("a", "b")]
    assert pool.grade(pairs) == [True, None, True, None, True]
    pool.close()


KILLED = "os.kill(os.getpid(), 9)"
# Dies the first NUMBER times that it comes here, whichever process it is.
DIES = (
    "import pathlib; f = pathlib.Path({file!r}); n = int(f.read_text()); f.write_text(str(n - 1)); "
    "n > 0 and os.kill(os.getpid(), 9)"
)


@pytest.mark.parametrize(("deaths", "verdict"), [(1, True), (2, True), (3, None)])
def test_a_job_whose_process_is_killed_is_graded_again(
    deaths: int,
    verdict: bool | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "deaths"
    file.write_text(str(deaths))
    body = f"if b'bad' in line:\n        {DIES.format(file=str(file))}\n    os.write(1, b'1')\n"
    worker_script(monkeypatch, tmp_path, READY + body)
    pool = GradingPool(2)
    assert pool.grade([("a", "b"), ("a", "bad"), ("a", "b")]) == [True, verdict, True]
    pool.close()
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (verdict is None)
    assert all("lost at the answer 'bad' (the last was ended by signal 9)" in w for w in warned)


def test_a_real_process_that_is_killed_while_it_grades(caplog: pytest.LogCaptureFixture) -> None:
    pool = GradingPool(1)
    pool.grade([("2", "2.0")])
    [worker] = pool._workers
    send = worker.send

    def send_and_kill(*arguments: object) -> None:
        os.kill(worker.process.pid, signal.SIGSTOP)
        send(*arguments)  # type: ignore[arg-type]
        os.kill(worker.process.pid, signal.SIGKILL)

    worker.send = send_and_kill  # type: ignore[method-assign]
    assert pool.grade([("x+1", "1+x"), ("x", "x+1")]) == [True, False]
    assert not caplog.records
    pool.close()


def test_what_is_at_a_limit_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tries"
    file.touch()
    body = f"open({str(file)!r}, 'a').write('x'); os.kill(os.getpid(), {int(signal.SIGPROF)})\n"
    worker_script(monkeypatch, tmp_path, READY + body)
    pool = GradingPool(1)
    assert pool.grade([("a", "b")]) == [None]
    assert file.read_text() == "x"
    pool.close()


def test_what_raises_is_not_equal_and_costs_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another process would raise it again."""
    source = (
        f"import sys; sys.path.insert(0, {str(grading_pool.WORKER.parent)!r})\n"
        "import grading_worker\n"
        "grading_worker._warm_up = lambda: None\n"
        "grading_worker.is_equal = lambda reference, answer: 1 // int(answer)\n"
        "grading_worker.main()\n"
    )
    worker_script(monkeypatch, tmp_path, source)
    pool = GradingPool(1)
    assert pool.grade([("1", "1"), ("1", "0"), ("1", "1")]) == [True, False, True]
    [worker] = pool._workers
    assert worker.num_jobs == 3
    pool.close()


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_process_that_is_killed_while_it_starts_is_started_again(
    deaths: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "deaths"
    file.write_text(str(deaths))
    source = f"import os\n{DIES.format(file=str(file))}\n{READY}os.write(1, b'1')\n"
    worker_script(monkeypatch, tmp_path, source)
    pool = GradingPool(1)
    assert pool.grade([("a", "b")] * 3) == [True] * 3
    pool.close()


def test_processes_that_are_always_killed_while_they_start_are_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_script(monkeypatch, tmp_path, f"import os\n{KILLED}\n")
    pool = GradingPool(2)
    with pytest.raises(
        ProxstepError, match="3 in turn, and the last was ended by signal 9"
    ) as error:
        pool.grade([("a", "b")] * 3)
    assert "reinstall" not in str(error.value)
    assert pids(pool) == []


@pytest.mark.slow
def test_processes_are_renewed(monkeypatch: pytest.MonkeyPatch, pool: GradingPool) -> None:
    monkeypatch.setattr(grading_pool, "JOBS_PER_WORKER", 3)
    pool.grade([("2", "2.0")])
    first = pids(pool)
    assert pool.grade([("2", f"{i}.0") for i in range(4)]) == [False, False, True, False]
    assert pids(pool) != first
    assert not is_running(first[0])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os.write(1, b'ENo module named sympy')", "No module named sympy"),
        ("raise SystemExit(1)", "it ended or hung"),
        ("import time; time.sleep(600)", "it ended or hung"),
    ],
)
def test_a_process_that_does_not_start_is_one_message(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_script(monkeypatch, tmp_path, source)
    monkeypatch.setattr(grading_pool, "STARTING_SECONDS", 1.0)
    pool = GradingPool(1)
    with pytest.raises(ProxstepError, match=f"does not start \\({reason}\\)") as error:
        pool.grade([("1", "2")])
    assert "\n" not in str(error.value)
    assert pids(pool) == []


CONFINED = {
    "compile": "compile('1', '<string>', 'eval')",
    "eval": "eval('1+1')",
    "write": "open('{canary}', 'w')",
    "append": "open('{canary}', 'ab')",
    "process": "__import__('subprocess').run(['touch', '{canary}'])",
    "system": "os.system('touch {canary}')",
    "remove": "os.remove('{other}')",
    "connection": "__import__('socket').socket().connect(('127.0.0.1', 9))",
    "memory": "bytearray(2 * 2**30)",
}


LIKE_OTHERS = ("eval", "append", "system", "remove")


@pytest.mark.parametrize("kind", [k if k not in LIKE_OTHERS else slow(k)[0] for k in CONFINED])
def test_a_confined_process_can_do_nothing_else(kind: str, tmp_path: Path) -> None:
    canary, other = tmp_path / "canary", tmp_path / "other"
    other.touch()
    code = CONFINED[kind].replace("{canary}", str(canary)).replace("{other}", str(other))
    source = (
        f"import os, sys; sys.path.insert(0, {str(grading_pool.WORKER.parent)!r}); "
        "import math_verify, socket, subprocess; from grading_worker import _confine; "
        f"code = compile({code!r}, 'given.py', 'exec'); _confine(1024); exec(code); "
        "os.write(1, b'done')"
    )
    done = subprocess.run([sys.executable, "-B", "-c", source], capture_output=True)
    assert done.returncode == (1 if kind == "memory" else 3)
    assert done.stdout == b""
    assert not canary.exists()
    assert other.exists()


def test_numbers_are_read_and_nothing_else() -> None:
    source = (
        f"import sys; sys.path.insert(0, {str(grading_pool.WORKER.parent)!r})\n"
        "from grading_worker import number\n"
        "from sympy import Float, Integer, SympifyError\n"
        "assert number('0180') == Integer(180) and number('18.50') == Float('18.5')\n"
        "for text in ('x', '1+1', '__import__', '', '.', '1.2.3', '1e5', '\\u0663', '-1', '1_0'):\n"
        "    try: number(text)\n"
        "    except SympifyError: pass\n"
        "    else: raise SystemExit(text)\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


def test_many_threads_share_a_pool(pool: GradingPool) -> None:
    found: dict[int, list[bool | None]] = {}

    def ask(number: int) -> None:
        pairs = [(str(number), f"{i}.0") for i in range(20)]
        found[number] = pool.grade(pairs)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [i == number for i in range(20)] for number in range(8)}
    assert len(pids(pool)) == 1


def _ask_shared(answers: list[str]) -> tuple[list[bool | None], list[int]]:
    return shared_pool().grade([("2", answer) for answer in answers]), pids(shared_pool())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_has_a_pool_of_its_own(method: str) -> None:
    results, own = _ask_shared(["2.0"])
    context = multiprocessing.get_context(method)
    with context.Pool(2) as children:  # daemons, which may not have multiprocessing's children
        answers = children.map(_ask_shared, [["2.0", "3.0"], ["3.0", "2.0"]])
    assert results == [True]
    assert [result for result, _ in answers] == [[True, False], [False, True]]
    assert not {pid for _, theirs in answers for pid in theirs} & set(own)
    assert _ask_shared(["2.00"])[0] == [True]
    deadline = time.monotonic() + 20
    while any(is_running(pid) for _, theirs in answers for pid in theirs):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "os._exit(0)", "1 / 0"])
def test_no_process_outlives_the_program(end: str) -> None:
    source = (
        "import os\nfrom proxstep.rewards.grading_pool import shared_pool\n"
        "shared_pool().grade([('2', '2.0')])\n"
        "print(shared_pool()._workers[0].process.pid, flush=True)\n" + end
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)

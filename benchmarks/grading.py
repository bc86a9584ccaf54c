"""Completions graded in a second on one core, by numeric_answer and by math_verify, once warm.

    python benchmarks/grading.py
    python benchmarks/grading.py --data gsm8k_test.jsonl svamp_test.jsonl
    python benchmarks/grading.py --json benchmarks/baselines/grading-cpu.json

Without data, numeric_answer grades solutions of GSM8K's shape that are made here. With it, each
row's own solution (GSM8K) or a sentence with its answer (SVAMP) is graded against its answer.
math_verify grades steps of MATH's shape: 8 completions to a problem, of which 3 are the reference
to the letter, 2 equal in another spelling and 3 wrong, and 6 of 10 problems have a number for an
answer. "undecided" are answers alone, each of them once, half of them wrong, none of which the text
decides: the worst case. Seconds are of processor time, the grading process's included: what
else the machine does is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import stamp

from proxstep.rewards import grading_pool, math_verify, numeric_answer
from proxstep.rewards.equality import decided, spelled
from proxstep.rewards.grading_pool import GradingPool
from proxstep.runs.folder import check_file

Graded = tuple[list[str], list[str]]
"""Completions and their reference answers."""

SHAPES: list[tuple[str, str, str]] = [
    (r"\frac{{{n}\sqrt{{3}}}}{{7}}", r"\frac{{{n}}}{{7}}\sqrt 3", r"\frac{{{n}\sqrt{{5}}}}{{7}}"),
    (r"{n}\pi", r"\pi\cdot {n}", r"{n}\pi^2"),
    (r"x^2+{n}x+1", r"1+{n}x+x^2", r"x^2-{n}x+1"),
    (r"(x+{n})(x-1)", r"(x-1)(x+{n})", r"(x+{n})(x+1)"),
    (r"\{{1,{n},x\}}", r"\{{x,1,{n}\}}", r"\{{1,x\}}"),
    (r"[0,{n}) \cup (2{n},\infty)", r"(2{n},\infty) \cup [0,{n})", r"[0,{n}] \cup (2{n},\infty)"),
    (
        r"\begin{{pmatrix}}{n}\\1\end{{pmatrix}}",
        r"\begin{{bmatrix}}{n}\\1\end{{bmatrix}}",
        r"\begin{{pmatrix}}1\\{n}\end{{pmatrix}}",
    ),
    (r"y={n}x+2", r"y=2+{n}x", r"y={n}x-2"),
    (r"{n}+2i", r"2i+{n}", r"{n}-2i"),
    (r"\sqrt{{{n}+x}}", r"\sqrt{{x+{n}}}", r"\sqrt{{{n}-x}}"),
]
"""A reference answer, an equal one and a wrong one."""


def made_solutions(number: int) -> Graded:
    """Return solutions of GSM8K's shape; every second one is right."""
    steps = "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\n" * 4
    ends = [
        f"She makes 9 * {i} = $<<9*{i}={9 * i}>>{9 * i:,}.\n#### {9 * i}" for i in range(number)
    ]
    return [steps + end for end in ends], [str(9 * i + i % 2) for i in range(number)]


def solutions_of(files: list[Path]) -> Graded:
    """Return what rows of GSM8K or SVAMP hold; the files are read where they are."""
    completions, answers = [], []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "Answer" in row:
                completions.append(f"{row['Body']} So the answer is {row['Answer']}.")
                answers.append(str(row["Answer"]))
            else:
                completions.append(row["answer"])
                answers.append(row["answer"].rpartition("####")[2].strip())
    return completions, answers


def math_pairs(number: int, first: int) -> list[tuple[str, str]]:
    """Return pairs of a reference and an answer that only math-verify can decide."""
    pairs = []
    for i in range(number):
        reference, equal, wrong = SHAPES[i // 2 % len(SHAPES)]
        n = first + i // 2
        answer = wrong if i % 2 else equal
        pairs.append((spelled(reference.format(n=n)), spelled(answer.format(n=n))))
    assert all(decided(*pair) is None for pair in pairs)
    return pairs


def math_step(number: int, first: int) -> Graded:
    """Return completions of so many problems and their reference answers."""
    completions, answers = [], []
    for i in range(number):
        n = first + i
        shape = SHAPES[i % len(SHAPES)] if i % 10 >= 6 else ("{n}", "{n}.0", "-{n}")
        reference, equal, wrong = (text.format(n=n) for text in shape)
        wrongs = [wrong, shape[0].format(n=n + 1), shape[2].format(n=n + 1)]
        boxes = [reference] * 3 + [equal] * 2 + wrongs
        completions += [rf"So it is $\boxed{{{box}}}$." for box in boxes]
        answers += [reference] * len(boxes)
    return completions, answers


def rates(grade: Callable[[], int], seconds: Callable[[], float], repeats: int) -> list[float]:
    """Return the grades in a second of each repeat; the first, not counted, warms up."""
    found = []
    for _ in range(repeats + 1):
        start = seconds()
        number = grade()
        found.append(number / (seconds() - start))
    return found[1:]


def process_seconds(pid: int) -> float:
    """Return the processor time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="JSONL of GSM8K or SVAMP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.json:
        check_file(arguments.json, "--json")
    torch.set_num_threads(1)
    completions, answers = solutions_of(arguments.data) if arguments.data else made_solutions(2_000)

    def grade_numbers() -> int:
        return len(numeric_answer([""] * len(completions), completions, answers))

    found = {"numeric_answer": rates(grade_numbers, time.process_time, arguments.repeats)}
    pool = GradingPool(1)
    pool.grade(math_pairs(20, 11))
    [worker] = pool._workers
    first = itertools.count(1_000, 1_000)  # an answer that was graded before costs nothing

    def seconds() -> float:
        return time.process_time() + process_seconds(worker.process.pid)

    def grade_answers() -> int:
        verdicts = pool.grade(math_pairs(100, next(first)))
        assert verdicts == [True, False] * 50
        return len(verdicts)

    def grade_step() -> int:
        completions, answers = math_step(50, next(first))
        rewards = math_verify([""] * len(completions), completions, answers)
        assert sum(rewards) == 5 / 8 * len(rewards)
        return len(rewards)

    grading_pool._POOLS[os.getpid()] = pool  # one process, where there would be one a core
    found["math_verify"] = rates(grade_step, seconds, arguments.repeats)
    found["math_verify, undecided"] = rates(grade_answers, seconds, arguments.repeats)
    pool.close()
    table = Table("grader", "grades a second, median", "least", "most", "wanted")
    medians = {name: sorted(each)[len(each) // 2] for name, each in found.items()}
    for name, each in found.items():
        wanted = {"numeric_answer": "500", "math_verify": "100"}.get(name, "")
        table.add_row(name, *(f"{x:,.0f}" for x in (medians[name], min(each), max(each))), wanted)
    Console().print(table)
    if arguments.json:
        report = {
            **stamp(),
            "data": [path.name for path in arguments.data],
            "grades_a_second": found,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Rewards for code: the tests of a problem, run against what a model wrote. By request alone.

The one place where a model's output is more than data. How it is confined, and why a policy cannot
forge the verdict, is in `code_sandbox` and `code_worker`; docs/tasks.md says what is promised.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from proxstep.errors import ProxstepError
from proxstep.rewards.code_sandbox import Job, find_sandbox, grade
from proxstep.rewards.functions import MeasuredRewards, text_of

LONGEST_CODE = 50_000  # characters
_FENCE = re.compile(r"^[ \t]{0,3}```+[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
_UNINDENTED = re.compile(r"\n(?=[^\s#)\]}])")


def run_code_tests(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> MeasuredRewards:
    """Run each completion's code in a sandbox; return 1 where all tests of its row pass, else 0.

    Args:
        prompts: B texts or lists of chat messages. A text stands before the completion's code.
        completions: B strings, or B lists of chat messages. What is neither is wrong.
        **columns: The data's columns, of which `problem_of` reads some.

    Returns:
        B rewards, 0.0 or 1.0, and as `ungraded` a 1.0 for each completion whose code went over a
        limit; its reward is 0.

    Raises:
        ProxstepError: A row has no tests, nothing here can confine the code, or a sandbox does not
            start.
    """
    return _rewards(find_sandbox(), prompts, completions, columns)


def run_code_tests_without_sandbox(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> MeasuredRewards:
    """Do what `run_code_tests` does where the code may read every file that you may read.

    On Linux the limits and the list of system calls stay; elsewhere only the limits.

    Args:
        prompts: As in `run_code_tests`.
        completions: As in `run_code_tests`.
        **columns: As in `run_code_tests`.

    Returns:
        As `run_code_tests`.
    """
    return _rewards("none", prompts, completions, columns)


def check_run_code_tests() -> None:
    """Raise where nothing can confine code, before anything is sampled.

    Raises:
        ProxstepError: As `find_sandbox`.
    """
    find_sandbox()


def problem_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Job` that follow from a row's columns.

    Args:
        row: `test`, a Python source with a function check(candidate) or with assertions
            (HumanEval), or `test_list`, several with assertions (MBPP); `entry_point`, the name of
            the function under test, or nothing for every name that only the tests know; sources
            that run before the tests in `test_setup_code`, and several in `test_imports`.

    Raises:
        ProxstepError: There are no tests, or they are no Python, or they test nothing.

    >>> problem_of({"test_list": ["assert f(1) == 2"]})["tests"]
    ('assert f(1) == 2',)
    """
    column = "test" if row.get("test") is not None else "test_list"
    tests = _sources(row, column)
    if not tests:
        raise ProxstepError(
            "there are no tests: run_code_tests needs a column test (Python with a function "
            "check(candidate), as in HumanEval) or test_list (assertions, as in MBPP)"
        )
    entry_point = row.get("entry_point")
    if entry_point is not None and not (
        isinstance(entry_point, str) and entry_point.isidentifier()
    ):
        raise ProxstepError(f"column entry_point is {entry_point!r:.80}; write a function's name")
    trees = [_parsed(source, column) for source in tests]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    if not any(isinstance(node, ast.Assert | ast.Raise) or _asserts(node) for node in nodes):
        raise ProxstepError(f"column {column} asserts nothing: every completion would pass")
    top = [node for tree in trees for node in tree.body]
    has_check = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in top)
    if has_check and entry_point is None:
        raise ProxstepError("column test defines check(candidate): name it in column entry_point")
    setup = (*_sources(row, "test_imports"), *_sources(row, "test_setup_code"))
    for source in setup:
        _parsed(source, "test_imports or test_setup_code")
    return {"tests": tests, "setup": setup, "entry_point": entry_point, "has_check": has_check}


def _sources(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Return a column's Python sources: one text, or a list of them."""
    value = row.get(column)
    sources = [value] if isinstance(value, str) else value or []
    if not isinstance(sources, list | tuple) or not all(isinstance(each, str) for each in sources):
        raise ProxstepError(f"column {column} is a {type(value).__name__}; give texts")
    return tuple(source for source in sources if source.strip())


def _parsed(source: str, column: str) -> ast.Module:
    """Return the syntax tree of a source that the data hold."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ProxstepError(f"column {column} is no Python ({error})") from error


def _asserts(node: ast.AST) -> bool:
    """Whether a node calls something like self.assertEqual or numpy.testing.assert_allclose."""
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(name, str) and name.startswith("assert")


def programs_of(prompt: Any, completion: str) -> tuple[str, ...]:
    r"""Return what the code of a completion may be, likeliest first. Nothing is parsed.

    Args:
        prompt: A text that the completion goes on with; chat messages are not read.
        completion: A model's.

    >>> programs_of([{"role": "user", "content": "f?"}], "So:\n```python\nf = abs\n```\nDone.")
    ('f = abs\n',)
    >>> programs_of("def f(x):\n", "  return x\n\nThis is it.")[1]
    'def f(x):\n  return x\n'
    """
    if len(completion) > LONGEST_CODE:
        return ()
    before = prompt if isinstance(prompt, str) else ""
    block = _last_block(completion)
    if block is not None:
        return tuple(dict.fromkeys((f"{before}\n{block}" if before else block, block)))
    code = before + completion
    first = _UNINDENTED.search(code, len(before))
    cut = code[: first.start()] if first else code
    return tuple(dict.fromkeys((code, cut, completion)))


def _last_block(text: str) -> str | None:
    """Return the last fenced block of Python that is closed; None where no block is."""
    found, start, language = None, None, ""
    for fence in _FENCE.finditer(text):
        if start is None:
            start, language = fence.end() + 1, fence[1].lower()
            continue
        if language in _PYTHON:
            found = text[start : fence.start()]
        start = None
    return found


def _rewards(
    sandbox: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> MeasuredRewards:
    """Grade each different completion of a row once."""
    jobs: list[Job | None] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = {name: values[index] for name, values in columns.items() if name in _COLUMNS}
        try:
            problem = problem_of(row)
        except ProxstepError as error:
            raise ProxstepError(f"run_code_tests: row {index}: {error}") from None
        programs = programs_of(prompt, text_of(completion))
        names_it = problem["entry_point"] is not None and isinstance(prompt, str)
        job = Job(programs, prompt=prompt if names_it else None, **problem)
        jobs.append(job if any(program.strip() for program in programs) else None)
    asked = list(dict.fromkeys(job for job in jobs if job is not None))
    verdicts = dict(zip(asked, grade(asked, sandbox), strict=True))
    found = [False if job is None else verdicts[job] for job in jobs]
    return MeasuredRewards(
        [float(verdict is True) for verdict in found],
        {"ungraded": [float(verdict is None) for verdict in found]},
    )


CODE_REWARDS = ("run_code_tests", "run_code_tests_without_sandbox")
"""The rewards that run a completion as code."""
_COLUMNS = ("test", "test_list", "entry_point", "test_setup_code", "test_imports")

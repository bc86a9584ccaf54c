"""The code reward on three problems, in HumanEval's and in MBPP's columns, in every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.engine import tiny_recipe

import proxstep.rewards
from proxstep.engines.trl.translation import _reward
from proxstep.engines.verl.compute_score import compute_score
from proxstep.errors import ProxstepError
from proxstep.rewards import (
    BUILTIN_REWARDS,
    check_rewards,
    code_sandbox,
    load_reward,
    reward_columns,
    run_code_tests,
    run_code_tests_without_sandbox,
    score_completions,
)
from proxstep.rewards.code_sandbox import Job, SandboxError, find_sandbox, grade, run
from proxstep.tasks.base import REWARDS
from proxstep.tasks.tabular import table_task
from proxstep.training import lifecycle
from proxstep.training.prompts import load_rewards

PROBLEMS = Path(__file__).with_name("code_problems.jsonl")


def _name() -> str:
    """The reward that can be used here; what it refuses is in tests/trust."""
    try:
        find_sandbox()
    except ProxstepError:
        return "run_code_tests_without_sandbox"
    return "run_code_tests"


NAME = _name()
SANDBOX = find_sandbox() if NAME == "run_code_tests" else "none"


def graded(completion: Any, prompt: Any = "", **columns: Any) -> float:
    given = {name: [value] for name, value in columns.items()}
    return BUILTIN_REWARDS[NAME]([prompt], [completion], **given)[0]


def passes(code: str, *tests: str, **fields: Any) -> bool | None:
    return run(Job((code,), tests, **fields), SANDBOX)


def examples() -> Any:
    task = table_task(
        PROBLEMS, PROBLEMS, answer_column="canonical_solution", rewards=("run_code_tests",)
    )
    return task.train


def test_the_three_problems() -> None:
    rows = examples()
    prompts = [row.prompt for row in rows]
    right = [row.answer for row in rows]
    # Outer white space is not part of an answer: the indentation comes back here.
    right = [f"    {text}" if "```" not in text else text for text in right]
    wrong = ["    return 2\n", "    return text\n", "```python\ndef shared(a, b): return a\n```"]
    columns = reward_columns(rows)
    function = load_reward(NAME)
    check_rewards([function], [1.0], columns)
    table = score_completions(
        [function], [1.0], prompts * 2, right + wrong, {k: v * 2 for k, v in columns.items()}
    )
    assert table.total == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert table.per_function[f"{NAME}/ungraded"] == [0.0] * 6


def test_a_recipe_asks_for_it_in_the_local_engine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = tiny_recipe(
        folder,
        "reinforce",
        model={"name": "a-model"},
        task={
            "name": "table",
            "train": str(PROBLEMS),
            "validation": str(PROBLEMS),
            "answer_column": "canonical_solution",
            "rewards": [NAME],
        },
    )
    task = lifecycle.load_task(recipe, chat=False)
    functions, weights = load_rewards(recipe, task)
    columns = reward_columns(task.train[2:])
    prompts = [task.train[2].prompt]
    found = score_completions(functions, weights, prompts, [task.train[2].answer], columns)
    assert found.per_function[NAME] == [1.0]


def test_no_task_asks_for_it_by_itself() -> None:
    assert not any("run_code" in name for names in REWARDS.values() for name in names)


def test_in_trl_and_in_verl() -> None:
    named = _reward(NAME, 64)
    assert getattr(proxstep.rewards, named.name) is BUILTIN_REWARDS[NAME]
    row = examples()[2]
    example = json.dumps({"prompt": row.prompt, "columns": row.columns})
    for completion, score in ((row.answer, 1.0), ("```python\nshared = max\n```", 0.0)):
        found = compute_score("", completion, "", {"example": example}, [NAME], [1.0])
        assert found["score"] == score


@pytest.mark.parametrize(
    "completion",
    [
        "def f(x):\n    return x + 1",
        "Here:\n```python\ndef f(x):\n    return x + 1\n```",
        "```\ndef f(x):\n    return x + 1\n```\nand a call:\n```text\nf(1)\n```",
        "```py\nf = None\n```\nNo:\n```Python\ndef f(x):\n    return x + 1\n```\nDone. ```python",
        "def f(x):\n    return x + 1\n\nThis function returns x + 1.",
        [{"role": "assistant", "content": "```python\nf = (1).__add__\n```"}],
    ],
)
def test_where_the_code_is(completion: Any) -> None:
    assert graded(completion, test_list=["assert f(1) == 2"]) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I do not know.",
        "```python\ndef f(x):\n    return x + 1",
        "```python\ndef f(x):\n    return x + 1\n```\n```python\nf = None\n```",
        "```bash\ndef f(x):\n    return x + 1\n```",
        "def f(x):\n    return x + 1\n" + "#" * 50_000,
        None,
        7,
        [],
        [{"role": "assistant"}],
        "\x00",
        "def f(x:\n",
        "(" * 20_000,
        "-" * 20_000 + "1",
    ],
)
def test_where_there_is_none(completion: Any) -> None:
    assert graded(completion, test_list=["assert f(1) == 2"]) == 0.0


def test_a_prompt_stands_before_the_code() -> None:
    prompt = "import math\n\ndef f(x):\n    "
    test = "def check(candidate):\n    assert candidate(4) == 2"
    columns = {"test": test, "entry_point": "f"}
    assert graded("return math.isqrt(x)", prompt, **columns) == 1.0
    assert (
        graded("```python\ndef f(x):\n    return math.isqrt(x)\n```", "import math", **columns) == 1
    )
    assert graded("return math.isqrt(x)", [{"role": "user", "content": prompt}], **columns) == 0.0


def test_what_the_tests_use_of_the_prompt_is_not_the_code_s_own() -> None:
    prompt = "def poly(a, x):\n    return a * x - 6\n\ndef zero(a):\n    "
    columns = {"entry_point": "zero"}
    columns["test"] = "def check(candidate):\n    assert poly(3, candidate(3)) == 0"
    assert graded("return 6 / a", prompt, **columns) == 1.0
    assert graded("return 1\n\ndef poly(a, x):\n    return 0", prompt, **columns) == 0.0


DATA = [
    "None",
    "True",
    "-7",
    "10**30",
    "2.5",
    "float('inf')",
    "1j",
    "'text \\ud800'",
    "b'\\x00'",
    "[]",
    "(1,)",
    "{1: (2, [3])}",
    "{1, 2}",
    "frozenset({1})",
    "[[1, 2], ['a']]",
]


@pytest.mark.parametrize("value", DATA)
def test_data_goes_there_and_back(value: str) -> None:
    tests = (f"assert f({value}) == {value}", f"assert type(f({value})) is type({value})")
    assert passes("def f(x): return x", *tests) is True
    assert passes("def f(x): return [x]", *tests) is False


def test_types_count_and_subclasses_become_what_they_are_of() -> None:
    code = "from collections import Counter, namedtuple\nP = namedtuple('P', 'x')\n"
    assert passes(f"{code}def f(): return Counter('aab')", "assert f() == {'a': 2, 'b': 1}") is True
    assert passes(f"{code}def f(): return P(1)", "assert f() == (1,)") is True
    assert passes("def f(): return (1, 2)", "assert f() == [1, 2]") is False
    assert passes("def f(): return range(2)", "assert f() == [0, 1]") is False
    assert passes("def f(): return range(2)", "assert list(f()) == [0, 1]") is True
    assert passes("def f(): return object()", "assert f() is not None") is False
    assert passes("def f(): return f", "assert f() is not None") is False


def test_an_error_that_the_tests_expect() -> None:
    test = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"
    assert passes("def f(x): return 1 / x", test) is True
    assert passes("def f(x): return 1", test) is False
    assert passes("def f(x): raise SystemExit", test) is False
    assert (
        passes("class ZeroDivisionError(Exception): pass\ndef f(x): raise MemoryError", test)
        is False
    )


def test_tests_that_never_call_the_code_pass_nothing() -> None:
    assert passes("def f(): return 1", "assert True") is False
    assert passes("def f(): return 1", "import sys\nsys.exit(0)\nassert f() == 1") is False


def test_every_run_gives_the_same() -> None:
    code = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd'})]"
    assert passes(code, "import random", "assert f()[0] == random.Random(0).random()") is True
    tests = "assert ''.join(f()[1]) == ''.join({'a', 'b', 'c', 'd'})"
    assert passes(code, tests) is True


def test_what_takes_too_long_is_not_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\ndef f(): time.sleep(60)"
    job = Job((code,), ("assert f() is None",))
    assert run(job, SANDBOX, wall_seconds=2.0) is None
    monkeypatch.setattr(code_sandbox, "run", lambda job, sandbox: None)
    rewards = BUILTIN_REWARDS[NAME]([""], [code], test_list=[["assert f() is None"]])
    assert rewards == [0.0]
    assert rewards.measured == {"ungraded": [1.0]}


def test_the_same_code_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(code_sandbox, "run", lambda job, sandbox: ran.append(job) or True)
    rewards = BUILTIN_REWARDS[NAME](["", ""], ["f = 1", "f = 1"], test_list=[["assert f()"]] * 2)
    assert rewards == [1.0, 1.0]
    assert len(ran) == 1


def test_a_sandbox_that_does_not_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    job, failures = Job(("f = 1",), ("assert f()",)), []

    def fails(times: int) -> None:
        def attempt(job: Job, sandbox: str) -> bool:
            failures.append(1)
            if len(failures) <= times:
                raise SandboxError("no memory")
            return True

        failures.clear()
        monkeypatch.setattr(code_sandbox, "run", attempt)

    fails(2)
    assert grade([job], SANDBOX) == [True]
    fails(9)
    with pytest.raises(ProxstepError, match=r"does not start \(no memory\), 3 times"):
        grade([job], SANDBOX)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "there are no tests"),
        ({"test_list": []}, "there are no tests"),
        ({"test": "  "}, "there are no tests"),
        ({"test": "def check(c): pass", "entry_point": "f"}, "column test asserts nothing"),
        ({"test_list": ["f(1)"]}, "column test_list asserts nothing"),
        ({"test_list": ["assert f(1) ="]}, "column test_list is no Python"),
        ({"test_list": 7}, "column test_list is a int"),
        ({"test_list": [7]}, "column test_list is a list"),
        ({"test": "def check(c): assert c()"}, "name it in column entry_point"),
        ({"test": "assert f()", "entry_point": "f()"}, "column entry_point is 'f()'"),
        ({"test": "assert f()", "test_setup_code": "x ="}, "is no Python"),
    ],
)
def test_a_row_that_tests_nothing_is_an_error_with_its_line(
    columns: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "f?", "answer": "x", **columns}))
    with pytest.raises(ProxstepError) as error:
        table_task(file, file, rewards=("run_code_tests",))
    assert f"{file}, line 1: " in str(error.value)
    assert words in str(error.value)
    with pytest.raises(ProxstepError) as error:
        graded("f = 1", **columns)
    assert words in str(error.value)


def test_both_names_do_the_same_where_both_may() -> None:
    columns = {"test_list": [["assert f() == 1"]]}
    for function in {run_code_tests_without_sandbox, BUILTIN_REWARDS[NAME]}:
        assert function([""], ["def f(): return 1"], **columns) == [1.0]
    if NAME == "run_code_tests":
        assert run_code_tests([""], ["def f(): return 2"], **columns) == [0.0]

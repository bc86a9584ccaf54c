from __future__ import annotations

import functools
import pickle
import subprocess
import sys

import pytest

import proxstep
from proxstep.errors import ProxstepError
from proxstep.rewards import BUILTIN_REWARDS, load_reward, numeric_answer, reward_name

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

NOT_A_FUNCTION = 3
executed = []
executed.append(1)

@dataclass
class Bonus:
    size: float = 0.5

def short(prompts, completions, **columns):
    return [Bonus().size if len(c) < 5 else None for c in completions]

def long(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_builtins_by_name():
    assert load_reward("numeric_answer") is numeric_answer
    for name, function in BUILTIN_REWARDS.items():
        assert load_reward(name) is function
        assert reward_name(function) == name


def test_function_from_a_file(source):
    short = load_reward(f"{source}:short")
    assert reward_name(short) == "short"
    assert short(prompts=["", ""], completions=["1", "12345"], answer=["", ""]) == [0.5, None]
    assert pickle.loads(pickle.dumps(short)) is short


def test_function_from_a_relative_path(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert load_reward("my_rewards.py:long")([""], ["abc"]) == [3.0]


def test_a_file_is_executed_once(source):
    short, long = load_reward(f"{source}:short"), load_reward(f"{source}:long")
    assert short.__globals__ is long.__globals__
    assert short.__globals__["executed"] == [1]


def test_files_of_the_same_name_are_different_modules(source, tmp_path):
    other = tmp_path / "other" / source.name
    other.parent.mkdir()
    other.write_text("def short(prompts, completions, **columns): return [9.0]")
    assert load_reward(f"{source}:short")([""], ["1"]) == [0.5]
    assert load_reward(f"{other}:short")([""], ["1"]) == [9.0]


def test_a_corrected_file_can_be_loaded(source):
    source.write_text("def short(: pass")
    with pytest.raises(ProxstepError, match="correct that file"):
        load_reward(f"{source}:short")
    source.write_text(SOURCE)
    assert load_reward(f"{source}:short")([""], ["1"]) == [0.5]


def test_function_from_a_package():
    assert load_reward("proxstep.rewards.functions:numeric_answer") is numeric_answer


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numeric_anwser", "did you mean numeric_answer"),
        ("nothing_alike", "use one of numeric_answer, exact_match"),
        ("", "is unknown"),
        (":short", "incomplete"),
        ("{source}:", "incomplete"),
        ("{source}:shrot", "no function 'shrot'; did you mean short"),
        ("{source}:NOT_A_FUNCTION", "is a int"),
        ("{source}x.py:short", "does not exist"),
        ("no_such_package_xyz:f", "cannot import 'no_such_package_xyz'"),
        ("proxstep.no_such_module:f", "cannot import"),
        ("proxstep.rewards:no_such_function", "no function 'no_such_function'"),
        (".relative:f", "not a module's name"),
        ("folder/file:f", "a file's name ends in .py"),
    ],
)
def test_mistakes(spec, message, source):
    with pytest.raises(ProxstepError, match=message) as error:
        load_reward(spec.replace("{source}", str(source)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("body", ["def short(: pass", "import no_such_package_xyz"])
def test_a_file_that_cannot_be_imported(body, source):
    source.write_text(body)
    with pytest.raises(ProxstepError, match=r"cannot import .*my_rewards\.py"):
        load_reward(f"{source}:short")


@pytest.mark.parametrize(
    ("body", "raised"),
    [
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("import json\njson.loads('')", "JSONDecodeError: Expecting value: line 1 column 1"),
    ],
)
def test_what_a_file_does_when_it_is_imported_is_named_with_its_line(
    body, raised, source, monkeypatch
):
    source.write_text(body)
    monkeypatch.syspath_prepend(source.parent)
    for spec, culprit in ((f"{source}:f", "file"), (f"{source.stem}:f", "module")):
        with pytest.raises(ProxstepError, match=f"importing .* raised {raised}.*line") as error:
            load_reward(spec)
        assert str(error.value).endswith(f"; correct that {culprit}")
    with pytest.raises(ProxstepError, match=r"my_rewards\.py, line 2\)"):
        load_reward(f"{source}:f")


def test_name_of_a_callable_object():
    class LengthReward:
        def __call__(self, prompts, completions, **columns):
            return [0.0] * len(completions)

    assert reward_name(LengthReward()) == "LengthReward"
    assert reward_name(functools.partial(numeric_answer, [])) == "partial"


def test_rewards_and_tasks_need_the_standard_library_only():
    """The package's own __init__ is left out: what it imports is its own affair."""
    code = (
        "import sys, types; package = types.ModuleType('proxstep'); "
        f"package.__path__ = {list(proxstep.__path__)!r}; sys.modules['proxstep'] = package; "
        "before = set(sys.modules); import proxstep.rewards, proxstep.tasks; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert new <= set(sys.stdlib_module_names) | {'proxstep'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from proxstep.errors import ProxstepError
from proxstep.rewards import completion_text, exact_match, numeric_answer

DATA = Path(os.environ.get("PROXSTEP_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def read(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is absent; set PROXSTEP_DATA to the folder of the data sets")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def accepted(completions, answers):
    return sum(numeric_answer([None] * len(completions), completions, answers))


@pytest.mark.parametrize(("name", "rows"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_every_gsm8k_solution(name, rows):
    solutions = [row["answer"] for row in read(f"{name}.jsonl")]
    # Independent of the grader: GSM8K's answers are integers, some with thousands commas.
    answers = [int(solution.split("#### ")[1].replace(",", "")) for solution in solutions]
    assert accepted(solutions, solutions) == rows
    assert accepted(solutions, answers) == rows
    assert accepted([f"#### {answer:,}" for answer in answers], solutions) == rows
    for change in (1, -1):
        changed = [answer + change for answer in answers]
        assert len(changed) == rows
        assert accepted(solutions, changed) == 0
        assert accepted([f"#### {answer}" for answer in changed], solutions) == 0


def test_every_svamp_answer():
    answers = [row["Answer"] for row in read("svamp_test.jsonl")]
    completions = [f"The answer is {answer:.0f}." for answer in answers]
    assert accepted(completions, answers) == 1000
    assert accepted(completions, [str(answer) for answer in answers]) == 1000
    for change in (1, -1):
        assert accepted(completions, [answer + change for answer in answers]) == 0


def test_numeric_answer_of_each_type_of_reference():
    references = [18, 18.0, "18", "$18.00", "9 * 2 = <<9*2=18>>18\n#### 18"]
    completions = ["so 18"] * 5
    assert numeric_answer([""] * 5, completions, references, level=[1] * 5) == [1.0] * 5
    assert numeric_answer([""] * 5, ["so 19"] * 5, references) == [0.0] * 5


def test_a_decimal_reference_is_exact():
    assert numeric_answer([""] * 2, ["0.1", "1/10"], [0.1, 0.1]) == [1.0, 1.0]


def test_a_completion_without_a_number_scores_zero():
    assert numeric_answer([""] * 2, ["none", ""], [0, 0]) == [0.0, 0.0]


def test_a_completion_is_not_evaluated():
    assert numeric_answer([""], ["9 * 2"], ["18"]) == [0.0]


@pytest.mark.parametrize("reference", ["eighteen", "", None, float("nan"), "1/0"])
def test_a_reference_without_a_number_is_an_error(reference):
    with pytest.raises(ProxstepError, match=r"index 1\) holds no number"):
        numeric_answer(["", ""], ["1", "2"], ["1", reference])


@pytest.mark.parametrize("function", [numeric_answer, exact_match])
def test_length_of_answers(function):
    with pytest.raises(ProxstepError, match=f"{function.__name__}: 2 completions but 1 answers"):
        function(["", ""], ["1", "2"], ["1"])


def test_exact_match_strips_and_nothing_else():
    completions = ["579", " 579\n", "579.0", "=579", "0579", ""]
    assert exact_match([""] * 6, completions, ["579"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert exact_match([""], ["-333"], [-333]) == [1.0]


def test_conversational_completions():
    chat = [{"role": "assistant", "content": "5"}, {"role": "assistant", "content": "#### 18"}]
    assert numeric_answer([""], [chat], ["18"]) == [1.0]
    assert exact_match([""], [chat[:1]], ["5"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("18", "18"),
        ([], ""),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "1"}, {"text": "8"}]}], "18"),
        (
            [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "8"}]}],
            "8",
        ),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text

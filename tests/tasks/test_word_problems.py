from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.tasks.overlap import num_overlapping

from proxstep.errors import ProxstepError
from proxstep.rewards import numeric_answer, reward_columns
from proxstep.tasks import STEP_BY_STEP, gsm8k_task, svamp_task
from proxstep.tasks.data import Row

DATA = Path(os.environ.get("PROXSTEP_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
GSM8K = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
SVAMP = {"Body": "Ann has 3 pens.", "Question": "How many pens?", "Answer": 3.0, "ID": "chal-1"}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def data(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is absent; set PROXSTEP_DATA to the folder of the data sets")
    return path


def fails(message, function, *arguments, **keywords):
    with pytest.raises(ProxstepError, match=message) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)


def test_gsm8k_plain(write):
    [example] = gsm8k_task(write([GSM8K]), write([GSM8K])).train
    assert example.prompt == (
        "Question: Two and two? Let's think step by step and output the final answer "
        'after "####".\nAnswer:'
    )
    assert example.answer == "4"
    assert example.solution == " 2 + 2 = <<2+2=4>>4\n#### 4"
    assert example.columns == {}


def test_gsm8k_chat(write):
    [example] = gsm8k_task(write([GSM8K]), write([GSM8K]), chat=True).train
    assert example.prompt == [{"role": "user", "content": "Two and two?" + STEP_BY_STEP}]
    assert example.solution == GSM8K["answer"]


def test_no_instruction(write):
    path = write([GSM8K])
    assert gsm8k_task(path, path, instruction="").train[0].prompt == (
        "Question: Two and two?\nAnswer:"
    )


def test_svamp(write):
    path = write([SVAMP])
    [example] = svamp_task(path, path).train
    assert example.prompt == f"Question: Ann has 3 pens. How many pens?{STEP_BY_STEP}\nAnswer:"
    assert (example.answer, example.solution) == ("3", None)
    assert example.columns == {"ID": "chal-1"}
    [example] = svamp_task(path, path, chat=True, instruction="").train
    assert example.prompt == [{"role": "user", "content": "Ann has 3 pens. How many pens?"}]


def test_svamp_of_the_hub_has_text_answers(write):
    path = write([{**SVAMP, "Answer": "3"}])
    assert svamp_task(path, path).train[0].answer == "3"


@pytest.mark.parametrize(
    ("function", "row", "message"),
    [
        (gsm8k_task, {**GSM8K, "answer": "4"}, "column 'answer' has no \"####\""),
        (gsm8k_task, {**GSM8K, "answer": "It is 4\n#### four"}, "'four' holds no number"),
        (gsm8k_task, {**GSM8K, "question": ""}, "column 'question' is empty"),
        (gsm8k_task, SVAMP, "no column 'answer'; did you mean Answer"),
        (svamp_task, {**SVAMP, "Answer": "three"}, "'three' holds no number"),
        (svamp_task, GSM8K, "no column 'Body'"),
    ],
)
def test_a_wrong_word_problem_is_named(write, function, row, message):
    path = write([row])
    fails(rf"train\.jsonl, line 1: .*{message}", function, path, path)


@pytest.mark.parametrize(
    ("function", "row", "hub"),
    [(gsm8k_task, GSM8K, ("openai/gsm8k", "main")), (svamp_task, SVAMP, ("ChilleD/SVAMP", None))],
)
def test_the_hub_is_asked_where_no_source_is_given(write, monkeypatch, function, row, hub):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return [Row("row 1", row)]

    monkeypatch.setattr("proxstep.tasks.data.load_hub_rows", load)
    function()
    assert asked == [(*hub, "train"), (*hub, "test")]
    asked.clear()
    local = write([row, row, row])
    assert len(function(local, num_validation=1).train) == 2
    function(local, local)
    assert asked == []
    function(None, local)
    assert asked == [(*hub, "train")]
    asked.clear()
    function("my/copy", local)
    assert asked == [("my/copy", None, "train")]


@pytest.mark.parametrize("chat", [False, True])
def test_the_real_gsm8k(chat):
    task = gsm8k_task(data("gsm8k_train.jsonl"), data("gsm8k_test.jsonl"), chat=chat)
    assert (len(task.train), len(task.validation)) == (7473, 1319)
    assert num_overlapping(task) == 0
    for examples in (task.train, task.validation):
        prompts = [example.prompt for example in examples]
        solutions = [example.solution for example in examples]
        assert sum(numeric_answer(prompts, solutions, **reward_columns(examples))) == len(examples)


def test_the_real_svamp():
    task = svamp_task(data("svamp_test.jsonl"), num_validation=200)
    assert (len(task.train), len(task.validation)) == (800, 200)
    assert task.train[0].answer == "145"
    assert set(task.train[0].columns) == {"Equation", "Type", "ID", "idx"}
    assert all(example.answer.isdigit() for example in [*task.train, *task.validation])

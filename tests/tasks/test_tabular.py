from __future__ import annotations

import json
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet
from tests.tasks.overlap import num_overlapping

from proxstep.errors import ProxstepError
from proxstep.tasks import table_task
from proxstep.tasks.data import Row
from proxstep.tasks.tabular import DEFAULT_HELD_OUT

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4?"}]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def numbered(count, first=0):
    return [{"prompt": f"{i}+0=", "answer": i} for i in range(first, first + count)]


def answers(examples):
    return [int(example.answer) for example in examples]


def fails(message, function, *arguments, **keywords):
    with pytest.raises(ProxstepError, match=message) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)


def test_table_with_named_columns(write):
    row = {"q": "1+1=", "a": "2", "worked": "1+1=2", "level": 1, "tags": ["x"]}
    task = table_task(
        write([row]),
        write([row], "validation.jsonl"),
        prompt_column="q",
        answer_column="a",
        solution_column="worked",
    )
    [example] = task.train
    assert (example.prompt, example.answer, example.solution) == ("1+1=", "2", "1+1=2")
    assert example.columns == {"level": 1, "tags": ["x"]}
    assert task.validation == task.train
    assert (task.name, task.rewards) == ("table", ("numeric_answer",))
    assert num_overlapping(task) == 1


def test_every_example_has_the_columns_of_all(write):
    train = [{**row, "hint": "h"} if i else row for i, row in enumerate(numbered(3))]
    validation = [{**row, "level": 1} for row in numbered(1, 5)]
    task = table_task(write(train), write(validation, "validation.jsonl"))
    assert [example.columns for example in (*task.train, *task.validation)] == [
        {"hint": None, "level": None},
        {"hint": "h", "level": None},
        {"hint": "h", "level": None},
        {"hint": None, "level": 1},
    ]


def test_chat_prompts(write):
    rows = [{"prompt": CHAT, "answer": "7"}]
    assert table_task(write(rows), write(rows)).train[0].prompt == CHAT


def test_chat_prompts_from_parquet_without_the_fields_of_other_messages(tmp_path):
    path = tmp_path / "train.parquet"
    messages = [{**message, "name": None} for message in CHAT]
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": messages, "answer": 7}]), path)
    assert table_task(path, path).train[0].prompt == CHAT


@pytest.mark.parametrize(
    ("answer", "text"),
    [(" 7 ", "7"), (7, "7"), (7.0, "7"), (-0.5, "-0.5"), (1e20, str(10**20)), ("7 pens", "7 pens")],
)
def test_answers_become_text(write, answer, text):
    path = write([{"prompt": "?", "answer": answer}])
    assert table_task(path, path).train[0].answer == text


def test_last_rows_are_held_out(write):
    task = table_task(write(numbered(10)), num_validation=3)
    assert answers(task.train) == [0, 1, 2, 3, 4, 5, 6]
    assert answers(task.validation) == [7, 8, 9]
    task = table_task(write(numbered(10)), num_validation=3, num_train=2)
    assert answers(task.train) == [0, 1]
    assert answers(task.validation) == [7, 8, 9]
    task = table_task(write(numbered(300)))
    assert (len(task.train), len(task.validation)) == (44, 256)
    assert num_overlapping(task) == 0


def test_limits_take_the_first_rows(write):
    paths = write(numbered(10)), write(numbered(5, first=100), "validation.jsonl")
    task = table_task(*paths)
    assert (len(task.train), len(task.validation)) == (10, 5)
    task = table_task(*paths, num_train=2, num_validation=3)
    assert (answers(task.train), answers(task.validation)) == ([0, 1], [100, 101, 102])
    task = table_task(*paths, num_train=99, num_validation=99)
    assert (len(task.train), len(task.validation)) == (10, 5)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_validation": 10}, "10 validation rows cannot be held out of 10 .*num_validation"),
        ({}, "256 validation rows cannot be held out of 10"),
        ({"num_validation": 0}, "num_validation is 0; give at least 1"),
        ({"num_train": 0, "num_validation": 1}, "num_train is 0; give at least 1"),
        ({"num_train": -1, "num_validation": 1}, "num_train is -1"),
    ],
)
def test_impossible_limits(write, limits, message):
    fails(message, table_task, write(numbered(10)), **limits)


def test_any_answer_is_good_without_the_numeric_reward(write):
    path = write([{"prompt": "?", "answer": "yes"}])
    assert table_task(path, path, rewards=("exact_match",)).train[0].answer == "yes"


GOOD = {"prompt": "?", "answer": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "?", "answer": 1}, "no column 'prompt'; did you mean promt.* promt, answer"),
        ({"prompt": "?"}, "there is no column 'answer'; name one of its columns: prompt"),
        ({}, "there is no column 'prompt'; name one of its columns: none"),
        ({**GOOD, "prompt": ""}, "column 'prompt' is empty"),
        ({**GOOD, "prompt": " \n"}, "column 'prompt' is empty"),
        ({**GOOD, "prompt": None}, "column 'prompt' is missing"),
        ({**GOOD, "prompt": 3}, "column 'prompt' is a int; give a text"),
        ({**GOOD, "prompt": {"role": "user"}}, "column 'prompt' is a dict"),
        ({**GOOD, "prompt": []}, "column 'prompt' has no messages"),
        ({**GOOD, "prompt": ["hi"]}, "column 'prompt', message 1 is a str"),
        ({**GOOD, "prompt": [CHAT[0], {"content": "x"}]}, 'message 2: "role" is missing'),
        ({**GOOD, "prompt": [{"role": "user"}]}, 'message 1: "content" is missing'),
        ({**GOOD, "prompt": [{"role": "user", "content": " "}]}, 'message 1: "content" is empty'),
        ({**GOOD, "prompt": [{"role": "user", "content": ["x"]}]}, '"content" is a list'),
        ({**GOOD, "prompt": [{**CHAT[0], "tool_calls": []}]}, "message 1 has 'tool_calls'"),
        ({**GOOD, "answer": ""}, "column 'answer' is empty"),
        ({**GOOD, "answer": None}, "column 'answer' is missing"),
        ({**GOOD, "answer": True}, "column 'answer' is a bool"),
        ({**GOOD, "answer": [1]}, "column 'answer' is a list"),
        ({**GOOD, "answer": float("nan")}, "column 'answer' is a float"),
        ({**GOOD, "answer": "yes"}, "the answer 'yes' holds no number"),
        ({**GOOD, "completions": 1}, "column 'completions' has the name of an argument"),
    ],
)
def test_a_wrong_row_is_named(write, row, message):
    good = write([GOOD], "good.jsonl")
    bad = write([GOOD, row])
    fails(rf"train\.jsonl, line 2: .*{message}", table_task, bad, good)
    fails(rf"train\.jsonl, line 2: .*{message}", table_task, good, bad)


def test_a_wrong_solution_is_named(write):
    path = write([{**GOOD, "worked": None}])
    fails("line 1: column 'worked' is missing", table_task, path, path, solution_column="worked")


def test_a_column_answer_beside_the_answers_is_left_out(write):
    path = write([{"prompt": "?", "answer": "long", "final": 1, "level": 2}])
    [example] = table_task(path, path, answer_column="final").train
    assert (example.answer, example.columns) == ("1", {"level": 2})
    task = table_task(path, path, answer_column="final", solution_column="answer")
    assert (task.train[0].answer, task.train[0].solution) == ("1", "long")


VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "user", "content": "2+2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0, "split": "train", "answer": "2+2 is 4"},
}


def test_the_parquet_of_verl(tmp_path):
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([VERL, VERL]), path)
    task = table_task(
        path,
        path,
        answer_column="reward_model.ground_truth",
        solution_column="extra_info.answer",
    )
    example = task.train[1]
    assert example.prompt == VERL["prompt"]
    assert (example.answer, example.solution) == ("4", "2+2 is 4")
    assert set(example.columns) == {"data_source", "ability", "reward_model", "extra_info"}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("reward_model.ground_thruth", "did you mean ground_truth.* in reward_model: style, gro"),
        ("reward_modl.ground_truth", "did you mean reward_model.*name one of its columns: data_so"),
        (
            "reward_model.style.x",
            "no column 'reward_model.style.x'; .* in reward_model.style: none",
        ),
        ("reward_model", "column 'reward_model' is a dict"),
    ],
)
def test_a_wrong_nested_column_is_named(write, column, message):
    path = write([VERL])
    fails(rf"line 1: .*{message}", table_task, path, path, answer_column=column)


def test_a_column_with_a_dot_in_its_name(write):
    path = write([{"prompt": "?", "final.answer": 3}])
    assert table_task(path, path, answer_column="final.answer").train[0].answer == "3"


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_answers_of_any_precision_are_as_written(tmp_path, kind):
    import numpy

    written = [0.1, 0.25, -2.5, 3.3, 12.0, 0.3, 1000.0, 0.001]
    values = pyarrow.array(numpy.array(written, kind.to_pandas_dtype()), kind)
    nested = pyarrow.StructArray.from_arrays([values], names=["truth"])
    path = tmp_path / "train.parquet"
    table = pyarrow.table({"prompt": ["?"] * 8, "answer": values, "nested": nested})
    parquet.write_table(table, path)
    expected = ["0.1", "0.25", "-2.5", "3.3", "12", "0.3", "1000", "0.001"]
    for column in ("answer", "nested.truth"):
        examples = table_task(path, path, answer_column=column).train
        assert [example.answer for example in examples] == expected


def test_decimal_answers(tmp_path):
    path = tmp_path / "train.parquet"
    values = [Decimal("0.10"), Decimal("1000.00")]
    parquet.write_table(pyarrow.table({"prompt": ["?", "?"], "answer": values}), path)
    assert [example.answer for example in table_task(path, path).train] == ["0.10", "1000.00"]


@pytest.mark.parametrize(
    "answer", ["2 or 3", "3:30", "[3, 4]", "20 - 11", "5 ft 10 in", "about 5", "9" * 500]
)
def test_an_answer_that_is_not_one_number_is_named_with_its_line(write, answer):
    path = write([GOOD, {**GOOD, "answer": answer}])
    fails("line 2: the answer .* holds no number, or more than one", table_task, path, path)


def test_splits_of_a_folder(tmp_path, monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return [Row("row 1", GOOD)]

    monkeypatch.setattr("proxstep.tasks.data.load_hub_rows", load)
    table_task("a/b", "c/d", config="main", train_split="fit", validation_split="dev")
    assert asked == [("a/b", "main", "fit"), ("c/d", "main", "dev")]


def test_default_validation_is_not_cut_to_the_held_out_number(write):
    path = write(numbered(DEFAULT_HELD_OUT + 10))
    assert len(table_task(path, path).validation) == DEFAULT_HELD_OUT + 10

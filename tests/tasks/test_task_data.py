from __future__ import annotations

import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from proxstep.errors import ProxstepError
from proxstep.tasks import load_hub_rows, load_rows, read_rows

ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "\u00e9t\u00e9 \u2028?", "answer": None}]


@pytest.fixture
def write(tmp_path):
    def write(content, name="train.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fails(message, function, *arguments):
    with pytest.raises(ProxstepError, match=message) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
@pytest.mark.parametrize("reader", [read_rows, load_rows])
def test_jsonl(write, name, reader):
    path = write(lines(), name)
    assert [row.values for row in reader(path)] == ROWS
    assert [row.where for row in reader(str(path))] == [f"{path}, line 1", f"{path}, line 2"]


def test_jsonl_skips_blank_lines_and_still_counts_them(write):
    path = write('\n{"x": 1}\r\n  \n{"x": 2}')
    assert [(row.where, row.values) for row in read_rows(path)] == [
        (f"{path}, line 2", {"x": 1}),
        (f"{path}, line 4", {"x": 2}),
    ]


def test_jsonl_with_a_byte_order_mark(write):
    assert read_rows(write(b"\xef\xbb\xbf" + b'{"x": 1}\n'))[0].values == {"x": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"x": }', r"line 2: not valid JSON \(Expecting value, column 7\)"),
        (b'{"x": 1', "line 2: not valid JSON"),
        (b"[", "line 2: not valid JSON .* one JSON object per line"),
        (b"[1]", "line 2: a JSON list, not an object"),
        (b"3", "line 2: a JSON int, not an object"),
        (b"null", "line 2: a JSON NoneType, not an object"),
        (b'{"x": "\xff"}', "line 2: not readable"),
        (b'{"x": ' + b"9" * 5000 + b"}", "line 2: not readable"),
    ],
)
def test_a_malformed_line_is_named(write, line, message):
    path = write(b'{"x": 1}\n' + line + b'\n{"x": 3}\n')
    fails(rf"train\.jsonl, {message}", read_rows, path)


@pytest.mark.parametrize("reader", [read_rows, load_rows])
@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.parquet"])
def test_missing_file(tmp_path, reader, name):
    fails(f"{name} is not a file; check the path", reader, tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_file(write, content):
    fails("has no rows", read_rows, write(content))


def test_unknown_suffix(write):
    path = write("x,y\n", "train.csv")
    fails(
        r"unknown file type; give a file that ends in \.jsonl, \.json, \.parquet", load_rows, path
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_that_is_one_array(write, indent):
    path = write(json.dumps(ROWS, indent=indent), "train.json")
    assert [row.values for row in load_rows(path)] == ROWS
    assert load_rows(path)[1].where == f"{path}, item 2"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_of_splits(write, indent):
    path = write(json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=indent), "data.json")
    assert [row.values for row in load_rows(path)] == ROWS
    [row] = load_rows(path, split="test")
    assert row == (f"{path}, split 'test', item 1", ROWS[0])
    fails("has no split 'dev'; it has train, test: name one by task.", load_rows, path, None, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"x": 1}, 3]', "item 2: a JSON int, not an object"),
        ('{"train": [{"x": 1}, []]}', "split 'train', item 2: a JSON list, not an object"),
        ('{"train": {"x": [1]}, "test": []}', "split 'train' is a JSON dict; give a list"),
        ("[]", "has no rows"),
        ('[{"x": 1},\n{"x": }]', "line 1: not valid JSON"),
    ],
)
def test_a_malformed_json_document_is_named(write, content, message):
    fails(message, read_rows, write(content, "train.json"))


def test_a_json_file_of_one_row(write):
    row = {"prompt": [{"role": "user", "content": "?"}], "answer": 1}
    path = write(json.dumps(row), "train.json")
    assert read_rows(path) == [(f"{path}, line 1", row)]


@pytest.mark.parametrize("name", ["D.JSONL", "D.Json"])
def test_upper_case_suffixes(write, name):
    assert [row.values for row in load_rows(write(lines(), name))] == ROWS


def test_single_precision_in_every_kind_of_column(tmp_path):
    path = tmp_path / "TRAIN.PARQUET"
    single = pyarrow.float32()
    kinds = {
        "one": (0.1, single),
        "list": ([0.1], pyarrow.list_(single)),
        "large": ([0.1], pyarrow.large_list(single)),
        "fixed": ([0.1, 0.2], pyarrow.list_(single, 2)),
        "map": ([("x", 0.1)], pyarrow.map_(pyarrow.string(), single)),
        "within": (
            {"a": [[0.1]]},
            pyarrow.struct([("a", pyarrow.list_(pyarrow.list_(single, 1)))]),
        ),
    }
    columns = {name: pyarrow.array([value], kind) for name, (value, kind) in kinds.items()}
    parquet.write_table(pyarrow.table(columns), path)
    assert load_rows(path)[0].values == {name: value for name, (value, _) in kinds.items()}


def test_a_row_of_lists_and_objects_is_no_file_of_splits(write):
    row = {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": 1}}
    path = write(json.dumps(row), "train.json")
    assert read_rows(path) == [(f"{path}, line 1", row)]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_key_given_twice_is_refused(write, name):
    fails("an object has the key 'x' twice", read_rows, write('{"x": 1, "y": 2, "x": 3}', name))
    fails("the key 'b' twice", read_rows, write('{"x": {"b": 1, "b": 1}}', name))


def test_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    chat = [{"role": "user", "content": "hi"}]
    parquet.write_table(pyarrow.table({"prompt": [chat, chat], "answer": [1.5, None]}), path)
    rows = load_rows(path)
    assert [row.values for row in rows] == [
        {"prompt": chat, "answer": 1.5},
        {"prompt": chat, "answer": None},
    ]
    assert rows[1].where == f"{path}, row 2"


def test_empty_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"x": pyarrow.array([], pyarrow.int64())}), path)
    fails("has no rows", read_rows, path)


def test_malformed_parquet(write):
    fails("not a readable Parquet file", read_rows, write("PAR1", "train.parquet"))


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_package_that_is_not_installed(package, write, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    source = write("", "train.parquet") if package == "pyarrow" else "some/data"
    fails(r"pip install proxstep\[train\]", load_rows, source)


def test_local_folder(write, datasets):
    folder = write(lines()).parent
    rows = load_rows(folder, split="train")
    assert [row.values for row in rows] == ROWS
    assert rows[1].where == f"data set {str(folder)!r}, split 'train', row 2"


def test_failures_of_a_local_folder(write, datasets, tmp_path):
    folder = str(write(lines()).parent)
    fails("split 'dev' cannot be loaded: Unknown split", load_hub_rows, folder, None, "dev")
    fails("(main).* BuilderConfig 'main' not found", load_hub_rows, folder, "main", "train")
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("")
    fails("scripts are no longer supported", load_hub_rows, str(script), None, "train")
    fails("has no name", load_hub_rows, "", None, "train")


def test_no_such_folder(datasets, tmp_path):
    fails("cannot be loaded: .*give a local", load_rows, tmp_path / "nothing")


def test_malformed_data_of_a_folder(write, datasets, caplog):
    fails("cannot be loaded", load_hub_rows, str(write('{"x":').parent), None, "train")


def test_each_failure_of_the_hub(datasets, monkeypatch):
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    for failure in (
        DatasetNotFoundError("Dataset 'no/such' doesn't exist\non the Hub"),
        DatasetGenerationError("no"),
        ConnectionError("Couldn't reach 'no/such' on the Hub"),
        OfflineModeIsEnabled("offline"),
    ):

        def load(*arguments, failure=failure, **keywords):
            raise failure

        monkeypatch.setattr(datasets, "load_dataset", load)
        fails(
            r"data set 'no/such' \(main\), split 'test' cannot be loaded: .*local \.jsonl",
            load_rows,
            "no/such",
            "main",
            "test",
        )


def test_a_failure_of_another_kind_is_not_hidden(datasets, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        load_rows("some/data")


def test_an_empty_split(datasets, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: [])
    fails("'some/data', split 'train' has no rows", load_rows, "some/data")

"""Recipe files: YAML that is read, refused, and written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.config.recipe_case import write

from proxstep.config.loading import dump_recipe, load_recipe, resolve
from proxstep.errors import ProxstepError


@pytest.mark.parametrize(
    "text", ["1e-5", "4e2", "08", "+.4", "1_0", "5.", ".", "null", "2026-01-01"]
)
def test_text_that_looks_like_something_else_reads_back(tmp_path: Path, text: str) -> None:
    recipe = resolve({"algorithm": "grpo", "output_dir": text}, {}, "test")
    path = write(tmp_path / "r.yaml", dump_recipe(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", ": a recipe is a YAML mapping of keys to values"),
        ("- 1\n- 2\n", ": a recipe is a YAML mapping of keys to values"),
        ("just words\n", ": a recipe is a YAML mapping of keys to values"),
        ("algorithm: grpo\nsteps: [1,\n  2\nseed: 3\n", ", line 4: not valid YAML: "),
        ("algorithm: grpo\n\tsteps: 3\n", ", line 2: not valid YAML: "),
        ("algorithm: grpo\nsteps: *x\n", ", line 2: not valid YAML: found undefined alias 'x'"),
        ("algorithm: !!python/name:os.system\n", ", line 1: not valid YAML: could not determine"),
        ("algorithm: grpo\n---\nseed: 1\n", ", line 2: not valid YAML: but found another document"),
        (b"\x80\x02\xff\xfe\x00", ": not a text file in UTF-8; a recipe is YAML"),
        (b"algorithm: \x00\x01\n", ": not valid YAML: "),
        ("algorithm: grpo\n1: 2\n", ": 1: keys should be strings, got 1"),
        ("algorithm: grpo\nmodel: {2: 3}\n", ": model.2: keys should be strings, got 2"),
        ("algorithm: grpo\nobjective: {3: 4}\n", ": objective.3: keys should be strings, got 3"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = write(tmp_path / "recipe.yaml", content)
    with pytest.raises(ProxstepError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}{complaint}")


@pytest.mark.parametrize(
    "text", ["2024-13-45", "0x_", "!!int x", "9" * 5000, "[" * 1500, "!!float x", "{a: 1, a: 2}"]
)
def test_values_that_yaml_cannot_construct(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", "algorithm: grpo\n")
    with pytest.raises(
        ProxstepError, match=r"^--output_dir: .* is not a valid YAML value: .{,90}$"
    ):
        load_recipe(path, [("output_dir", text)])
    write(path, f"algorithm: grpo\noutput_dir: {text}\n")
    with pytest.raises(ProxstepError, match=rf"^{path}(, line 2)?: not valid YAML: ") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "model: {name: x, name: y}\n"])
def test_a_key_given_twice(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", f"algorithm: grpo\n{text}")
    line = len(text.splitlines()) + 1
    match = rf'^{path}, line {line}: not valid YAML: found duplicate key "(seed|name)"$'
    with pytest.raises(ProxstepError, match=match):
        load_recipe(path)


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as 8, 12:30 as 750 and no as false."""
    path = write(tmp_path / "r.yaml", "algorithm: grpo\nseed: 010\noutput_dir: 12:30\n")
    recipe = load_recipe(path)
    assert (recipe.seed, recipe.output_dir) == (10, "12:30")
    assert load_recipe(path, [("output_dir", "no")]).output_dir == "no"
    with pytest.raises(ProxstepError, match="seed: input should be a valid integer, got '12:30'"):
        load_recipe(path, [("seed", "12:30")])


@pytest.mark.parametrize("text", ["model: &m {lora: *m}\n", "task: &t {rewards: &r [*r]}\n"])
def test_a_value_that_contains_itself_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "r.yaml", f"algorithm: grpo\n{text}")
    with pytest.raises(ProxstepError, match=r"(model\.lora|task\.rewards)"):
        load_recipe(path)


def test_another_version_of_yaml_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "# mine\n%YAML 1.1\n---\nalgorithm: grpo\nseed: 010\n")
    with pytest.raises(ProxstepError, match=r"recipes are YAML 1\.2: remove the line"):
        load_recipe(path)


def test_more_than_anybody_wrote_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = write(tmp_path / "r.yaml", "\n".join(lines))
    with pytest.raises(ProxstepError, match=r"a3\S* has more than 10,000 values"):
        load_recipe(path)
    write(path, "a: " + "[" * 30 + "]" * 30)
    with pytest.raises(ProxstepError, match="more than 20 levels deep"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["missing.yaml", "", "no/such/folder.yaml"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ProxstepError) as caught:
        load_recipe(path)
    what = "no such recipe file" if name else "a folder, not a recipe file"
    assert str(caught.value) == f"{path}: {what}; proxstep recipes lists examples"


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", b"\xef\xbb\xbfalgorithm: grpo\r\nsteps: 3\r\n")
    assert load_recipe(path).steps == 3

"""Every file of a checkpoint, damaged in every way: noticed, or it changes nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import (
    MANIFEST,
    STATE_FILE,
    checkpoints,
    damage,
    latest_checkpoint,
    publish,
)
from proxstep.training import lifecycle
from tests.engine import Silent
from tests.trust.attempts import differences, recipe_in

Damage = tuple[str, Callable[[Path], object]]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, of steps 3 and 4, that should go on to step 6."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    lifecycle.train(recipe_in(folder).model_copy(update={"steps": 4}), Silent())
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("\nsteps: 4\n", "\nsteps: 6\n"))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    lifecycle.train(recipe_in(folder), Silent())
    return folder


def damages(newest: Path, name: str, chance: random.Random, flips: int) -> Iterator[Damage]:
    """Yield what can happen to one file, as its name and what does it."""
    content = (newest / name).read_bytes()
    older = newest.with_name("step-000003")

    def flip(place: int, bit: int) -> Callable[[Path], object]:
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        return lambda path: path.write_bytes(changed)

    for _ in range(flips):
        yield "flip", flip(chance.randrange(len(content)), chance.randrange(8))
    for length in {1, len(content) // 2, len(content) - 1}:
        yield "cut", lambda path, length=length: path.write_bytes(content[:length])
    yield "empty", lambda path: path.write_bytes(b"")
    yield "longer", lambda path: path.write_bytes(content + b"\0")
    yield "delete", lambda path: path.unlink()
    yield "swap with the older checkpoint", lambda path: shutil.copyfile(older / name, path)
    for other in sorted(path.name for path in newest.iterdir()):
        if other != name:
            yield "swap within", lambda path, other=other: _swap(path, path.with_name(other))


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _mend(damaged: Path, saved: Path) -> None:
    for path in saved.iterdir():
        copy = damaged / path.name
        if not copy.exists() or copy.stat().st_mtime_ns != path.stat().st_mtime_ns:
            shutil.copy2(path, copy)


def _same_content(saved: Path, copy: Path) -> bool:
    """Whether what is read from two checkpoints is the same."""
    names = [path.name for path in saved.iterdir()]
    if sorted(path.name for path in copy.iterdir()) != sorted(names):
        return False
    for name in names:
        one, other = (saved / name).read_bytes(), (copy / name).read_bytes()
        if one != other and (name != MANIFEST or json.loads(one) != json.loads(other)):
            return False
    return True


@pytest.mark.parametrize("flips", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_every_damage_to_a_file_is_noticed_or_changes_nothing(
    stopped: Path, tmp_path: Path, flips: int, counted: Callable[..., None]
) -> None:
    chance, tried = random.Random(0), Counter[str]()
    saved = latest_checkpoint(stopped)
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    newest = checkpoints(tmp_path)[-1]
    for name in sorted(path.name for path in saved.iterdir()):
        for kind, harm in damages(saved, name, chance, flips):
            harm(newest / name)
            notes: list[str] = []
            found = latest_checkpoint(tmp_path, notes.append)
            tried[kind] += 1
            if found == newest:
                assert _same_content(saved, newest), (name, kind)
                tried["changes nothing"] += 1
            else:
                assert found.name == "step-000003"
                assert len(notes) == 1
                assert f"{newest} is damaged: " in notes[0]
            _mend(newest, saved)
    harmless = tried.pop("changes nothing", 0)
    counted("damaged files of a checkpoint: silent ones", tried.total() - harmless)
    counted("damaged files of a checkpoint that still say the same", harmless)
    assert tried["flip"] >= 5 * flips


def test_every_bit_of_a_manifest_counts(tmp_path: Path, counted: Callable[..., None]) -> None:
    """A flipped one is noticed, unless the manifest says the same without it."""
    (tmp_path / "checkpoints" / "mine").mkdir(parents=True)
    for name in ("model", STATE_FILE):
        (tmp_path / "checkpoints" / "mine" / name).write_text("whole")
    manifest = publish(tmp_path / "checkpoints" / "mine", tmp_path, step=1, kept=2) / MANIFEST
    content, tried = manifest.read_bytes(), Counter[bool]()
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        manifest.write_bytes(changed)
        noticed = damage(manifest.parent) is not None
        assert noticed or json.loads(bytes(changed)) == json.loads(content), bytes(changed)
        tried[noticed] += 1
    counted("flipped bits of a manifest: silent ones", tried.total())


@pytest.mark.parametrize("name", ["model.safetensors", STATE_FILE, MANIFEST, "tokenizer.json"])
def test_the_run_goes_on_from_the_one_before_to_the_bit(
    stopped: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    newest = latest_checkpoint(folder)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    progress = Silent()
    assert lifecycle.resume(folder, progress) == "finished"
    assert any(f"{newest} is damaged: " in note for note in progress.notes)
    assert differences(whole, folder) == []


def test_where_both_are_damaged_both_are_named(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for saved in checkpoints(folder):
        (saved / "model.safetensors").unlink()
    with pytest.raises(ProxstepError) as caught:
        lifecycle.resume(folder, Silent())
    for saved in checkpoints(folder):
        assert f"{saved} is damaged: model.safetensors is missing" in str(caught.value)


def test_a_recipe_that_was_changed_is_noted(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.001", "learning_rate: 0.003"))
    progress: Any = Silent()
    lifecycle.resume(folder, progress)
    expected = "recipe.yaml is not what the run wrote: steps 4 is now 6; optimizer.learning_rate "
    assert f"{expected}0.001 is now 0.003" in progress.notes

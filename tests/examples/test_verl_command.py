"""The command line for verl: our names are those of the code, and verl's configuration takes it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxstep.config.loading import resolve
from proxstep.engines.verl.overrides import Prepared, gpus, overrides

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "examples" / "verl_command.sh"
OURS = ("model.external_lib", "actor.strategy", "actor._target_")


def options(lines: list[str]) -> dict[str, str]:
    return dict(line.lstrip("+").split("=", 1) for line in lines)


def test_what_is_ours_in_it_is_what_a_recipe_becomes() -> None:
    found = options(re.findall(r"^  (\S+=\S+) \\$", COMMAND.read_text(), re.M))
    paths = (Path("/t.parquet"), Path("/v.parquet"))
    prepared = Prepared("model", *paths, ("exact_match",), (1.0,), None)
    ours = options(overrides(resolve({"algorithm": "isopo"}, {}, "test"), prepared, gpus(1)))
    for name in OURS:
        assert found[f"actor_rollout_ref.{name}"] == ours[f"actor_rollout_ref.{name}"]
    assert found["actor_rollout_ref.actor.geometry.rule"] == "isopo"
    assert "rule:isopo" in ours["actor_rollout_ref.actor.geometry"]


def test_it_says_what_it_misses() -> None:
    done = subprocess.run(["sh", str(COMMAND)], env={}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRAIN: a Parquet file of prompts" in done.stderr


@pytest.mark.verl
@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl's environment")
def test_verl_composes_it(tmp_path: Path) -> None:
    """`--cfg job` prints the whole configuration and starts nothing."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would lose its packages
    python.chmod(0o755)
    files = {"MODEL": "m", "TRAIN": "t.parquet", "VALIDATION": "v.parquet"}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    done = subprocess.run(
        [shutil.which("sh") or "sh", str(COMMAND), "--cfg", "job"],
        env={**os.environ, **files, "PATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("strategy: isopo", "loss_mode: gpg", "external_lib: proxstep.engines.verl"):
        assert line in done.stdout
    assert re.search(r"geometry:\n +rule: isopo", done.stdout)

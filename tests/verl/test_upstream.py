"""verl's own tests of losses and aggregation, which its wheel carries, with our plugin loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.verl

ROOT = Path(__file__).parents[2]


def test_verls_own_tests_pass(tmp_path: Path) -> None:
    """Beside ours, its `tests` package would be hidden: another process, without our folder."""
    site = Path(str(distribution("verl").locate_file("")))
    files = [
        "tests/trainer/ppo",
        "tests/test_base_config_on_cpu.py",
        "tests/test_protocol_on_cpu.py",
        "tests/test_protocol_v2_on_cpu.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    environment["VERL_USE_EXTERNAL_MODULES"] = "proxstep.engines.verl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += ["-p", "verl", "--rootdir", str(site), "-c", os.devnull]
    done = subprocess.run(
        command + [str(site / name) for name in files],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=540,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-1000:])
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, summary
    assert int(passed.group(1)) > 200, summary

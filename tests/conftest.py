"""Shapes and types of the pure modules are checked at every call in one test of eight.

The checks take as long as the rest of the suite. PROXSTEP_CHECK_SHAPES=1 checks in every test.
"""

from __future__ import annotations

import os
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch

CHECKED = [
    "proxstep.logprobs.tokens",
    "proxstep.algorithms.advantages",
    "proxstep.algorithms",
    "proxstep.logprobs.chunked",
    "proxstep.training.regularizers",
    "proxstep.isopo.diagnostics.step",
    "proxstep.isopo.diagnostics.statistics",
    "proxstep.isopo.embedding",
    "proxstep.isopo.linear",
    "proxstep.isopo.vector",
    "proxstep.isopo.diagnostics.noise",
    "proxstep.isopo.plan",
    "proxstep.isopo.diagnostics.stacked",
    "proxstep.isopo.diagnostics.summary",
    "proxstep.isopo.means",
    "proxstep.isopo.rule",
    "tests.theory.maths",
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the embedded models of the tests out of the user's cache."""
    os.environ["PROXSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _check_shapes(request: pytest.FixtureRequest) -> None:
    """Switch the checks on or off by the test's name, so that each test is always the same."""
    chosen = zlib.crc32(request.node.nodeid.encode()) % 8 == 0
    checks = chosen or "PROXSTEP_CHECK_SHAPES" in os.environ
    jaxtyping.config.update("jaxtyping_disable", not checks)

"""Shapes and types of the pure modules are checked at every call while the tests run."""

from __future__ import annotations

import os

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

"""Shapes and types of the pure modules are checked at every call while the tests run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import torch

CHECKED = [
    "proxstep.masked",
    "proxstep.advantages",
    "proxstep.losses",
    "proxstep.isopo.weights",
    "proxstep.isopo.layers",
    "proxstep.isopo.trailing",
    "proxstep.policy",
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
torch.set_num_threads(1)

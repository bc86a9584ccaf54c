"""A pool of grading processes that gives up soon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxstep.rewards import grading_pool
from proxstep.rewards.grading_pool import GradingPool


@contextmanager
def little_patience(num_workers: int) -> Iterator[None]:
    """Grade with processes in which what hangs does so for half a second."""
    pool = GradingPool(num_workers, cpu_seconds=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grading_pool._POOLS, os.getpid(), pool)
        yield
    pool.close()

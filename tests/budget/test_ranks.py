"""KlBudget on two ranks against one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.budget.on_ranks import steps
from tests.distributed import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("control", ["predicted", "corrected", "measured-backtracking"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ranks_take_the_step_of_one_process(ranks: Ranks, wrapper: str, control: str) -> None:
    measured, weights = steps("none", control)
    assert all(0 < step["scale"] < 1 for step in measured)
    for its_measured, its_weights in ranks.run(steps, wrapper, control):
        for mine, its in zip(measured, its_measured, strict=True):
            assert its == pytest.approx(mine, rel=1e-6)
        for mine, its in zip(weights, its_weights, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-9)

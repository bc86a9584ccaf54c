"""docs/new-algorithm.md, followed: its file and its formula agree, and it is an algorithm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.algorithms import formulas
from tests.algorithms.loss_cases import MODES, SEEDS, assert_close, counted, make_case
from tests.engine import Silent, tiny_recipe

from proxstep.algorithms import ALGORITHMS, Algorithm, register
from proxstep.training import lifecycle

PAGE = Path(__file__).parents[2] / "docs" / "new-algorithm.md"
FILE, FORMULA, LINE = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def algorithm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Algorithm]:
    code, formula = {"__name__": "clipped_linear"}, dict(vars(formulas))
    exec(compile(FILE, str(PAGE), "exec"), code)
    exec(compile(FORMULA, str(PAGE), "exec"), formula)
    found = register(code["CLIPPED_LINEAR"])
    for name, paper in eval(f"{{{LINE}}}", formula).items():
        monkeypatch.setitem(formulas.PAPERS, name, paper)
    yield found
    del ALGORITHMS[found.name]


@pytest.mark.parametrize("mode", MODES)
def test_the_file_agrees_with_the_formula(algorithm: Algorithm, mode: str) -> None:
    paper = formulas.PAPERS[algorithm.name]
    assert algorithm.default_loss_agg_mode == paper.loss_agg_mode
    assert algorithm.defaults == paper.defaults
    for seed in SEEDS:
        case = make_case(seed)
        aggregation = counted(mode, case.response_mask)
        loss, _ = algorithm.loss(*case.tensors, **paper.others, aggregation=aggregation)
        length = aggregation.max_length or 9
        wanted = formulas.oracle(algorithm.name, case, case.log_probs, mode, paper.others, length)
        assert_close(loss, wanted)
        other, _ = algorithm.loss(*case.tensors, aggregation=aggregation)
        assert abs(other - loss) > 1e-6


def test_it_trains_under_isopo(algorithm: Algorithm, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, f"isopo+{algorithm.name}", steps=1)
    assert lifecycle.train(recipe, Silent()) == "finished"

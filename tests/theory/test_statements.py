"""Every statement's check passes, and fails once what it is about is broken."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.theory.maths import opo
from tests.theory.registry import CORRECTED, FALSE, PRINTED, Mutant, Statement
from tests.theory.statements import STATEMENTS

SEEDS = (0, 1, 2)
BROKEN = [
    pytest.param(statement, mutant, id=f"{statement.test_id}-{number}")
    for statement in STATEMENTS
    for number, mutant in enumerate(statement.mutants)
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.test_id)
def test_statement(statement: Statement, seed: int) -> None:
    statement.check(seed)


@pytest.mark.parametrize(("statement", "mutant"), BROKEN)
def test_the_check_can_fail(statement: Statement, mutant: Mutant) -> None:
    for seed in SEEDS:
        with mutant.applied(), pytest.raises(AssertionError):
            statement.check(seed)


@given(st.sampled_from(STATEMENTS), st.integers(0, 10**6))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_statements_hold_on_any_instance(statement: Statement, seed: int) -> None:
    statement.check(seed)


def test_every_equation_is_listed() -> None:
    for paper, last in (("OPO", 25), ("ISOPO", 7)):
        numbers = " ".join(s.number for s in STATEMENTS if s.paper == paper)
        assert {int(n) for n in re.findall(r"eq\. (\d+)", numbers)} == set(range(1, last + 1))


def test_every_named_statement_is_listed() -> None:
    numbers = " ".join(s.number for s in STATEMENTS if s.paper == "OPO")
    for name in (
        *("definition 3.1", "definition 4.1", "proposition 4.2", "theorem 4.3", "lemma 6.1"),
        *("remark 6.2", "remark 6.3", "theorem 8.1", "corollary 8.2", "proposition 8.3"),
        *("proposition 8.4", "lemma A.1", "proposition A.2", "proposition A.3", "algorithm 1"),
    ):
        assert name in numbers, name


def test_entries_are_complete() -> None:
    assert len({s.test_id for s in STATEMENTS}) == len(STATEMENTS)
    for statement in STATEMENTS:
        assert statement.mutants, statement.number
        assert statement.remark or statement.holds == PRINTED, statement.number
        assert statement.holds in (PRINTED, CORRECTED, FALSE)


def test_a_mutant_is_undone() -> None:
    weight_V = anchor_V = torch.full((2,), 0.5, dtype=torch.float64)
    mutant = Mutant("maths.opo.mirror_step", "start_V +", "start_V -")
    with mutant.applied():
        assert (opo.mirror_step(1 - anchor_V, weight_V, anchor_V, 0.1) == 0).all()
    before_V = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert torch.equal(opo.mirror_step(before_V, weight_V, anchor_V, 0.1), before_V)


def test_a_mutant_that_finds_nothing_to_change_is_an_error() -> None:
    gone = Mutant("maths.opo.update", "no such text", "")
    with pytest.raises(ValueError, match="occurs 0 times"), gone.applied():
        pass

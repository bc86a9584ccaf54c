"""Every form of the statistics is exact, and the cost model keeps to its budget."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.isopo.test_install import COEFFICIENTS, IDS, gradients, log_probs
from tests.models import tiny_qwen3
from torch import Tensor

from proxstep import PRESETS, IsometricRule, Isopo
from proxstep.isopo import linear
from proxstep.isopo.embedding import LookupGradients
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.microbatch import Settings
from proxstep.isopo.plan import Layout, Memory, Needs, Part, Plan, Shape, choose, held, make_layout
from proxstep.isopo.vector import VectorGradients

IDS_OF = {
    "padded": [[-1, 0, 0, 0, 0], [1, 1, 1, -1, -1], [2, 2, 2, 2, 2]],
    "packed": [[2, 2, 0, 0, 0, 0, 1, -1]],
    "scattered": [[0, 1, 0, 1, 2, 2, -1, 0]],
    "head": [[0, 0, 0, 0, 0], [1, 1, 1, -1, -1], [2, 2, 2, 2, 2]],
}
ALL_NEEDS = [Needs(*flags) for flags in itertools.product([False, True], repeat=3)]
PLANS = [
    Plan("none"),
    *(Plan("sequences", size) for size in (1, 2, 3)),
    Plan("sequences", 3, ghost_fisher=False),
    *(Plan("blocks", size, ghost) for size in (1, 4, 7) for ghost in (False, True)),
]


def case(layout: str, dtype: torch.dtype = torch.float64) -> tuple[Layout, Tensor, Tensor]:
    """A layout, and as many random rows of g and a as its positions.

    A head has many output features, and no gradient at most of the positions.
    """
    generator = torch.Generator().manual_seed(len(layout))
    made = make_layout(torch.tensor(IDS_OF[layout]), 3)
    num_out, num_in = (23, 5) if layout == "head" else (7, 5)
    grad_TO = torch.randn(made.num_positions, num_out, generator=generator, dtype=torch.float64)
    input_TI = torch.randn(made.num_positions, num_in, generator=generator, dtype=torch.float64)
    if layout == "head":
        grad_TO[[0, 1, 2, 7, 8, 9, 10, 14]] = 0.0
    return made, grad_TO.to(dtype), input_TI.to(dtype)


def explicit(layout: Layout, per_position: Tensor, index_K: Tensor) -> dict[str, Tensor]:
    """The statistics from every position's gradient as a matrix."""
    flat_TN = per_position.flatten(1).double()
    sum_BN = torch.stack([flat_TN[layout.sequence_T == b].sum(0) for b in range(3)])
    sample_KN = flat_TN[index_K]
    return {
        "cross": sample_KN @ sum_BN.mT,
        "squares": sample_KN.square().sum(1),
        "norm": sum_BN.square().sum(1),
        "ntk": sum_BN @ sum_BN.mT,
        "sum": sum_BN,
    }


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("needs", ALL_NEEDS, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("layout", IDS_OF)
def test_every_plan_is_exact(monkeypatch, layout, plan, needs, dtype) -> None:
    if plan.gradients == "sequences" and needs.ntk and plan.size < 3:
        plan = Plan("sequences", 3, plan.ghost_fisher)  # a kernel needs all sequences
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    made, grad_TO, input_TI = case(layout, dtype)
    index_K = torch.tensor([0, 3, 4])
    wanted = explicit(made, grad_TO[:, :, None] * input_TI[:, None, :], index_K)
    outer = OuterGradients(grad_TO, input_TI)
    sample = outer.at(index_K) if needs.fisher else None
    weight_B = torch.tensor([0.5, -2.0, 1.5], dtype=dtype)
    found: list[Part] = []
    monkeypatch.setattr(linear, "choose", lambda *_, **__: plan)
    total = None
    for part in outer.parts(made, needs, sample, Memory(), separable=True):
        total = part.add(weight_B[part.sequences], total)
        found.append(part)
    assert total is not None
    assert_close(total.flatten(), weight_B.double() @ wanted["sum"], tolerance)
    for part in found:
        if needs.fisher:
            assert part.cross_KB is not None
            assert_close(part.cross_KB, wanted["cross"][:, part.sequences], tolerance)
        if needs.norm:
            assert part.norm_sq_B is not None
            assert_close(part.norm_sq_B, wanted["norm"][part.sequences], tolerance)
        if needs.ntk:
            assert part.ntk_BB is not None
            assert_close(part.ntk_BB, wanted["ntk"], tolerance)
    seen = [b for part in found for b in range(3)[part.sequences]]
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("layout", IDS_OF)
@pytest.mark.parametrize("kind", ["vector", "lookup"])
def test_sums_are_exact(kind: str, layout: str) -> None:
    made, grad_TO, _ = case(layout)
    token_T = torch.randint(
        4, (made.num_positions,), generator=torch.Generator().manual_seed(len(layout))
    )
    index_K = torch.tensor([0, 2, 4])
    if kind == "vector":
        gradients, per_position = VectorGradients(grad_TO), grad_TO
    else:
        gradients = LookupGradients(grad_TO, token_T, 6)
        one_hot_TV = torch.nn.functional.one_hot(token_T, 6).double()
        per_position = one_hot_TV[:, :, None] * grad_TO[:, None, :]
    wanted = explicit(made, per_position, index_K)
    sums, sample = gradients.sums(made), gradients.at(index_K)
    assert_close(sums.cross(sample), wanted["cross"])  # type: ignore[arg-type]
    assert_close(sample.squares(), wanted["squares"])
    assert_close(sums.norm_squares(), wanted["norm"])
    assert_close(sums.ntk(), wanted["ntk"])
    weight_B = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)
    expected = weight_B @ wanted["sum"]
    assert_close(sums.contract(weight_B).flatten(), expected)
    assert_close(gradients.contract(F.pad(weight_B, (0, 1))[made.sequence_T]).flatten(), expected)


@pytest.mark.parametrize("rule", ["isopo", "isopo-figure4", "isopo-natural"])
def test_the_budget_does_not_change_the_gradient(rule: str) -> None:
    results = []
    for budget in (1, 3000, 2**27):
        torch.manual_seed(0)
        model = tiny_qwen3()
        isopo = Isopo(model, rule, memory_budget=budget)
        for _ in range(2):
            model.zero_grad()
            with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
                microbatch.objective(log_probs(model)).backward()
            isopo.step()
        results.append(gradients(model))
    for other in results[1:]:
        for name, wanted in results[0].items():
            assert (other[name] - wanted).norm() <= 1e-10 * wanted.norm(), name


SHAPES = st.fixed_dictionaries(  # of `Shape`, whose checks must not run while values are drawn
    {
        "out_features": st.integers(1, 4096),
        "in_features": st.integers(1, 4096),
        "lengths": st.lists(st.integers(1, 2048), min_size=1, max_size=16).map(tuple),
        "num_samples": st.integers(1, 500),
        "itemsize": st.sampled_from([4, 8]),
        "device": st.sampled_from(["cpu", "cuda"]),
    }
)
BUDGETS = st.integers(2**10, 2**30)


def least(shape: Shape, needs: Needs, separable: bool) -> int:
    """The bytes of the smallest plan that there is."""
    plans = [Plan("none")]
    if separable and not needs.ntk:
        plans.append(Plan("sequences", 1))
    if needs.norm or needs.ntk:
        plans.append(Plan("blocks", 1))
    return min(held(shape, needs, plan) for plan in plans)


@settings(deadline=None)
@given(SHAPES, st.sampled_from(ALL_NEEDS), st.booleans(), BUDGETS)
def test_plans_keep_to_the_budget(sizes, needs, separable, budget) -> None:
    shape = Shape(**sizes)
    plan = choose(shape, needs, separable=separable, memory_budget=budget)
    assert held(shape, needs, plan) <= max(budget, least(shape, needs, separable))
    if plan.gradients == "sequences" and plan.size < len(shape.lengths):
        assert separable
        assert not needs.ntk
        assert plan.ghost_fisher
    else:
        assert plan.gradients != "sequences" or plan.size == len(shape.lengths)
        assert plan.gradients != "blocks" or 1 <= plan.size <= shape.out_features


@settings(deadline=None)
@given(SHAPES, st.sampled_from(ALL_NEEDS), st.booleans(), BUDGETS, st.integers(1, 8))
def test_a_larger_budget_holds_no_less_of_the_same_kind(
    sizes, needs, separable, budget, times
) -> None:
    shape = Shape(**sizes)
    small, large = (
        choose(shape, needs, separable=separable, memory_budget=b) for b in (budget, times * budget)
    )
    if small.gradients == large.gradients:
        assert small.size <= large.size


@settings(deadline=None)
@given(
    st.integers(32, 4096), st.integers(32, 4096), st.integers(1, 16), st.integers(1, 500), BUDGETS
)
def test_fisher_norms_are_ghosts_where_sequences_are_short(
    num_out, num_in, num_sequences, num_samples, budget
) -> None:
    """Where L < IO / (I + O), whatever K and the budget are."""
    length = num_out * num_in // (num_out + num_in)
    shape = Shape(num_out, num_in, (length,) * num_sequences, num_samples)
    plan = choose(shape, Needs(fisher=True), separable=True, memory_budget=budget)
    assert plan == Plan("none")


@settings(deadline=None)
@given(SHAPES, st.integers(2, 8))
def test_longer_sequences_never_bring_ghosts_back(sizes, times) -> None:
    shape = Shape(**sizes)
    longer = dataclasses.replace(shape, lengths=tuple(times * n for n in shape.lengths))
    short, long = (
        choose(s, Needs(fisher=True), separable=True, memory_budget=2**60) for s in (shape, longer)
    )
    assert short.ghost_fisher or not long.ghost_fisher


@pytest.mark.parametrize(("device", "length"), [("cpu", 256), ("cpu", 1024), ("cuda", 4096)])
@pytest.mark.parametrize("features", [(512, 512), (1024, 1024), (3072, 1024), (1024, 3072)])
def test_the_natural_rule_forms_the_gradients_that_fit(features, device, length) -> None:
    shape = Shape(*features, (length,) * 16, 0, device=device)
    whole = 16 * shape.area * 4
    for budget, kind in ((whole, "sequences"), (whole - 1, "blocks")):
        plan = choose(shape, Needs(ntk=True), separable=False, memory_budget=budget)
        assert plan.gradients == kind


def test_what_is_chosen_where() -> None:
    def plan(length: int, needs: Needs) -> Plan:
        return choose(Shape(1024, 1024, (length,) * 8, 64), needs, separable=True)

    assert plan(128, Needs(fisher=True)) == Plan("none")  # L < IO / (I + O)
    assert not plan(4096, Needs(fisher=True)).ghost_fisher
    assert plan(16, Needs(norm=True)) == Plan("none")
    assert plan(1024, Needs(norm=True)).gradients == "sequences"


def test_a_rule_asks_for_no_more_than_its_powers() -> None:
    needs = {name: Settings(rule).needs for name, rule in PRESETS.items()}
    assert needs["reinforce"] == Needs()
    assert needs["isopo"] == Needs(fisher=True)
    assert needs["isopo-euclidean"] == Needs(norm=True)
    assert needs["isopo-npg"] == needs["isopo-figure4"] == Needs(fisher=True, norm=True)
    assert needs["isopo-natural"] == Needs(ntk=True)
    assert needs["proma-intra"] == Needs()
    assert Settings(PRESETS["isopo"], fisher="sequences").needs == Needs(ntk=True)


def test_reinforce_measures_nothing(monkeypatch) -> None:
    model = tiny_qwen3()
    isopo = Isopo(model, "reinforce")

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(IsometricRule, "weigh", refuse)
    monkeypatch.setattr(OuterGradients, "at", refuse)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    assert isopo.step() == {}


def test_the_last_inputs_gram_is_shared_and_never_stale() -> None:
    memory, computed, layout = Memory(), [], object()

    def gram_of(value: Tensor) -> Tensor:
        def compute() -> Tensor:
            computed.append(value)
            return value @ value.mT

        return memory.shared("cross", value, layout, compute)

    first = torch.randn(4, 3)
    assert gram_of(first) is gram_of(first.view(4, 3))
    assert len(computed) == 1
    first.mul_(2.0)
    assert torch.equal(gram_of(first), first @ first.mT)
    second = torch.randn(4, 3)
    assert torch.equal(gram_of(second), second @ second.mT)
    assert torch.equal(gram_of(first), first @ first.mT)
    assert len(computed) == 4
    memory.release()
    gram_of(first)
    assert len(computed) == 5
    layout = object()
    gram_of(first)
    assert len(computed) == 6


def test_another_tensor_at_the_same_address_is_not_taken_for_it() -> None:
    memory, layout = Memory(), object()
    for value in range(50):  # each one is freed before the next is made, but for the memory's
        x = torch.full((64, 64), float(value))
        gram = memory.shared("cross", x, layout, x.square)  # type: ignore[arg-type]
        assert torch.equal(gram, x.square())
        del x


@pytest.mark.parametrize("rule", ["isopo", "isopo-figure4"])
def test_microbatches_over_one_input_do_not_share_its_gram(rule: str) -> None:
    """Back-propagated one after the other, outside of both: each samples positions of its own, and
    has sequences of its own.
    """
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for later in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 64, dtype=torch.float64)
        isopo = Isopo(layer, rule, num_overlap_positions=3)
        totals = []
        for ids in (IDS, torch.tensor([[1, 1, 1, -1, -1], [0, 0, 0, 0, 0]])):
            with isopo.microbatch(ids, COEFFICIENTS) as microbatch:
                totals.append(microbatch.objective(layer(x).sin()))
                if not later:
                    totals.pop().backward()
        for total in totals:
            total.backward()
        results.append(gradients(layer))
    for name, wanted in results[0].items():
        assert (results[1][name] - wanted).norm() <= 1e-12 * wanted.norm(), name


@pytest.mark.parametrize(("source", "num_grams"), [("microbatch", 2 * 4 + 1), ("previous_step", 0)])
def test_layers_with_the_same_input_share_its_gram(
    monkeypatch, source: str, num_grams: int
) -> None:
    """Of a block's seven linear layers, four see an input that the one before did not.

    Layers that draw positions of their own share none.
    """
    torch.manual_seed(0)
    model = tiny_qwen3()
    computed = []
    own = Memory.shared

    def counting(self: Memory, purpose: str, of: Tensor, layout: object, compute: object) -> object:
        def counted() -> object:
            computed.append(purpose)
            return compute()  # type: ignore[operator]

        return own(self, purpose, of, layout, counted)

    monkeypatch.setattr(Memory, "shared", counting)
    isopo = Isopo(model, overlap_source=source)  # type: ignore[arg-type]
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    assert len(computed) == num_grams  # two blocks, and the head

"""Every form of the statistics is exact, and the cost model keeps to its budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.isopo.test_install import COEFFICIENTS, IDS, gradients, log_probs
from tests.models import tiny_qwen3
from torch import Tensor

from proxstep import PRESETS, Isopo
from proxstep.isopo import reduction
from proxstep.isopo.forms import Needs, Plan, Shape, choose
from proxstep.isopo.layers import LookupGradients, OuterGradients, VectorGradients
from proxstep.isopo.layout import Layout, make_layout
from proxstep.isopo.memory import Memory
from proxstep.isopo.reduction import Measured, Request, reduce
from proxstep.isopo.weighing import Settings

IDS_OF = {
    "padded": [[-1, 0, 0, 0, 0], [1, 1, 1, -1, -1], [2, 2, 2, 2, 2]],
    "packed": [[2, 2, 0, 0, 0, 0, 1, -1]],
    "scattered": [[0, 1, 0, 1, 2, 2, -1, 0]],
}
ALL_NEEDS = [Needs(*flags) for flags in itertools.product([False, True], repeat=3)]
PLANS = [
    Plan("none"),
    *(Plan("sequences", size) for size in (1, 2, 3)),
    Plan("sequences", 3, ghost_fisher=False),
    *(Plan("blocks", size, ghost) for size in (1, 4, 7) for ghost in (False, True)),
]


def case(layout: str, dtype: torch.dtype = torch.float64) -> tuple[Layout, Tensor, Tensor]:
    """A layout, and as many random rows of g and a as its positions."""
    generator = torch.Generator().manual_seed(len(layout))
    made = make_layout(torch.tensor(IDS_OF[layout]), 3)
    grad_TO = torch.randn(made.num_positions, 7, generator=generator, dtype=torch.float64)
    input_TI = torch.randn(made.num_positions, 5, generator=generator, dtype=torch.float64)
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
    parts: list[tuple[slice, Measured]] = []

    def weigh(part: slice, measured: Measured) -> Tensor:
        parts.append((part, measured))
        return weight_B[part]

    def fisher_of(cross_KB: Tensor) -> Tensor:
        assert_close(cross_KB, wanted["cross"], tolerance)
        return cross_KB.square().sum(0)

    monkeypatch.setattr(reduction, "choose", lambda *_, **__: plan)
    request = Request(needs, sample, fisher_of, weigh, separable=True)
    total = reduce(outer, made, request, Memory())
    assert_close(total.flatten(), weight_B.double() @ wanted["sum"], tolerance)
    for part, measured in parts:
        if needs.fisher:
            assert measured.fisher_sq_B is not None
            assert_close(measured.fisher_sq_B, wanted["cross"].square().sum(0)[part], tolerance)
        if needs.norm:
            assert measured.norm_sq_B is not None
            assert_close(measured.norm_sq_B, wanted["norm"][part], tolerance)
        if needs.ntk:
            assert measured.ntk_BB is not None
            assert_close(measured.ntk_BB, wanted["ntk"], tolerance)
    seen = [b for part, _ in parts for b in range(3)[part]]
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
    assert_close(gradients.contract(made.spread(weight_B)).flatten(), expected)


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


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    st.lists(st.integers(1, 2048), min_size=1, max_size=16),
    st.integers(1, 500),
    st.sampled_from(ALL_NEEDS),
    st.booleans(),
    st.integers(2**10, 2**30),
)
def test_plans_keep_to_the_budget(features, lengths, num_samples, needs, separable, budget) -> None:
    shape = Shape(*features, tuple(lengths), num_samples)
    plan = choose(shape, needs, separable=separable, memory_budget=budget)
    rows = {"none": 0, "sequences": plan.size * shape.out_features, "blocks": 0}[plan.gradients]
    if plan.gradients == "blocks":
        rows = plan.size * len(shape.lengths)
    held = rows * shape.in_features * shape.itemsize
    one = (
        shape.in_features
        * shape.itemsize
        * (shape.out_features if plan.gradients == "sequences" else len(shape.lengths))
    )
    assert held <= max(budget, one)  # one gradient, or one feature, is the least
    if plan.gradients == "sequences" and plan.size < len(shape.lengths):
        assert separable
        assert not needs.ntk
        assert plan.ghost_fisher


def test_what_is_chosen_where() -> None:
    def plan(length: int, needs: Needs) -> Plan:
        return choose(Shape(1024, 1024, (length,) * 8, 64), needs, separable=True)

    assert plan(128, Needs(fisher=True)) == Plan("none")  # L < IO / (I + O)
    assert not plan(4096, Needs(fisher=True)).ghost_fisher
    assert plan(256, Needs(ntk=True)).gradients == "sequences"
    assert plan(16, Needs(norm=True)) == Plan("none")
    assert plan(1024, Needs(norm=True)).gradients == "sequences"


def test_a_rule_asks_for_no_more_than_its_powers() -> None:
    needs = {name: Settings(rule).needs for name, rule in PRESETS.items()}
    assert needs["reinforce"] == Needs()
    assert needs["isopo"] == Needs(fisher=True)
    assert needs["isopo-euclidean"] == Needs(norm=True)
    assert needs["isopo-npg"] == needs["isopo-figure4"] == Needs(fisher=True, norm=True)
    assert needs["isopo-natural"] == Needs(ntk=True)
    assert Settings(PRESETS["isopo"], fisher="sequences").needs == Needs(ntk=True)


def test_the_last_inputs_gram_is_shared_and_never_stale() -> None:
    memory, computed = Memory(), []

    def gram_of(value: Tensor) -> Tensor:
        def compute() -> Tensor:
            computed.append(value)
            return value @ value.mT

        return memory.shared("cross", value, compute)

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


def test_layers_with_the_same_input_share_its_gram(monkeypatch) -> None:
    """Of a block's seven linear layers, four see an input that the one before did not."""
    torch.manual_seed(0)
    model = tiny_qwen3()
    computed = []
    own = Memory.shared

    def counting(self: Memory, purpose: str, of: Tensor, compute: object) -> object:
        def counted() -> object:
            computed.append(purpose)
            return compute()  # type: ignore[operator]

        return own(self, purpose, of, counted)

    monkeypatch.setattr(Memory, "shared", counting)
    with Isopo(model).microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    assert len(computed) == 2 * 4 + 1  # two blocks, and the head

"""Intra-PROMA against materialized matrices and torch.linalg.svd, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.families import build
from tests.isopo.grids import Layout as Arrangement
from tests.isopo.grids import make_grid, run
from tests.oracle import (
    log_prob_of_completion,
    position_gradients,
    random_sequences,
    summed_by_parameter,
)
from torch import Tensor, nn

from proxstep import ProxstepError
from proxstep.isopo import IntraProjectingRule, Isopo, Rule, proma
from proxstep.isopo.experts import ExpertGradients
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.plan import make_layout

COEFFICIENTS = [1.0, -0.5, 0.25, 3.0, -1.0, 0.7]
ALL = [[0, 1, 2, 3, 4, 5]]
FAMILIES = ["qwen2", "qwen3-tied", "qwen3-untied", "gpt2", "qwen3-lora"]
RULE = IntraProjectingRule(rank=3)


# -- the oracle ------------------------------------------------------------------------------------


def directions(rows: Tensor, rank: int) -> Tensor:
    """The first right singular vectors, (features, at most rank)."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:rank].mT


def oracle(total: Tensor, grads: Tensor, inputs: Tensor, rank: int, shrinkage: float) -> Tensor:
    """total - s P_g total P_a."""
    q_g, q_a = directions(grads, rank), directions(inputs, rank)
    rank = min(q_g.shape[1], q_a.shape[1])
    left, right = q_g[:, :rank] @ q_g[:, :rank].mT, q_a[:, :rank] @ q_a[:, :rank].mT
    return total - shrinkage * left @ total @ right


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrices(model: nn.Module, members: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every linear layer's inputs and output's gradients, of all of some sequences' positions."""
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    handles, outputs = [], []
    for name, module in model.named_modules():
        if not is_matrix(module):
            continue

        def keep(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            output.requires_grad_(True)
            outputs.append((name, args[0].detach().flatten(0, -2), output))

        handles.append(module.register_forward_hook(keep))
    sequences = random_sequences(3, 6)
    for b in members:
        outputs.clear()
        value = log_prob_of_completion(model, sequences[b])
        found = torch.autograd.grad(value, [output for _, _, output in outputs])
        for (name, inputs, _), grads in zip(outputs, found, strict=True):
            one = rows.setdefault(f"{name}.weight", ([], []))
            one[0].append(inputs)
            one[1].append(grads.flatten(0, -2))
    for handle in handles:
        handle.remove()
    return {key: (torch.cat(a), torch.cat(g)) for key, (a, g) in rows.items()}


def expected(
    model: nn.Module, microbatches: list[list[int]], rank: int, shrinkage: float
) -> dict[str, Tensor]:
    """The gradient to minimize, of every parameter."""
    sequences, total = random_sequences(3, 6), {}
    transposed = {n for n, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    for members in microbatches:
        found = [position_gradients(model, sequences[b]) for b in members]
        rows = matrices(model, members)
        for key in found[0]:
            parts = zip(found, members, strict=True)
            new = -sum(COEFFICIENTS[b] * one[key].sum(0) for one, b in parts)
            if key in rows and key.rsplit(".", 1)[0] in transposed:
                new = oracle(new.mT, rows[key][1], rows[key][0], rank, shrinkage).mT
            elif key in rows:
                new = oracle(new, rows[key][1], rows[key][0], rank, shrinkage)
            total[key] = total.get(key, 0.0) + new
    return summed_by_parameter(model, total)


# -- ours ------------------------------------------------------------------------------------------


def intra(
    model: nn.Module,
    microbatches: list[list[int]],
    rule: Rule | str = RULE,
    arrangement: Arrangement = "right",
) -> dict[str, Tensor]:
    model.zero_grad()
    isopo, sequences = Isopo(model, rule), random_sequences(3, 6)
    for members in microbatches:
        grid = make_grid([sequences[b] for b in members], arrangement)
        run(model, isopo, grid, [COEFFICIENTS[b] for b in members])
    isopo.step()
    isopo.remove()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == wanted.keys()
    for name, right in wanted.items():
        assert (ours[name] - right).norm() <= tolerance * right.norm(), name


# -- in a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shrinkage", [1.0, 0.4])
def test_equals_the_oracle(family: str, shrinkage: float) -> None:
    model, reference, microbatches = build(family, 3), build(family, 3), [[0, 1, 2], [3, 4, 5]]
    ours = intra(model, microbatches, IntraProjectingRule(3, shrinkage))
    assert_same(ours, expected(reference, microbatches, 3, shrinkage), 1e-10)


def test_what_is_no_matrix_has_reinforces_gradient() -> None:
    model = build("gpt2", 3)
    plain, ours = intra(model, ALL, "reinforce"), intra(model, ALL)
    head = {"transformer.wte.weight"}  # tied: its other use is an embedding
    changed = {f"{name}.weight" for name, module in model.named_modules() if is_matrix(module)}
    others = ours.keys() - changed - head
    assert any("ln_1" in name for name in others)
    assert any("wpe" in name for name in others)
    assert any(name.endswith("attn.c_attn.bias") for name in others)
    for name in others:
        assert torch.equal(ours[name], plain[name]), name
    for name in changed & ours.keys() | head:
        assert (ours[name] - plain[name]).norm() > 1e-3 * plain[name].norm(), name


@pytest.mark.parametrize("rule", [IntraProjectingRule(0), IntraProjectingRule(3, 0.0)])
def test_nothing_taken_out_is_reinforce(rule: Rule) -> None:
    model = build("qwen3-tied", 3)
    assert_same(intra(model, ALL, rule), intra(model, ALL, "reinforce"), 0.0)


def test_as_many_directions_as_positions_leave_nothing() -> None:
    model, sequences = build("qwen3-untied", 3), random_sequences(3, 6)
    shortest = min(range(6), key=lambda b: len(sequences[b].tokens))
    assert len(sequences[shortest].tokens) <= 8  # which every layer has features for
    plain = intra(model, [[shortest]], "reinforce")
    ours = intra(model, [[shortest]], IntraProjectingRule(8))
    for name, module in model.named_modules():
        if is_matrix(module):
            key = f"{name}.weight"
            assert ours[key].norm() <= 1e-10 * plain[key].norm()


@pytest.mark.parametrize("arrangement", ["left", "packed", "packed-rows"])
def test_padding_and_packing_do_not_matter(arrangement: Arrangement) -> None:
    model = build("qwen3-tied", 3)
    assert_same(intra(model, ALL, arrangement=arrangement), intra(model, ALL), 1e-10)


def test_microbatches_add_up_in_any_order() -> None:
    model = build("qwen3-tied", 3)
    first, second = intra(model, [[0, 1, 2]]), intra(model, [[3, 4, 5]])
    summed = {name: first[name] + second[name] for name in first}
    assert_same(intra(model, [[0, 1, 2], [3, 4, 5]]), summed, 1e-12)
    assert_same(intra(model, [[3, 4, 5], [0, 1, 2]]), summed, 1e-12)
    together = intra(model, ALL)
    assert any((together[n] - summed[n]).norm() > 1e-3 * summed[n].norm() for n in summed)


def test_diagnosing_is_refused() -> None:
    model = build("qwen3-tied", 3)
    isopo, grid = (
        Isopo(model, "proma-intra", diagnose=True),
        make_grid(random_sequences(3), "right"),
    )
    with pytest.raises(ProxstepError, match="diagnose"):
        run(model, isopo, grid, COEFFICIENTS[:4])


# -- one matrix ------------------------------------------------------------------------------------


SHAPES = [(40, 7, 12), (40, 12, 7), (9, 30, 20), (9, 5, 50), (30, 30, 30)]
"""Positions, output and input features."""


def random_matrix(seed: int, rows: int, out: int, size: int) -> OuterGradients:
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(rows, out, generator=generator, dtype=torch.float64)
    return OuterGradients(grads, torch.randn(rows, size, generator=generator, dtype=torch.float64))


def random_total(outer: OuterGradients, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(outer.num_rows, generator=generator, dtype=torch.float64)
    return outer.contract(weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_matrix_equals_the_oracle(shape: tuple[int, int, int], seed: int) -> None:
    outer = random_matrix(seed, *shape)
    layout = make_layout(torch.arange(shape[0])[None] // 5, -(-shape[0] // 5))
    total = random_total(outer, seed)
    for rank in (1, 4, 100):
        found = IntraProjectingRule(rank).project(total.clone(), outer, layout)
        wanted = oracle(total, outer.grad_TO, outer.input_TI, rank, 1.0)
        assert (found - wanted).norm() <= 1e-10 * total.norm()
        q_g, q_a = directions(outer.grad_TO, rank), directions(outer.input_TI, rank)
        kept = min(q_g.shape[1], q_a.shape[1])
        core = q_g[:, :kept].mT @ found @ q_a[:, :kept]
        assert core.norm() <= 1e-10 * total.norm()
    if shape[0] <= min(shape[1:]) or shape[1] == shape[2]:  # the last rank was the full one
        assert found.norm() <= 1e-10 * total.norm()


def test_padding_is_in_no_span() -> None:
    outer, total = random_matrix(0, 30, 7, 12), torch.ones(7, 12, dtype=torch.float64)
    ids = torch.arange(30)[None] // 10
    ids[0, [8, 9, 29]] = -1
    found = IntraProjectingRule(2).project(total.clone(), outer, make_layout(ids, 3))
    kept = outer.at((ids[0] >= 0).nonzero().squeeze(1))
    wanted = oracle(total, kept.grad_TO, kept.input_TI, 2, 1.0)
    assert (found - wanted).norm() <= 1e-10 * total.norm()


@pytest.mark.parametrize("change", [lambda x: x * 0, lambda x: x[:, :1] * x[:1]])
def test_singular_values_of_zero(change: Callable[[Tensor], Tensor]) -> None:
    """Any direction may stand for them: none is taken out, and there is no NaN."""
    outer = random_matrix(0, 9, 30, 20)
    outer = OuterGradients(change(outer.grad_TO), outer.input_TI)
    total = random_total(random_matrix(1, 9, 30, 20), 0)
    layout = make_layout(torch.zeros(1, 9, dtype=torch.long), 1)
    found = IntraProjectingRule(4).project(total.clone(), outer, layout)
    rank = int(torch.linalg.matrix_rank(outer.grad_TO))
    q_g, q_a = directions(outer.grad_TO, rank), directions(outer.input_TI, 4)
    wanted = total - q_g @ (q_g.mT @ total @ q_a) @ q_a.mT
    assert (found - wanted).norm() <= 1e-10 * total.norm()


def test_every_expert_is_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, slots, experts, out, size, rank = 40, 2, 4, 6, 8, 2
    grads = torch.randn(rows, slots, out, generator=generator, dtype=torch.float64)
    inputs = torch.randn(rows, slots, size, generator=generator, dtype=torch.float64)
    expert_TS = torch.randint(experts - 1, (rows, slots), generator=generator)  # one has none
    ids = torch.zeros(1, rows, dtype=torch.long)
    ids[0, -5:] = -1
    gradients = ExpertGradients(grads.flatten(1), inputs.flatten(1), expert_TS, experts, slots)
    total = torch.randn(experts, out, size, generator=generator, dtype=torch.float64)
    found = IntraProjectingRule(rank).project(total.clone(), gradients, make_layout(ids, 1))
    for e in range(experts):
        chosen = expert_TS[:-5] == e
        wanted = total[e]
        if chosen.any():
            wanted = oracle(total[e], grads[:-5][chosen], inputs[:-5][chosen], rank, 1.0)
        assert (found[e] - wanted).norm() <= 1e-10 * total[e].norm()


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_subspace_iteration_finds_what_stands_out(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of singular values that halve, the first five; the same again, and torch's state is left."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    value = u * 0.5 ** torch.arange(60) @ vh
    monkeypatch.setattr(proma, "_EXACT", 20)
    state = torch.get_rng_state()
    found = proma.main_directions(value, 5)
    assert torch.equal(found, proma.main_directions(value, 5))
    assert torch.equal(torch.get_rng_state(), state)
    wanted = directions(value, 5)
    assert (found @ found.mT - wanted @ wanted.mT).norm() < 1e-10


def test_half_precision_is_computed_in_single() -> None:
    outer = random_matrix(0, 40, 7, 12)
    low = OuterGradients(outer.grad_TO.bfloat16(), outer.input_TI.bfloat16())
    layout, total = make_layout(torch.zeros(1, 40, dtype=torch.long), 1), random_total(outer, 0)
    total = total.bfloat16()
    found = RULE.project(total.clone(), low, layout)
    assert found.dtype == torch.float32
    wanted = oracle(total.double(), low.grad_TO.double(), low.input_TI.double(), 3, 1.0)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("options", [{"rank": -1}, {"shrinkage": -0.1}, {"shrinkage": 1.1}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ProxstepError, match=next(iter(options))):
        IntraProjectingRule(**options)  # type: ignore[arg-type]

"""An optimizer step's gradient does not depend on how its sequences are cut into microbatches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tests.families import build
from tests.isopo.grids import log_probs, make_grid
from tests.models import tiny_qwen3
from tests.oracle import random_sequences
from tests.selection import slow
from torch import Tensor

from proxstep.isopo import IsometricRule, Isopo, NaturalRule, Rule

NUM_SEQUENCES, NUM_STEPS = 8, 3

PRESERVED = IsometricRule(-1.0, scale="preserved")
CASES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "isopo": (PRESERVED, {}),
    "isopo-paper": (IsometricRule(-1.0, scale="paper"), {}),
    "isopo-figure4": (IsometricRule(0.0, -1.0, -2.0, damping=0.1, scale="preserved"), {}),
    "isopo-euclidean": (IsometricRule(0.0, -1.0, 0.0, scale="preserved"), {}),
    "trailing denominators": (PRESERVED, {"fisher_denominator": "trailing"}),
}

OTHERS = [name for name in CASES if name != "isopo"]


@cache
def run(rule: Rule, size: int, *, again: bool = False, **options: Any) -> list[list[Tensor]]:
    """The gradients of some steps at a learning rate of 0, each cut into microbatches of a size.

    What several tests look at is computed once.
    """
    torch.manual_seed(0)
    model = tiny_qwen3()
    options = {"num_overlap_positions": 20, **options}
    isopo, gradients = Isopo(model, rule, **options), []

    def backward(step: int) -> None:
        sequences = random_sequences(0 if again else step, NUM_SEQUENCES)
        generator = torch.Generator().manual_seed(step)
        advantage_B = torch.randn(NUM_SEQUENCES, generator=generator, dtype=torch.float64)
        for first in range(0, NUM_SEQUENCES, size):
            part = slice(first, first + size)
            grid = make_grid(sequences[part], "right")
            groups = torch.arange(NUM_SEQUENCES)[part] // 4
            with isopo.microbatch(
                grid.sequence_id, advantage_B[part], grid.completion, groups=groups
            ) as microbatch:
                microbatch.objective(log_probs(model, grid)).backward()

    while isopo.needs_past:
        with isopo.measuring():
            backward(0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    for step in range(NUM_STEPS):
        model.zero_grad()
        backward(step)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        isopo.step()
    return gradients


def length(gradients: list[Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients]).norm())


@pytest.mark.parametrize(
    ("case", "sizes"), [("isopo", (2, 1)), *slow(("isopo", (4,)), *((c, (1,)) for c in OTHERS))]
)
def test_the_gradient_does_not_depend_on_the_microbatches(
    case: str, sizes: tuple[int, ...]
) -> None:
    rule, options = CASES[case]
    whole = run(rule, NUM_SEQUENCES, **options)
    for size in sizes:
        for found, expected in zip(run(rule, size, **options), whole, strict=True):
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("again", [False, *slow(True)])
def test_no_step_is_inflated(again: bool) -> None:
    """An average sequence keeps its weight, from the first step on."""
    plain = run(IsometricRule(0.0, 0.0, 0.0), NUM_SEQUENCES, again=again)
    for size in (NUM_SEQUENCES, 1):
        found = run(PRESERVED, size, again=again)
        for ours, theirs in zip(found, plain, strict=True):
            assert 0.5 < length(ours) / length(theirs) < 6


@pytest.mark.parametrize(
    ("rule", "options"), [(PRESERVED, {"overlap_source": "microbatch"}), *slow((NaturalRule(), {}))]
)
def test_what_depends_on_the_microbatches_by_construction(
    rule: Rule, options: dict[str, Any]
) -> None:
    """The microbatch's own sample, and the kernel of the sequences that share one."""
    whole, cut = run(rule, 8, **options), run(rule, 2, **options)
    for found, expected in zip(cut, whole, strict=True):
        apart = [a - b for a, b in zip(found, expected, strict=True)]
        assert length(apart) > 1e-3 * length(expected)


@pytest.mark.parametrize(
    ("rule", "options", "passes"),
    [
        (IsometricRule(-1.0, scale="paper"), {"overlap_source": "microbatch"}, 0),
        (PRESERVED, {"overlap_source": "microbatch"}, 1),
        (IsometricRule(-1.0, scale="paper"), {}, 2),
        (PRESERVED, {}, 2),
        (NaturalRule(), {}, 1),
        (IsometricRule(0.0, 0.0, 0.0), {}, 0),
    ],
)
def test_how_often_is_measured(rule: Rule, options: dict[str, Any], passes: int) -> None:
    isopo, count = Isopo(tiny_qwen3(), rule, **options), 0
    while isopo.needs_past:
        with isopo.measuring():
            count += 1
    assert count == passes
    isopo.step()
    assert not isopo.needs_past


def second_steps(rule: str, size: int, *, resumed: bool = False) -> list[dict[str, Tensor]]:
    """The gradients of LoRA's A in steps 1 and 2: B is 0 in step 0, so that A has none there."""
    model = build("qwen3-lora", 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_("lora_B" not in name)
    isopo, found = Isopo(model, rule, num_overlap_positions=20), []

    def backward(step: int) -> None:
        sequences = random_sequences(step, NUM_SEQUENCES)
        for first in range(0, NUM_SEQUENCES, size):
            part = slice(first, first + size)
            grid = make_grid(sequences[part], "right")
            advantage_B = torch.linspace(-1, 1, NUM_SEQUENCES, dtype=torch.float64)[part]
            with isopo.microbatch(grid.sequence_id, advantage_B) as microbatch:
                microbatch.objective(log_probs(model, grid)).backward()

    for step in range(3):
        while isopo.needs_past:
            with isopo.measuring():
                backward(step)
        model.zero_grad()
        backward(step)
        isopo.step()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_A" in n})
        torch.manual_seed(step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 * ("lora_B" in name))
        if resumed:
            state = isopo.state_dict()
            isopo.remove()
            isopo = Isopo(model, rule, num_overlap_positions=20)
            isopo.load_state_dict(state)
    return found[1:]


@pytest.mark.parametrize("rule", ["isopo", *slow("isopo-figure4", "isopo-npg", "isopo-euclidean")])
def test_a_parameter_that_begins_late_does_not_depend_on_the_microbatches(rule: str) -> None:
    """It is measured before the second step, as all others are before the first."""
    whole = second_steps(rule, NUM_SEQUENCES)
    for found in (second_steps(rule, 2), second_steps(rule, NUM_SEQUENCES, resumed=True)):
        for ours, theirs in zip(found, whole, strict=True):
            for name, wanted in theirs.items():
                assert (ours[name] - wanted).norm() <= 1e-6 * wanted.norm() > 0, name


def test_measuring_leaves_the_random_numbers_alone() -> None:
    isopo = Isopo(tiny_qwen3(), PRESERVED)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with isopo.measuring():
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)

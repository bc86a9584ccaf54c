"""Identities that the rules satisfy on whole models, in float64; the oracle is in test_matrix."""

from __future__ import annotations

from typing import Any

import pytest
from tests.families import FAMILIES, build
from tests.isopo.grids import Layout, make_grid, run
from tests.isopo.rules import paper
from tests.oracle import (
    Formula,
    isopo_gradient,
    log_prob_of_completion,
    position_gradients,
    random_sequences,
    summed_by_parameter,
)
from torch import Tensor, nn

from proxstep.isopo import PRESETS, Isopo, NaturalRule

LAYOUTS: list[Layout] = ["right", "left", "packed", "packed-rows"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def isopo_gradients(
    family: str, seed: int, rule: Any, coefficients: list[float], **options: Any
) -> dict[str, Tensor]:
    """One microbatch of a model that is drawn anew."""
    model = build(family, seed)
    isopo = Isopo(model, rule, **options)
    run(model, isopo, make_grid(random_sequences(seed), "right"), coefficients)
    return gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_powers_zero_are_plain_reinforce(family: str) -> None:
    """Against autograd's gradient of the ordinary loss, sequence by sequence."""
    seed = list(FAMILIES).index(family)
    model, plain = build(family, seed), build(family, seed)
    sequences, coefficients = random_sequences(seed), [1.0, -0.5, 0.25, 3.0]
    for sequence, coefficient in zip(sequences, coefficients, strict=True):
        (-coefficient * log_prob_of_completion(plain, sequence)).backward()
    isopo = Isopo(model, "reinforce")
    for layout in LAYOUTS:
        model.zero_grad()
        run(model, isopo, make_grid(sequences, layout), coefficients)
        assert_same(gradients(model), gradients(plain), 1e-12)


@pytest.mark.parametrize("family", ["qwen3-tied", "gpt2", "phi"])
def test_estimates_of_zero_are_filled(family: str) -> None:
    """Two sampled positions leave sequences of which an embedding has no estimate. They get the
    mean of the others, and in the second step that of the first one.
    """
    model, reference, trailing, num_filled = build(family, 2), build(family, 2), None, 0.0
    own: dict[str, Any] = {"overlap_source": "microbatch", "num_overlap_positions": 2}
    isopo = Isopo(model, paper("isopo"), seed=2, **own)
    coefficients = [0.7, -1.3, 0.4, 2.1]
    for step in range(2):
        sequences = random_sequences(20 + step)
        model.zero_grad()
        sampled = run(model, isopo, make_grid(sequences, "left"), coefficients)
        num_filled += isopo.step()["frac_filled_fisher"]
        per_sequence = [position_gradients(reference, sequence) for sequence in sequences]
        expected, trailing = isopo_gradient(
            per_sequence, sampled, coefficients, Formula((-1, 0, 0)), trailing
        )
        assert_same(gradients(model), summed_by_parameter(reference, expected), 1e-10)
    assert num_filled > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_of_the_completion_alone(layout: Layout) -> None:
    """Those that predict one of its tokens, the prompt's last position among them."""
    model, reference = build("llama", 6), build("llama", 6)
    sequences, coefficients = random_sequences(6), [0.7, -1.3, 0.4, 2.1]
    own: dict[str, Any] = {"overlap_source": "microbatch", "num_overlap_positions": 7}
    isopo = Isopo(model, paper("isopo-npg"), overlap_positions="completion", **own)
    sampled = run(model, isopo, make_grid(sequences, layout), coefficients)
    assert len(set(sampled)) == 7
    predicts = [range(s.num_prompt - 1, len(s.tokens) - 1) for s in sequences]
    assert all(position in predicts[b] for b, position in sampled)
    per_sequence = [position_gradients(reference, sequence) for sequence in sequences]
    expected, _ = isopo_gradient(per_sequence, sampled, coefficients, Formula((0, 0, -2)))
    assert_same(gradients(model), summed_by_parameter(reference, expected), 1e-10)


def test_the_natural_rule_tends_to_reinforce() -> None:
    coefficients = [1.0, -2.0, 0.5, 0.3]
    plain = isopo_gradients("qwen3-tied", 8, "reinforce", coefficients)
    errors = []
    for damping in (1e2, 1e4, 1e6):
        rule = NaturalRule(damping, damping_form="relative", scale="paper")
        found = isopo_gradients("qwen3-tied", 8, rule, coefficients)
        errors.append(max(float((found[n] - plain[n]).norm() / plain[n].norm()) for n in plain))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)  # first order in 1 / c


@pytest.mark.parametrize("rule", PRESETS)
def test_gradients_are_linear_in_the_coefficients(rule: str) -> None:
    """So that any normalization belongs into the coefficients."""
    first, second = [1.0, 0.0, -1.0, 0.5], [0.2, 2.0, 0.3, 0.0]
    both = [a + 3 * b for a, b in zip(first, second, strict=True)]
    a, b, wanted = (isopo_gradients("gpt2", 11, rule, c) for c in (first, second, both))
    assert_same({n: a[n] + 3 * b[n] for n in a}, wanted, 1e-10)


def test_microbatches_of_one_sequence_add_up_without_geometry_alone() -> None:
    sequences, coefficients = random_sequences(12), [1.0, -1.0, 0.5, 2.0]

    def one_by_one(rule: Any) -> dict[str, Tensor]:
        model = build("qwen3-tied", 12)
        isopo = Isopo(model, rule, num_overlap_positions=None)
        for sequence, coefficient in zip(sequences, coefficients, strict=True):
            run(model, isopo, make_grid([sequence], "right"), [coefficient])
        return gradients(model)

    plain = isopo_gradients("qwen3-tied", 12, "reinforce", coefficients)
    assert_same(one_by_one("reinforce"), plain, 1e-10)
    euclidean = isopo_gradients("qwen3-tied", 12, paper("isopo-euclidean"), coefficients)
    assert_same(
        one_by_one(paper("isopo-euclidean")), euclidean, 1e-10
    )  # depends on its sequence alone
    together = isopo_gradients(
        "qwen3-tied", 12, paper("isopo"), coefficients, num_overlap_positions=None
    )
    alone = one_by_one(paper("isopo"))
    for name, gradient in together.items():
        assert (alone[name] - gradient).norm() > 1e-2 * gradient.norm(), name

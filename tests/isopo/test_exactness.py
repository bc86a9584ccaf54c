"""Every rule, layout and parameter against the per-sequence, per-position oracle, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.models import tiny_gpt2, tiny_qwen3
from tests.oracle import (
    Formula,
    Sequence,
    isopo_gradient,
    log_prob_of_completion,
    position_gradients,
)
from torch import Tensor, nn

from proxstep.isopo import PRESETS, IsometricRule, Isopo, NaturalRule

MODELS = {
    "qwen3-tied": lambda: tiny_qwen3(tied=True),
    "qwen3-untied": lambda: tiny_qwen3(tied=False),
    "gpt2": tiny_gpt2,
}
RULES: dict[str, tuple[object, Formula]] = {
    "reinforce": ("reinforce", Formula((0, 0, 0))),
    "isopo": ("isopo", Formula((-1, 0, 0))),
    "isopo-npg": ("isopo-npg", Formula((0, 0, -2))),
    "isopo-figure4": ("isopo-figure4", Formula((0, -1, -2))),
    "isopo-euclidean": ("isopo-euclidean", Formula((0, -1, 0))),
    "isopo-natural": ("isopo-natural", Formula(None, damping=1.0)),
    "all-powers-damped": (
        IsometricRule(-0.5, -1.5, 0.7, damping=2.0),
        Formula((-0.5, -1.5, 0.7), damping=2.0),
    ),
    "relative": (
        IsometricRule(-1.0, damping=0.5, damping_form="relative"),
        Formula((-1, 0, 0), damping=0.5, relative=True),
    ),
    "preserved": (
        IsometricRule(-1.0, 0.0, -2.0, damping=0.1, scale="preserved"),
        Formula((-1, 0, -2), damping=0.1, preserved=True),
    ),
    "natural-relative": (
        NaturalRule(0.3, damping_form="relative"),
        Formula(None, damping=0.3, relative=True),
    ),
    "natural-preserved": (
        NaturalRule(3.0, scale="preserved"),
        Formula(None, damping=3.0, preserved=True),
    ),
}
LAYOUTS = ["right", "left", "packed", "packed-rows"]


def random_sequences(seed: int, num: int = 4, vocab: int = 19) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sequences = []
    for _ in range(num):
        num_prompt, num_completion = draw(2, 5), draw(1, 7)
        tokens = [draw(0, vocab) for _ in range(num_prompt + num_completion)]
        sequences.append(Sequence(tokens, num_prompt))
    return sequences


def arrange(sequences: list[Sequence], layout: str) -> list[list[int]]:
    """Which sequences share a row."""
    if layout == "packed":
        return [list(range(len(sequences)))]
    if layout == "packed-rows":
        return [[0, 2], [3, 1]]
    return [[b] for b in range(len(sequences))]


def grid_of(sequences: list[Sequence], layout: str) -> dict[str, Tensor]:
    rows = arrange(sequences, layout)
    width = max(sum(len(sequences[b].tokens) for b in row) for row in rows)
    token = torch.full((len(rows), width), 7)
    sequence_id = torch.full((len(rows), width), -1)
    position = torch.zeros((len(rows), width), dtype=torch.long)
    for r, row in enumerate(rows):
        used = sum(len(sequences[b].tokens) for b in row)
        column = width - used if layout == "left" else 0
        for b in row:
            end = column + len(sequences[b].tokens)
            token[r, column:end] = torch.tensor(sequences[b].tokens)
            sequence_id[r, column:end] = b
            position[r, column:end] = torch.arange(len(sequences[b].tokens))
            column = end
    same = sequence_id[:, :, None] == sequence_id[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask = (same & causal)[:, None]
    return {"token": token, "sequence_id": sequence_id, "position": position, "mask": mask}


def summed_log_probs(
    model: nn.Module, sequences: list[Sequence], grid: dict[str, Tensor]
) -> Tensor:
    logits = model(
        input_ids=grid["token"], attention_mask=grid["mask"], position_ids=grid["position"]
    ).logits
    log_prob = logits.log_softmax(-1)
    total = log_prob.new_zeros(())
    for r, c in (grid["sequence_id"] >= 0).nonzero().tolist():
        sequence = sequences[grid["sequence_id"][r, c]]
        if grid["position"][r, c] >= sequence.num_prompt:
            total = total + log_prob[r, c - 1, grid["token"][r, c]]
    return total


def isopo_run(model, sequences, layout, coefficients, isopo) -> list[tuple[int, int]]:
    grid = grid_of(sequences, layout)
    with isopo.microbatch(
        grid["sequence_id"], torch.tensor(coefficients, dtype=torch.float64)
    ) as microbatch:
        summed_log_probs(model, sequences, grid).backward()
    chosen = microbatch.layout.position_T[microbatch.layout.sample_K]
    flat_id, flat_position = grid["sequence_id"].flatten(), grid["position"].flatten()
    return list(zip(flat_id[chosen].tolist(), flat_position[chosen].tolist(), strict=True))


def assert_gradients(
    model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    by_parameter: dict[int, Tensor] = {}
    modules = dict(model.named_modules())
    for key, gradient in expected.items():
        module, name = key.rsplit(".", 1)
        parameter = getattr(modules[module], name)
        by_parameter[id(parameter)] = by_parameter.get(id(parameter), 0) + gradient
    parameters = dict(model.named_parameters())
    assert {id(p) for p in parameters.values()} == set(by_parameter)
    for name, parameter in parameters.items():
        wanted = by_parameter[id(parameter)]
        error = (parameter.grad - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model_name", MODELS)
def test_two_steps_equal_the_oracle(model_name: str, rule: str, layout: str) -> None:
    seed = 10 * LAYOUTS.index(layout) + list(RULES).index(rule)
    model = build(model_name, seed)
    ours, formula = RULES[rule]
    isopo = Isopo(model, ours, num_overlap_positions=9, seed=seed)
    trailing = None
    for step in range(2):  # the second step damps by the first one's means
        sequences = random_sequences(100 * seed + step)
        coefficients = [0.7, -1.3, 0.4, 2.1]
        model.zero_grad()
        sampled = isopo_run(model, sequences, layout, coefficients, isopo)
        assert len(set(sampled)) == 9
        isopo.step()
        reference = build(model_name, seed)
        per_sequence = [position_gradients(reference, s) for s in sequences]
        expected, trailing = isopo_gradient(per_sequence, sampled, coefficients, formula, trailing)
        assert_gradients(model, expected)


@pytest.mark.parametrize("model_name", MODELS)
def test_the_oracle_sums_to_autograd(model_name: str) -> None:
    model = build(model_name, 3)
    (sequence,) = random_sequences(3, num=1)
    positions = position_gradients(model, sequence)
    log_prob_of_completion(model, sequence).backward()
    assert_gradients(model, {key: g.sum(0) for key, g in positions.items()}, 1e-12)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_powers_zero_equal_reinforce(model_name: str, layout: str) -> None:
    model = build(model_name, 5)
    sequences = random_sequences(5)
    coefficients = [1.0, -0.5, 0.25, 3.0]
    plain = build(model_name, 5)
    objective = -sum(
        c * log_prob_of_completion(plain, s) for c, s in zip(coefficients, sequences, strict=True)
    )
    objective.backward()
    isopo_run(model, sequences, layout, coefficients, Isopo(model, "reinforce"))
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error <= 1e-12, f"{name}: {error:.2e}"


def test_natural_rule_tends_to_reinforce() -> None:
    sequences, coefficients = random_sequences(8), [1.0, -2.0, 0.5, 0.3]
    plain = build("qwen3-tied", 8)
    isopo_run(plain, sequences, "right", coefficients, Isopo(plain, "reinforce"))
    errors = []
    for damping in (1e2, 1e4, 1e6):
        model = build("qwen3-tied", 8)
        isopo_run(
            model,
            sequences,
            "right",
            coefficients,
            Isopo(model, NaturalRule(damping, damping_form="relative")),
        )
        errors.append(
            max(
                float((a.grad - b.grad).norm() / b.grad.norm())
                for a, b in zip(model.parameters(), plain.parameters(), strict=True)
            )
        )
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)  # first order in 1 / c


@pytest.mark.parametrize("rule", list(PRESETS))
def test_gradient_is_linear_in_the_coefficients(rule: str) -> None:
    sequences = random_sequences(11)
    gradients = []
    for coefficients in ([1.0, 0.0, -1.0, 0.5], [0.2, 2.0, 0.3, 0.0], [1.2, 2.0, -0.7, 0.5]):
        model = build("gpt2", 11)
        isopo_run(model, sequences, "right", coefficients, Isopo(model, rule))
        gradients.append([p.grad for p in model.parameters()])
    for a, b, both in zip(*gradients, strict=True):
        assert torch.allclose(a + b, both, rtol=1e-9, atol=1e-12)


def test_accumulated_microbatches_add_up() -> None:
    sequences, coefficients = random_sequences(12), [1.0, -1.0, 0.5, 2.0]
    together = build("qwen3-tied", 12)
    rule = IsometricRule(-1.0, 0.0, 0.0)
    isopo_run(
        together,
        sequences,
        "right",
        coefficients,
        Isopo(together, rule, num_overlap_positions=None),
    )
    single = build("qwen3-tied", 12)
    isopo = Isopo(single, "reinforce")
    for b in range(4):
        isopo_run(single, sequences[b : b + 1], "right", coefficients[b : b + 1], isopo)
    plain = build("qwen3-tied", 12)
    isopo_run(plain, sequences, "right", coefficients, Isopo(plain, "reinforce"))
    for a, b, c in zip(single.parameters(), plain.parameters(), together.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(a.grad, c.grad, rtol=1e-2)

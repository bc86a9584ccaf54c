"""What is predicted of a step, against plain autograd, enumeration and what the step does."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.families import FAMILIES, MORE, build
from tests.isopo.grids import make_grid
from tests.oracle import log_prob_of_completion, random_sequences
from torch import Tensor, nn

from proxstep.budget.prediction import quadratic_kl, sampled_kl, slopes

# torch compiles its forward derivatives with something that it deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def a_direction(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """A random step. Of a row that an embedding pads with, which autograd leaves out, none."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            found[parameter] = drawn.to(parameter.dtype)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            found[module.weight][module.padding_idx] = 0.0
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_slopes_equal_the_gradients_of_each_sequence_along_the_step(family: str) -> None:
    model, sequences = build(family, 0), random_sequences(3)
    direction = a_direction(model)
    if family in ("gemma", "gemma3"):  # the head is tied to the padded row, which it moves
        sequences = [s for s in sequences if 0 not in s.tokens]
    grid = make_grid(sequences, "left")

    def log_probs() -> tuple[Tensor, Tensor]:
        logits = model(**grid.inputs, use_cache=False).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, grid.token[:, 1:, None]).squeeze(-1)
        return chosen, grid.completion[:, 1:]

    log_prob_BT, slope_BT, response_BT = slopes(model, log_probs, direction)
    for b, sequence in enumerate(sequences):
        value = log_prob_of_completion(model, sequence)
        gradients = torch.autograd.grad(value, list(direction), allow_unused=True)
        pairs = zip(gradients, direction.values(), strict=True)
        expected = sum(float((g * d).sum()) for g, d in pairs if g is not None)
        assert float(slope_BT[b][response_BT[b]].sum()) == pytest.approx(expected, rel=1e-10)
        found = float(log_prob_BT[b][response_BT[b]].sum())
        assert found == pytest.approx(value.item(), rel=1e-10)
    assert all(parameter.grad is None for parameter in direction)


class Tabular(nn.Module):
    """Two tokens out of three, the second's distribution depending on the first."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))

    def log_prob(self) -> Tensor:
        """Of every one of the nine sequences, token by token."""
        first, second = self.first.log_softmax(-1), self.second.log_softmax(-1)
        rows = [torch.stack([first[a], second[a, b]]) for a, b in PAIRS]
        return torch.stack(rows)


PAIRS = list(itertools.product(range(3), range(3)))


def test_both_forms_of_the_prediction_are_the_second_order_of_the_divergence() -> None:
    """Over all sequences with their probabilities, not over a sample."""
    model = Tabular()
    direction = a_direction(model)
    response = torch.ones(9, 2, dtype=torch.bool)
    before, slope, _ = slopes(model, lambda: (model.log_prob(), response), direction)
    probability = before.sum(dim=1).exp()
    by_token = float(probability @ quadratic_kl(slope, response))
    by_sequence = float(probability @ slope.sum(dim=1).square()) / 2
    assert by_token == pytest.approx(by_sequence, rel=1e-12)
    size = 1e-4
    with torch.no_grad():
        for parameter, step in direction.items():
            parameter += size * step
        after = model.log_prob()
    exact = float(probability @ (before - after).sum(dim=1))
    assert by_token * size**2 == pytest.approx(exact, rel=1e-3)
    estimated = float(probability @ sampled_kl(before, after, response))
    assert estimated == pytest.approx(exact, rel=1e-9)


def test_a_large_step_is_measured_without_bias() -> None:
    model = Tabular()
    response = torch.ones(9, 2, dtype=torch.bool)
    with torch.no_grad():
        before = model.log_prob()
        model.first.mul_(-1.0)
        model.second.add_(torch.tensor([2.0, 0.0, -1.0]))
        after = model.log_prob()
    probability = before.sum(dim=1).exp()
    exact = float(probability @ (before - after).sum(dim=1))
    estimated = probability @ sampled_kl(before, after, response)
    assert float(estimated) == pytest.approx(exact, rel=1e-9)


def test_tokens_that_do_not_count_do_not_count() -> None:
    response = torch.tensor([[True, False]])
    there = torch.tensor([[0.1, 5.0]])
    assert float(quadratic_kl(there, response)) == pytest.approx(0.005)
    zero = torch.zeros(1, 2)
    assert float(sampled_kl(zero, there, response)) == pytest.approx(0.00517, abs=1e-5)

"""The exact Fisher norm against enumeration of all completions, and an explicit Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from experiments.exact_fisher import exact_fisher_squares, exact_fisher_terms, sequence_gradients
from tests.models import tiny_gpt2, tiny_qwen3
from tests.oracle import Sequence, log_prob_of_completion
from torch import Tensor, nn

from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo

VOCAB, END, LONGEST = 4, 0, 3
PROMPTS = [[3, 1], [2, 2, 1]]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-tied": lambda: tiny_qwen3(tied=True, vocab=VOCAB),
    "qwen3-untied": lambda: tiny_qwen3(tied=False, vocab=VOCAB),
    "gpt2": lambda: tiny_gpt2(vocab=VOCAB),
}


def all_completions(begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every completion that ends with END, or at the limit."""
    if len(begun) == LONGEST or (begun and begun[-1] == END):
        yield begun
        return
    for token in range(VOCAB):
        yield from all_completions((*begun, token))


def grid_of(sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and which of them are completion."""
    width = max(len(s.tokens) for s in sequences)
    token = torch.full((len(sequences), width), 3)
    response = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        token[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        response[row, sequence.num_prompt : len(sequence.tokens)] = True
    return token, response[:, 1:]


def shifted_logits(token: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(input_ids=token, use_cache=False).logits[:, :-1]


def random_directions(model: nn.Module, num: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(num, *parameter.shape, dtype=parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def inner(gradients: dict[str, Tensor], directions: dict[str, Tensor], name: str) -> Tensor:
    return (directions[name] * gradients[name]).flatten(1).sum(1)


@pytest.mark.parametrize("name", MODELS)
def test_expectation_is_the_fisher_metric_of_all_completions(name: str) -> None:
    """E over completions of (d log pi . v)^2, by enumeration, is what the prefixes' terms average
    to: equation 1 for two prompts, completions of one to three tokens, every parameter.
    """
    torch.manual_seed(1)
    model = MODELS[name]()
    sequences = [Sequence([*p, *c], len(p)) for p in PROMPTS for c in all_completions()]
    assert len(sequences) == 2 * (1 + 3 + 9 * VOCAB)
    directions = random_directions(model, 2)
    expected = {key: torch.zeros(2, dtype=torch.float64) for key in directions}
    probabilities = []
    for sequence in sequences:
        log_prob = log_prob_of_completion(model, sequence)
        gradients = torch.autograd.grad(log_prob, list(model.parameters()))
        by_name = dict(zip(dict(model.named_parameters()), gradients, strict=True))
        probabilities.append(log_prob.exp().detach() / len(PROMPTS))
        for key in directions:
            expected[key] += probabilities[-1] * inner(by_name, directions, key) ** 2
    probability = torch.stack(probabilities)
    assert torch.allclose(probability.sum(), torch.ones_like(probability[0]), atol=1e-12)

    token, response = grid_of(sequences)
    terms = exact_fisher_terms(model, shifted_logits(token), response, directions)
    assert list(terms) == list(directions)
    for key, term in terms.items():
        assert (expected[key] > 0).all(), key
        assert torch.allclose(term @ probability, expected[key], rtol=1e-10, atol=0), key


@pytest.mark.parametrize("seed", range(3))
def test_linear_softmax_against_its_jacobian(seed: int) -> None:
    """Logits W x: the Fisher matrix of W is the sum over positions of (diag pi - pi pi^T) x x^T."""
    torch.manual_seed(seed)
    model = nn.Linear(5, VOCAB, bias=False, dtype=torch.float64)
    feature = torch.randn(2, 3, 5, dtype=torch.float64)
    response = torch.tensor([[True, False, True], [False, True, True]])
    fisher = torch.zeros(VOCAB * 5, VOCAB * 5, dtype=torch.float64)
    for b, t in response.nonzero().tolist():
        pi = (model.weight @ feature[b, t]).softmax(0).detach()
        x = feature[b, t]
        fisher += torch.kron(pi.diag() - torch.outer(pi, pi), torch.outer(x, x)) / 2
    direction = torch.randn(4, VOCAB, 5, dtype=torch.float64)
    expected = torch.stack([v.flatten() @ fisher @ v.flatten() for v in direction])
    found = exact_fisher_squares(model, lambda m: m(feature), response, {"weight": direction})
    assert torch.allclose(found["weight"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_sequence_gradients_against_one_sequence_at_a_time(name: str) -> None:
    torch.manual_seed(2)
    model = MODELS[name]()
    sequences = [Sequence([3, 1, 2, 0], 2), Sequence([2, 2, 1, 1, 3, 0], 3), Sequence([1, 0], 1)]
    token, response = grid_of(sequences)
    found = sequence_gradients(model, shifted_logits(token), token[:, 1:], response)
    for b, sequence in enumerate(sequences):
        log_prob = log_prob_of_completion(model, sequence)
        alone = torch.autograd.grad(log_prob, list(model.parameters()), allow_unused=True)
        for (key, _), gradient in zip(model.named_parameters(), alone, strict=True):
            assert torch.allclose(found[key][b], gradient, rtol=1e-9, atol=1e-13), key


def test_squares_are_the_mean_over_sequences_whatever_the_number_of_directions() -> None:
    torch.manual_seed(3)
    model = tiny_qwen3(vocab=VOCAB)
    token, response = grid_of([Sequence([3, 1, 2, 0], 2), Sequence([2, 2, 1, 1, 3, 0], 3)])
    key = "model.layers.0.mlp.up_proj.weight"
    directions = {key: random_directions(model, 5)[key]}
    terms = exact_fisher_terms(model, shifted_logits(token), response, directions)
    squares = exact_fisher_squares(model, shifted_logits(token), response, directions)
    assert terms[key].shape == (5, 2)
    assert torch.equal(squares[key], terms[key].mean(1))
    alone = exact_fisher_squares(model, shifted_logits(token[:1]), response[:1], directions)
    assert torch.allclose(alone[key], terms[key][:, 0], rtol=1e-10, atol=0)


def test_a_small_step_costs_half_its_square_in_kl() -> None:
    torch.manual_seed(4)
    model = tiny_qwen3(vocab=VOCAB)
    token, response = grid_of([Sequence([3, 1, 2, 0], 2)])
    key = "model.layers.0.self_attn.v_proj.weight"
    direction = random_directions(model, 1)[key]
    square = exact_fisher_squares(model, shifted_logits(token), response, {key: direction})[key]
    before = shifted_logits(token)(model)[response].log_softmax(-1)
    step = 1e-4
    with torch.no_grad():
        dict(model.named_parameters())[key].add_(step * direction[0])
    after = shifted_logits(token)(model)[response].log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum()
    assert torch.allclose(divergence, step**2 / 2 * square[0], rtol=1e-3, atol=0)


def test_what_the_logits_do_not_depend_on_is_zero_and_what_is_frozen_left_out() -> None:
    model = nn.ModuleDict({name: nn.Linear(5, VOCAB) for name in ("used", "unused", "frozen")})
    model["frozen"].requires_grad_(False)
    feature, response = torch.randn(1, 2, 5), torch.ones(1, 2, dtype=torch.bool)
    token = torch.tensor([[1, 2]])
    gradients = sequence_gradients(model, lambda m: m["used"](feature), token, response)
    assert list(gradients) == ["used.weight", "used.bias", "unused.weight", "unused.bias"]
    assert not gradients["unused.weight"].any()
    assert gradients["used.weight"].any()
    directions = {"used.bias": torch.randn(1, VOCAB), "unused.bias": torch.randn(1, VOCAB)}
    squares = exact_fisher_squares(model, lambda m: m["used"](feature), response, directions)
    assert squares["unused.bias"].item() == 0
    assert squares["used.bias"].item() > 0


def test_a_model_that_carries_an_isopo_is_measured_in_off() -> None:
    torch.manual_seed(5)
    model = tiny_qwen3(vocab=VOCAB)
    token, response = grid_of([Sequence([3, 1, 2, 0], 2)])
    directions = random_directions(model, 1)
    expected = exact_fisher_squares(model, shifted_logits(token), response, directions)
    isopo = Isopo(model, "isopo")
    with isopo.off():
        found = exact_fisher_squares(model, shifted_logits(token), response, directions)
    for key, square in expected.items():
        assert torch.allclose(found[key], square, rtol=1e-10, atol=0), key


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({"bais": torch.zeros(1, VOCAB)}, "'bais', which is no trainable parameter"),
        ({"bias": torch.zeros(VOCAB)}, r"shape \(4,\).*directions of shape \(4,\)"),
        ({"bias": torch.zeros(0, VOCAB)}, r"shape \(0, 4\)"),
    ],
)
def test_directions_that_fit_no_parameter(directions: dict[str, Tensor], message: str) -> None:
    model, feature = nn.Linear(5, VOCAB), torch.randn(1, 2, 5)
    response = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ProxstepError, match=message):
        exact_fisher_squares(model, lambda m: m(feature), response, directions)


def test_logits_that_do_not_fit() -> None:
    model, feature = nn.Linear(5, VOCAB), torch.randn(1, 2, 5)
    direction = {"bias": torch.ones(1, VOCAB)}
    response = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ProxstepError, match=r"\(1, 2, 4\).*\(1, 3\)"):
        exact_fisher_squares(model, lambda m: m(feature), response, direction)
    with pytest.raises(ProxstepError, match="without a graph"):
        exact_fisher_squares(model, lambda m: m(feature).detach(), response[:, 1:], direction)

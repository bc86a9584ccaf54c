"""The oracle itself, and that the models it is asked about are exact in float64."""

from __future__ import annotations

import pytest
import torch
from peft.helpers import DoraCaching
from tests.families import FAMILIES, UNCOVERED, build
from tests.models import EXACT
from tests.oracle import (
    Sequence,
    log_prob_of_completion,
    position_gradients,
    random_sequences,
    summed_by_parameter,
)
from tests.selection import square
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SEEDS = range(3)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    parameters = trainable(model)
    values = torch.autograd.grad(value, list(parameters.values()))
    return dict(zip(parameters, values, strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name] - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def sums(model: nn.Module, sequence: Sequence) -> dict[str, Tensor]:
    positions = position_gradients(model, sequence)
    return summed_by_parameter(model, {key: g.sum(0) for key, g in positions.items()})


@pytest.mark.parametrize(("family", "seed"), square(FAMILIES, SEEDS))
def test_positions_sum_to_autograd(family: str, seed: int) -> None:
    model = build(family, seed)
    for sequence in random_sequences(seed):
        expected = gradients(model, log_prob_of_completion(model, sequence))
        assert_same(sums(model, sequence), expected, 1e-12)


@pytest.mark.parametrize(
    ("family", "length"),
    square(FAMILIES, [3, 4, 6]),  # four: as many as heads
)
def test_positions_are_where_the_tokens_are(family: str, length: int) -> None:
    """The last token is predicted and predicts nothing; the one before it is the last to matter."""
    model = build(family, length)
    (sequence,) = random_sequences(length, num=1)
    sequence = Sequence((sequence.tokens * length)[:length], num_prompt=1)
    for key, gradient in position_gradients(model, sequence).items():
        assert gradient.shape[0] == length
        assert (gradient[-1] == 0).all(), key
        assert (gradient[-2] != 0).any(), key


@pytest.mark.parametrize("family", ["qwen3-untied", "phi", "gpt2"])
def test_positions_of_a_layer_are_outer_products(family: str) -> None:
    """What hooks see of a linear layer or an embedding: g_t a_t^T, and g_t in the token's row."""
    model = build(family, 4)
    (sequence,) = random_sequences(4, num=1)
    positions = position_gradients(model, sequence)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in positions and module.get_parameter("weight").dim() == 2:
            module.register_forward_hook(
                lambda module, args, y, name=name: seen.update({name: (args[0], y)})
            )
    value = log_prob_of_completion(model, sequence)
    outputs = [y for _, y in seen.values()]
    for (name, (x, _)), grad in zip(seen.items(), torch.autograd.grad(value, outputs), strict=True):
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            x = nn.functional.one_hot(x, module.num_embeddings).to(grad.dtype)
        outer = torch.einsum("bto,bti->toi", grad, x)
        transposed = not isinstance(module, nn.Linear)  # an embedding's table, a Conv1D's weight
        wanted = outer.mT if transposed else outer
        error = (positions[f"{name}.weight"] - wanted).norm() / wanted.norm()
        assert error <= 1e-12, f"{name}: {error:.2e}"


@pytest.mark.parametrize("family", ["qwen3-lora", "llama-lora-bias", "llama-dora"])
def test_frozen_parameters_get_no_copies(family: str) -> None:
    model = build(family, 0)
    (sequence,) = random_sequences(0, num=1)
    assert position_gradients(model, sequence).keys() == trainable(model).keys()


def test_freezing_changes_no_other_gradient() -> None:
    """A frozen weight beside a trainable bias, and layers that are frozen whole."""
    model = build("llama", 1)
    (sequence,) = random_sequences(1, num=1)
    before = position_gradients(model, sequence)
    frozen = {"model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    after = position_gradients(model, sequence)
    assert after.keys() == before.keys() - frozen
    assert all(torch.equal(after[key], before[key]) for key in after)


def test_a_frozen_magnitude_still_scales_the_factors() -> None:
    model = build("qwen3-dora", 2)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.requires_grad_(False)
    (sequence,) = random_sequences(2, num=1)
    expected = gradients(model, log_prob_of_completion(model, sequence))
    assert_same(sums(model, sequence), expected, 1e-12)


def test_what_the_oracle_does_not_know_is_named() -> None:
    (sequence,) = random_sequences(0, num=1)
    with pytest.raises(ValueError, match="lora_embedding_A"):
        position_gradients(build("qwen3-lora-embedding", 0), sequence)


def test_a_parameter_that_is_used_twice_is_named() -> None:
    model = build("gpt2", 0)
    block = model.get_submodule("transformer.h.1")
    block.ln_2 = block.ln_1
    (sequence,) = random_sequences(0, num=1)
    with pytest.raises(ValueError, match=r"ln_1\.weight is used twice"):
        position_gradients(model, sequence)


class _Dtypes(TorchDispatchMode):
    """Collects the floating types that a computation produces."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.seen.add(value.dtype)
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_computed_in_float32(family: str) -> None:
    """Forward and backward; the library's own layers do, where there are exact ones for them."""
    (sequence,) = random_sequences(6, num=1)
    for exact in (True, False):
        model = build(family, 6, exact=exact)
        with _Dtypes() as dtypes:
            log_prob_of_completion(model, sequence).backward()
        casts = any(type(module) in EXACT for module in model.modules())
        assert dtypes.seen == ({torch.float64, torch.float32} if casts else {torch.float64})
        assert not (exact and casts)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_finite_differences(family: str) -> None:
    """Along a random direction, with DoRA's norms at their first value, as backward takes them."""
    model = build(family, 7)
    (sequence,) = random_sequences(7, num=1)
    generator = torch.Generator().manual_seed(7)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in trainable(model).items()
    }
    exact = gradients(model, log_prob_of_completion(model, sequence))
    slope = sum((exact[name] * direction[name]).sum() for name in exact)

    def shifted(step: float) -> Tensor:
        start = {name: p.data for name, p in trainable(model).items()}
        for name, parameter in trainable(model).items():
            parameter.data = start[name] + step * direction[name]
        value = log_prob_of_completion(model, sequence).detach()
        for name, parameter in trainable(model).items():
            parameter.data = start[name]
        return value

    with DoraCaching():
        log_prob_of_completion(model, sequence)  # fills the cache of norms
        h = 1e-4
        near, far = shifted(h) - shifted(-h), shifted(2 * h) - shifted(-2 * h)
    difference = (8 * near - far) / (12 * h)
    assert abs(difference - slope) <= 1e-7 * abs(slope)


def _batched_log_prob(model: nn.Module, sequences: list[Sequence], side: str) -> Tensor:
    """The sum over the sequences, of one padded batch."""
    width = max(len(s.tokens) for s in sequences)
    token = torch.full((len(sequences), width), 5)
    mask = torch.zeros_like(token)
    for b, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        columns = slice(width - length, width) if side == "left" else slice(length)
        token[b, columns], mask[b, columns] = torch.tensor(sequence.tokens), 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=token, attention_mask=mask, position_ids=position).logits
    log_prob = logits[:, :-1].log_softmax(-1).gather(-1, token[:, 1:, None]).squeeze(-1)
    prompt = torch.tensor([s.num_prompt for s in sequences])
    completion = (mask == 1) & (position >= prompt[:, None])
    return (log_prob * completion[:, 1:]).sum()


@pytest.mark.parametrize(("family", "side"), square(FAMILIES, ["right", "left"]))
def test_a_padded_batch_gives_the_sum_over_sequences(family: str, side: str) -> None:
    model, sequences = build(family, 8), random_sequences(8)
    together = gradients(model, _batched_log_prob(model, sequences, side))
    alone = gradients(
        model, torch.stack([log_prob_of_completion(model, s) for s in sequences]).sum()
    )
    assert_same(together, alone, 1e-12)


@pytest.mark.parametrize("family", [*FAMILIES, *UNCOVERED])
def test_a_seed_gives_one_model_in_every_dtype(family: str) -> None:
    state = torch.get_rng_state()
    double, single, half = (
        build(family, 9, dtype, exact=False)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert torch.equal(torch.get_rng_state(), state)
    other = build(family, 10)
    for (name, a), b, c, d in zip(
        double.named_parameters(),
        single.parameters(),
        half.parameters(),
        other.parameters(),
        strict=True,
    ):
        adapter = "lora_" in name
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        assert c.dtype == (torch.float32 if adapter else torch.bfloat16)
        assert torch.equal(a, b.double())
        assert torch.equal(c, b.to(c.dtype))
        assert not torch.equal(a, d), name
    assert all(type(m) not in EXACT.values() for m in single.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_layers_are_the_librarys(family: str) -> None:
    """Up to float32's precision, which the library's own layers have in a float64 model as well."""
    (sequence,) = random_sequences(11, num=1)
    exact = build(family, 11)
    expected = gradients(exact, log_prob_of_completion(exact, sequence))
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        library = build(family, 11, dtype, exact=False)
        ours = gradients(library, log_prob_of_completion(library, sequence))
        assert_same({name: g.double() for name, g in ours.items()}, expected, tolerance)

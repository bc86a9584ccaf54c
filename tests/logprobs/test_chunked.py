"""Chunked log-probabilities against log_softmax over all logits at once."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from proxstep.errors import ProxstepError
from proxstep.logprobs.chunked import (
    CHUNK_BYTES,
    chunked_log_probs,
    default_chunk_size,
    logit_gradient,
    logits_of,
)

N, D, V = 11, 6, 17


@dataclass
class Inputs:
    """Random inputs; `scale` is about the standard deviation of the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token: Tensor
    upstream: Tensor

    @classmethod
    def draw(
        cls, seed: int, sizes=(N, D, V), dtype=torch.float64, bias: bool = True, scale: float = 3.0
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n, d, v = sizes
        return cls(
            normal(n, d).to(dtype).requires_grad_(),
            (normal(v, d) * scale / math.sqrt(d)).to(dtype).requires_grad_(),
            normal(v).to(dtype).requires_grad_() if bias else None,
            torch.randint(v, (n,), generator=generator),
            normal(n),
        )

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers as new leaves."""
        hidden, weight, *rest = (x.detach().to(dtype).requires_grad_() for x in self.leaves())
        return Inputs(hidden, weight, rest[0] if rest else None, self.token, self.upstream)


def full_log_probs(inputs: Inputs, temperature: float = 1.0) -> Tensor:
    """What the model's own head gives: every logit in the inputs' dtype, then widened."""
    logits = nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.log_softmax(-1).gather(1, inputs.token[:, None]).squeeze(1)


def chunked(inputs: Inputs, **options) -> Tensor:
    return chunked_log_probs(
        inputs.hidden, inputs.weight, inputs.token, bias_V=inputs.bias, **options
    )


def gradients(log_prob: Tensor, inputs: Inputs) -> list[Tensor]:
    total = (log_prob * inputs.upstream.to(log_prob.dtype)).sum()
    return list(torch.autograd.grad(total, inputs.leaves()))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, N, 100, None])
def test_float64_equals_log_softmax(
    seed: int, temperature: float, bias: bool, chunk_size: int | None
) -> None:
    inputs = Inputs.draw(seed, bias=bias)
    expected = full_log_probs(inputs, temperature)
    found = chunked(inputs, temperature=temperature, chunk_size=chunk_size)
    assert (found - expected).abs().max() <= 1e-12
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("chunk_size", [2, None])
def test_gradcheck(chunk_size: int | None) -> None:
    inputs = Inputs.draw(7, sizes=(5, 3, 4))

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_log_probs(
            hidden, weight, inputs.token, bias_V=bias, temperature=0.7, chunk_size=chunk_size
        )

    assert torch.autograd.gradcheck(function, inputs.leaves())


@pytest.mark.parametrize("seed", range(3))
def test_float32_keeps_six_digits(seed: int) -> None:
    inputs = Inputs.draw(seed, sizes=(64, 32, 997), dtype=torch.float32)
    exact = full_log_probs(inputs.to(torch.float64))
    found = chunked(inputs, chunk_size=5)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() / exact.abs()).max() <= 1e-6
    wide = inputs.to(torch.float64)
    exact_gradients = gradients(full_log_probs(wide), wide)
    for ours, theirs in zip(gradients(found, inputs), exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("chunk_size", [1, 16, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_narrow_inputs_are_no_worse_than_the_full_head(
    seed: int, dtype: torch.dtype, chunk_size: int | None
) -> None:
    inputs = Inputs.draw(seed, sizes=(128, 32, 97), dtype=dtype)
    wide = inputs.to(torch.float64)
    exact = full_log_probs(wide, 0.8)
    full, found = (
        full_log_probs(inputs, 0.8),
        chunked(inputs, temperature=0.8, chunk_size=chunk_size),
    )
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, exact) <= 2 * relative_error(full, exact)
    for ours, theirs, true in zip(
        gradients(found, inputs), gradients(full, inputs), gradients(exact, wide), strict=True
    ):
        assert ours.dtype == dtype
        assert relative_error(ours, true) <= 2 * relative_error(theirs, true)


def test_narrow_gradients_add_up_over_many_chunks() -> None:
    inputs = Inputs.draw(4, sizes=(2000, 2, 3), dtype=torch.bfloat16)
    with torch.no_grad():
        inputs.hidden.abs_()  # sums that grow: in bfloat16 they would come to a halt
        inputs.upstream.abs_()
        inputs.token.zero_()
    wide = inputs.to(torch.float64)
    exact = gradients(full_log_probs(wide), wide)
    full = gradients(full_log_probs(inputs), inputs)
    ours = gradients(chunked(inputs, chunk_size=1), inputs)
    for mine, theirs, true in zip(ours, full, exact, strict=True):
        assert relative_error(mine, true) <= 2 * relative_error(theirs, true)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_large_logits_keep_their_digits(seed: int, scale: float) -> None:
    inputs = Inputs.draw(seed, sizes=(50, 1, 23), dtype=torch.float32, bias=False, scale=scale)
    exact = full_log_probs(inputs.to(torch.float64))
    found = chunked(inputs, chunk_size=7)
    assert exact.min() < -scale
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-7 * scale)
    assert all(gradient.isfinite().all() for gradient in gradients(found, inputs))


def test_near_ties_of_large_logits_keep_their_digits() -> None:
    logits = torch.tensor([[4096.0, 4096.25, 4095.5]])  # exact in float32; logsumexp is not
    found, entropy = chunked_log_probs(
        torch.ones(1, 1), logits.mT, torch.tensor([0]), with_entropy=True
    )
    exact = logits.double().log_softmax(-1)
    assert found.item() == pytest.approx(exact[0, 0].item(), rel=1e-6)
    assert entropy.item() == pytest.approx(-(exact.exp() * exact).sum().item(), rel=1e-6)


def test_forbidden_tokens() -> None:
    inputs = Inputs.draw(3)
    assert inputs.bias is not None
    allowed = torch.arange(V) % 2 == 0
    with torch.no_grad():
        inputs.bias[~allowed] = -math.inf
        inputs.token = inputs.token // 2 * 2
    found, entropy = chunked(inputs, with_entropy=True, chunk_size=4)
    few = Inputs(
        inputs.hidden,
        inputs.weight[allowed],
        inputs.bias[allowed],
        inputs.token // 2,
        inputs.upstream,
    )
    assert torch.allclose(found, full_log_probs(few), atol=1e-12)
    assert entropy.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(found, inputs))


@pytest.mark.parametrize("seed", range(3))
def test_entropy(seed: int) -> None:
    inputs = Inputs.draw(seed)
    found, entropy = chunked(inputs, temperature=0.7, chunk_size=3, with_entropy=True)
    logits = logits_of(inputs.hidden, inputs.weight, inputs.bias, 0.7)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert (entropy - expected).abs().max() <= 1e-12
    assert not entropy.requires_grad
    plain = chunked(inputs, temperature=0.7, chunk_size=3)
    assert torch.equal(found, plain)
    for ours, theirs in zip(gradients(found, inputs), gradients(plain, inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(num_rows: int) -> None:
    inputs = Inputs.draw(5, sizes=(num_rows, D, V))
    found, entropy = chunked(inputs, with_entropy=True)
    assert found.shape == entropy.shape == (num_rows,)
    expected = full_log_probs(inputs)
    assert torch.allclose(found, expected, atol=1e-12)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_needed(needed: str) -> None:
    inputs, other = Inputs.draw(6), Inputs.draw(6)
    for name in {"hidden", "weight", "bias"} - {needed}:
        getattr(inputs, name).requires_grad_(False)
    with Largest() as seen:
        (chunked(inputs, chunk_size=2) @ inputs.upstream).backward()
    (full_log_probs(other) @ other.upstream).backward()
    assert torch.allclose(getattr(inputs, needed).grad, getattr(other, needed).grad, atol=1e-12)
    assert [x.grad is not None for x in inputs.leaves()].count(True) == 1
    assert ((V, D) in seen.shapes) == (needed == "weight")


def test_without_gradients_nothing_is_kept() -> None:
    inputs = Inputs.draw(6)
    with torch.no_grad():
        assert chunked(inputs).grad_fn is None


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and the most that lives at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.peak, self.shapes = 0, 0, set()
        self._live: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
                self.shapes.add(tuple(value.shape))
                self._live.append(weakref.ref(value))
        storages = {}
        self._live = [ref for ref in self._live if ref() is not None]
        for ref in self._live:
            value = ref()
            if value is not None:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        self.peak = max(self.peak, sum(storages.values()))
        return out


def watch(function) -> Largest:
    with Largest() as seen:
        function()
    return seen


def test_logits_never_exist_at_once() -> None:
    num_rows, vocab, size = 64, 1009, 16
    inputs = Inputs.draw(8, sizes=(num_rows, D, vocab), dtype=torch.float32)

    def run(log_prob: Tensor) -> None:
        (log_prob @ inputs.upstream.float()).backward()

    full = watch(lambda: run(full_log_probs(inputs)))
    assert full.numel >= num_rows * vocab
    assert full.peak >= 2 * num_rows * vocab * 4
    leaves = 4 * sum(x.numel() for x in inputs.leaves())
    vectors = 8 * 8 * num_rows
    for with_entropy in (False, True):
        options = {"chunk_size": size, "with_entropy": with_entropy}
        with torch.no_grad(), Largest() as forward:
            chunked(inputs, **options)
        assert forward.numel == size * vocab
        assert forward.peak <= 4 * size * vocab + leaves + vectors
        ours = watch(lambda options=options: run(log_prob_of(chunked(inputs, **options))))
        assert ours.numel == size * vocab
        assert ours.peak <= 4 * size * vocab + 2 * leaves + vectors


def log_prob_of(scores: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return scores[0] if isinstance(scores, tuple) else scores


def test_forward_keeps_its_inputs_and_nothing_else() -> None:
    inputs = Inputs.draw(9)
    kept = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.data_ptr())
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        chunked(inputs, chunk_size=2)
    assert set(kept) == {x.data_ptr() for x in (*inputs.leaves(), inputs.token)}


def test_default_chunk_fits_the_budget() -> None:
    for vocab in (32_768, 151_936):
        rows = default_chunk_size(torch.empty(vocab, 1, dtype=torch.bfloat16, device="meta"))
        assert rows * vocab * 4 <= CHUNK_BYTES < (rows + 1) * vocab * 4
    assert default_chunk_size(torch.empty(CHUNK_BYTES, 1, device="meta")) == 1


@pytest.mark.parametrize("with_bias", [True, False])
def test_autocast_casts_as_for_a_linear_layer(with_bias: bool) -> None:
    inputs = Inputs.draw(10, sizes=(20, D, V), dtype=torch.float32, bias=with_bias)
    narrow = inputs.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(inputs, chunk_size=3)
        ours = gradients(found, inputs)
    expected = chunked(narrow, chunk_size=3)
    assert torch.equal(found, expected)
    for mine, theirs in zip(ours, gradients(expected, narrow), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())


def test_backward_inside_autocast_recomputes_what_forward_computed() -> None:
    inputs = Inputs.draw(10, dtype=torch.float32)
    expected = gradients(chunked(inputs, chunk_size=3), inputs)
    found = chunked(inputs, chunk_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(found, inputs)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_leaves_float64() -> None:
    inputs = Inputs.draw(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(inputs)
    assert torch.equal(found, chunked(inputs))


def test_a_second_derivative_is_refused() -> None:
    inputs = Inputs.draw(11)
    total = (chunked(inputs) * inputs.upstream.requires_grad_()).sum()
    (gradient,) = torch.autograd.grad(total, inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_weights_changed_before_backward_are_noticed() -> None:
    inputs = Inputs.draw(12)
    total = chunked(inputs).sum()
    with torch.no_grad():
        inputs.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ProxstepError, match="temperature"):
        chunked(Inputs.draw(0), temperature=temperature)


def test_chunk_size_must_be_positive() -> None:
    with pytest.raises(ProxstepError, match="chunk_size"):
        chunked(Inputs.draw(0), chunk_size=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logit_gradient_is_that_of_the_layer_s_outputs(temperature: float) -> None:
    inputs = Inputs.draw(13)
    output = nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias).detach()
    output.requires_grad_()
    log_prob = (output / temperature).log_softmax(-1).gather(1, inputs.token[:, None]).squeeze(1)
    (expected,) = torch.autograd.grad(log_prob @ inputs.upstream, output)
    logits = logits_of(inputs.hidden, inputs.weight, inputs.bias, temperature).detach()
    found = logit_gradient(logits, inputs.token, inputs.upstream, temperature)
    assert (found - expected).abs().max() <= 1e-14
    assert found.data_ptr() == logits.data_ptr()

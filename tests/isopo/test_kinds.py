"""Kinds of layers beside the ordinary ones: what is covered, what is refused, what is rescued."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import models
from tests.families import build
from tests.isopo.rules import paper
from tests.isopo.test_install import COEFFICIENTS, IDS, TOKENS, gradients, log_probs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxstep import Isopo, ProxstepError


def plain_gradient(model: nn.Module) -> dict[str, Tensor]:
    """-sum_b coefficient_b G_b, by plain autograd."""
    model.zero_grad()
    (-(COEFFICIENTS[:, None] * log_probs(model)).sum()).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def per_sequence(model: nn.Module) -> list[dict[str, Tensor]]:
    found = []
    for b in range(2):
        model.zero_grad()
        log_probs(model)[b].sum().backward()
        found.append(gradients(model))
    model.zero_grad()
    return found


def isopo_gradient(model: nn.Module, rule: str = "isopo", **options: Any) -> dict[str, Tensor]:
    isopo = Isopo(model, paper(rule), **options)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    isopo.remove()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: Tensor, wanted: Tensor, error: float = 1e-10) -> None:
    assert (ours - wanted).norm() <= error * wanted.norm()


# -- rescued ---------------------------------------------------------------------------------------


class Mix(nn.Module):
    """A product that ISOPO does not see into, and one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix * self.scale


class Odd(nn.Module):
    """A model with a product that is not covered and, if asked for, a convolution."""

    def __init__(self, convolves: bool = False, checkpoints: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 8)
        self.up, self.mix, self.head = nn.Linear(8, 8), Mix(), nn.Linear(8, 19)
        self.conv = nn.Conv1d(8, 8, 2) if convolves else None
        self.checkpoints = checkpoints

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        x = self.table(input_ids)
        if self.conv is not None:
            x = x + self.conv(F.pad(x.mT, (1, 0))).mT
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpoints else self.middle(x)
        return SimpleNamespace(logits=self.head(x))

    def middle(self, x: Tensor) -> Tensor:
        return self.mix(self.up(x).tanh())


def odd(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return Odd(**options).double()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_what_is_not_covered_gets_the_plain_gradient(checkpoints: bool) -> None:
    model = odd(convolves=True, checkpoints=checkpoints)
    wanted = plain_gradient(model)
    found = isopo_gradient(model, "isopo-euclidean", other_parameters="reinforce")
    assert found.keys() == wanted.keys()
    for name in ("mix.mix", "mix.scale", "conv.weight", "conv.bias", "table.weight", "up.bias"):
        assert_close(found[name], wanted[name])
    transformed = per_sequence(model)
    for name in ("up.weight", "head.weight"):
        parts = [
            c * g[name] / g[name].norm() for c, g in zip(COEFFICIENTS, transformed, strict=True)
        ]
        assert_close(found[name], -sum(parts), 1e-6)  # |G_b|^2 is damped by 1e-8


def test_microbatches_of_rescued_parameters_add_up() -> None:
    model = odd(convolves=True)
    wanted = plain_gradient(model)
    isopo = Isopo(model, other_parameters="reinforce")
    for part in (slice(1), slice(1, 2)):
        with isopo.microbatch(IDS[part] * 0 - (IDS[part] < 0).long(), COEFFICIENTS[part]) as one:
            logits = model(input_ids=TOKENS[part]).logits[:, :-1].log_softmax(-1)
            chosen = logits.gather(-1, TOKENS[part][:, 1:, None]).squeeze(-1)
            one.objective(chosen, IDS[part][:, 1:] >= 0).backward()
    for name in ("mix.mix", "conv.weight"):
        assert_close(gradients(model)[name], wanted[name])


def test_off_leaves_rescued_parameters_alone() -> None:
    model = odd(convolves=True)
    wanted = plain_gradient(model)
    isopo = Isopo(model, other_parameters="reinforce")
    with isopo.off():
        (-(COEFFICIENTS[:, None] * log_probs(model)).sum()).backward()
    for name, value in gradients(model).items():
        assert_close(value, wanted[name])


def test_rescue_needs_the_objective() -> None:
    model = odd(convolves=True)
    isopo = Isopo(model, other_parameters="reinforce")
    with (
        isopo.microbatch(IDS, COEFFICIENTS),
        pytest.raises(ProxstepError, match=r"from another loss than microbatch\.objective"),
    ):
        log_probs(model).sum().backward()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model).flatten())
        with pytest.raises(ProxstepError, match=r"shape \(2, 4\)"):
            total.backward()


def test_without_reinforce_both_are_refused_by_name() -> None:
    with pytest.raises(ProxstepError, match=r"conv\.weight \(Conv1d\).*other_parameters=\"rein"):
        Isopo(odd(convolves=True))
    model = odd()
    isopo = Isopo(model)
    with (
        isopo.microbatch(IDS, COEFFICIENTS),
        pytest.raises(ProxstepError, match=r"mix\.mix: Mix\.forward uses it in matmul.*Freeze"),
    ):
        log_probs(model)
    model.mix.mix.requires_grad_(False)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()


# -- a module's own forward ------------------------------------------------------------------------


class Uses(nn.Module):
    """One parameter and how it is used."""

    def __init__(self, parameter: Tensor, use: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)
        self.inner = Inner(parameter, use)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.inner(self.table(input_ids))))


class Inner(nn.Module):
    def __init__(self, parameter: Tensor, use: Any) -> None:
        super().__init__()
        self.parameter, self.use = nn.Parameter(parameter), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.parameter)


COVERED = {
    "scale": (8, lambda x, w: x * w),
    "reflected": (8, lambda x, w: w - x),
    "in-place": (8, lambda x, w: x.clone().mul_(w)),
    "not the identity": (8, lambda x, w: x * torch.exp(2 * w)),
    "twice": (8, lambda x, w: x * w + w),
    "one number": ((), lambda x, w: x * w),
    "flattened": (8, lambda x, w: (x.flatten(0, 1) * w).view_as(x)),
    "heads last": ((2, 4), lambda x, w: (x.unflatten(-1, (2, 4)) * w).flatten(-2)),
    "heads first": (4, lambda x, w: heads_first(x, lambda h: h * w)),
    "per head first": ((2, 1, 4), lambda x, w: heads_first(x, lambda h: h * w)),
    "positions": ((7, 8), lambda x, w: x + w[: x.shape[1]]),
    "positions, looked up": ((7, 8), lambda x, w: x + w[torch.arange(x.shape[1])]),
    "positions, all": ((1, 5, 8), lambda x, w: x * w),
    "positions, F.embedding": ((7, 8), lambda x, w: x + F.embedding(torch.arange(5), w)),
    "linear": ((8, 8), lambda x, w: F.linear(x, w).tanh()),
    "linear, transposed": ((8, 8), lambda x, w: F.linear(x, w.t()).tanh()),
    "linear, flattened": ((8, 8), lambda x, w: F.linear(x.view(-1, 8), w).view_as(x)),
    "linear, bias alone": (8, lambda x, w: F.linear(x, torch.eye(8).double(), w).tanh()),
    "layer_norm": (8, lambda x, w: F.layer_norm(x, (8,), w)),
    "layer_norm, bias alone": (8, lambda x, w: F.layer_norm(x, (8,), None, w)),
    "layer_norm, 1 + w": (8, lambda x, w: F.layer_norm(x, (8,), 1 + w, w)),
    "layer_norm, bias of its own": (8, lambda x, w: F.layer_norm(x, (8,), None, 2 * w)),
    "rms_norm": (8, lambda x, w: F.rms_norm(x, (8,), w)),
    "rms_norm, 1 + w": (8, lambda x, w: F.rms_norm(x, (8,), w + 1)),
}


def heads_first(x: Tensor, function: Any) -> Tensor:
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return function(heads).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("name", COVERED)
def test_uses_in_a_forward_of_ones_own(name: str) -> None:
    shape, use = COVERED[name]
    torch.manual_seed(0)
    model = Uses(torch.randn(shape), use).double()
    wanted = per_sequence(model)
    found = isopo_gradient(model, "isopo-euclidean")
    for key in found:
        scales = [
            c / (g[key].norm() ** 2 + 1e-8) ** 0.5
            for c, g in zip(COEFFICIENTS, wanted, strict=True)
        ]
        assert_close(found[key], -sum(s * g[key] for s, g in zip(scales, wanted, strict=True)))


class RMSNorm(nn.Module):
    """Of the name of transformers' classes, and not one of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class SumRMSNorm(RMSNorm):
    """Whose result would change if the weight were repeated over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / self.weight.detach().norm()


class ZeroRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


class NamedOtherwise(nn.RMSNorm):
    """With torch's own forward."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [RMSNorm, SumRMSNorm, ZeroRMSNorm, NamedOtherwise])
def test_a_norm_is_known_by_its_forward(kind: type[nn.Module], seed: int) -> None:
    """Its name says nothing of what it computes."""
    torch.manual_seed(seed)
    model = Uses(torch.randn(8), lambda x, w: x * w).double()
    model.inner = kind(8).double()
    nn.init.normal_(model.inner.weight)
    wanted, log_prob = plain_gradient(model), log_probs(model).detach()
    with Isopo(model).microbatch(IDS, COEFFICIENTS):
        assert torch.allclose(log_probs(model), log_prob, rtol=1e-13)
    for name, value in isopo_gradient(model, "reinforce").items():
        assert_close(value, wanted[name])


REFUSED = {
    "matmul": ((8, 8), lambda x, w: x @ w),
    "columns first": (8, lambda x, w: (x.transpose(0, 1) * w).transpose(0, 1)),
    "for each row": ((2, 1, 8), lambda x, w: x * w),
    "an index of rows": ((2, 8), lambda x, w: x + w[torch.tensor([[True, False]]).expand(1, 2)[0]]),
    "einsum": ((8, 8), lambda x, w: torch.einsum("bti,oi->bto", x, w)),
    "sum": (8, lambda x, w: x * w.sum()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused_by_name(name: str) -> None:
    shape, use = REFUSED[name]
    model = Uses(torch.randn(shape), use).double()
    with (
        Isopo(model).microbatch(IDS, COEFFICIENTS),
        pytest.raises(ProxstepError, match=r"inner\.parameter: Inner\.forward uses it in .*covers"),
    ):
        log_probs(model)


def test_a_tied_head_by_another_product_is_found() -> None:
    """Its gradient would lack the coefficients, and the embedding's own hides it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(19, 8)

        def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table(input_ids).tanh() @ self.table.weight.mT)

    model = Tied().double()
    with Isopo(model).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model))
        with pytest.raises(ProxstepError, match=r"table\.weight is used past its layer's forward"):
            total.backward()


# -- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
def test_experts_in_each_implementation(how: str) -> None:
    found = []
    for one in ("eager", how):
        torch.manual_seed(0)
        model = models.finish(models.qwen3_moe(one), torch.float32, exact=False)
        wanted = log_probs(model)
        with Isopo(model).microbatch(IDS, COEFFICIENTS):
            assert torch.equal(log_probs(model), wanted)
        found.append(isopo_gradient(model, "isopo-euclidean"))
    for name in found[0]:
        assert_close(found[1][name], found[0][name], 1e-4)


def test_experts_keep_samples_for_the_next_step() -> None:
    model = build("qwen3-moe", 0)
    options = {"overlap_source": "previous_step", "num_overlap_positions": 4}
    isopo = Isopo(model, **options)  # type: ignore[arg-type]
    for _ in range(2):
        with isopo.microbatch(IDS, COEFFICIENTS, sequence_keys=torch.arange(2)) as microbatch:
            microbatch.objective(log_probs(model)).backward()
        isopo.step()
    twin = Isopo(copy.deepcopy(model), **options)  # type: ignore[arg-type]
    twin.load_state_dict(isopo.state_dict())


def test_experts_on_several_devices_are_refused() -> None:
    model = build("qwen3-moe", 0)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with (
        Isopo(model).microbatch(IDS, COEFFICIENTS),
        pytest.raises(ProxstepError, match=r"experts: .*one device.*freeze the experts"),
    ):
        log_probs(model)


# -- nn.MultiheadAttention -------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)
        self.inner = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        nn.init.normal_(self.inner.in_proj_bias)
        self.options = {"need_weights": need_weights}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        x = self.table(input_ids)
        x = x if self.inner.batch_first else x.transpose(0, 1)
        size = input_ids.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).triu(1)
        padding = attention_mask == 0
        y = self.inner(x, x, x, key_padding_mask=padding, attn_mask=mask, **self.options)[0]
        return SimpleNamespace(logits=self.head(y if self.inner.batch_first else y.transpose(0, 1)))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_in_its_forms(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    model = Attends(batch_first, need_weights).double()
    wanted = per_sequence(model)
    found = isopo_gradient(model, "isopo-euclidean")
    assert set(found) == {name for name, _ in model.named_parameters()}
    for key in found:
        scales = [
            c / (g[key].norm() ** 2 + 1e-8) ** 0.5
            for c, g in zip(COEFFICIENTS, wanted, strict=True)
        ]
        assert_close(found[key], -sum(s * g[key] for s, g in zip(scales, wanted, strict=True)))


def test_cross_attention_is_refused() -> None:
    inner = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with (
        Isopo(inner).microbatch(IDS, COEFFICIENTS),
        pytest.raises(ProxstepError, match=r"in_proj_weight: .*self-attention"),
    ):
        inner(x, x + 1, x)


class Encodes(nn.Module):
    """One of torch's own transformer layers, which are columns first unless told otherwise."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.rows_first = batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        x, size = self.table(input_ids), input_ids.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).triu(1)
        x = x if self.rows_first else x.transpose(0, 1)
        x = self.inner(x, src_mask=mask, src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(logits=self.head(x if self.rows_first else x.transpose(0, 1)))


@pytest.mark.parametrize("seed", range(3))
def test_torchs_own_layer_is_right_rows_first(seed: int) -> None:
    torch.manual_seed(seed)
    model = Encodes(True).double()
    wanted = plain_gradient(model)
    for name, value in isopo_gradient(model, "reinforce").items():
        assert_close(value, wanted[name])


def test_torchs_own_layer_is_refused_columns_first() -> None:
    """Read as rows, they would mix the sequences, and nothing else would show it."""
    model = Encodes(False).double()
    with Isopo(model).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model))
        with pytest.raises(ProxstepError, match=r"inner\.norm2\.\w+ saw .* batch_first=True"):
            total.backward()


@pytest.mark.parametrize("shape", [(5, 2, 8), (5, 2, 2, 4)])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_are_refused_columns_first(shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    """Two heads are as many as rows: the number of positions then fits."""
    norm = kind(shape[-1]).double()
    x = torch.randn(shape, dtype=torch.float64)
    with Isopo(norm).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(norm(x).sin())
        with pytest.raises(ProxstepError, match=r"weight saw positions as \(columns, rows\)"):
            total.backward()


def test_positions_of_another_shape_are_refused() -> None:
    """Of shape (columns, 1), as models have them that are columns first."""
    table = nn.Embedding(5, 8).double()
    with Isopo(table).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(table(torch.arange(5)[:, None]).expand(5, 2, 8).sin())
        with pytest.raises(ProxstepError, match="weight saw 5 token positions"):
            total.backward()


# -- another kind ----------------------------------------------------------------------------------


def test_cohere2_is_covered() -> None:
    from transformers import Cohere2Config, Cohere2ForCausalLM

    torch.manual_seed(0)
    sizes = {**models.SIZES, "pad_token_id": 0}
    model = models.randomized(Cohere2ForCausalLM(Cohere2Config(**sizes))).eval()
    wanted = plain_gradient(model)
    with Isopo(model).microbatch(IDS, COEFFICIENTS):
        assert torch.equal(log_probs(model), log_probs(copy.deepcopy(model)))
    found = isopo_gradient(model, "reinforce")
    for name, value in wanted.items():
        assert_close(found[name], value, 1e-5)

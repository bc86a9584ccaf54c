"""Forwards that route a module's parameters through ISOPO, one per kind of layer.

Each of them computes what the module's own forward computes, and differs from it only in the
parameters' gradients. A forward that runs without gradients, or inside `Isopo.off()`, is the
module's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo.ops import parameter_gradient
from proxstep.typing import Tensor


class Owner(Protocol):
    """What a patched module asks of the `Isopo` that patched it.

    Attributes:
        number: Its key in `OWNERS`.
        enabled: Whether forwards are to be routed through it at the moment.
        ticket: The active microbatch's number, or `UNBOUND`.
        grid: Shape of the active microbatch's token grid.
    """

    number: int
    enabled: bool
    ticket: Tensor
    grid: tuple[int, int] | None


class Site:
    """A patched module's place, kept on the module: its owner and its name in the model.

    The owner is held weakly, since it holds the model: a model and its `Isopo` are freed together.
    A deep or pickled copy of a patched module has None instead, and so behaves as an ordinary one.
    """

    def __init__(self, owner: Owner, name: str) -> None:
        self._owner = weakref.ref(owner)
        self.name = name

    @property
    def owner(self) -> Owner | None:
        """The `Isopo` that patched the module, or None where it is gone."""
        return self._owner()

    def key(self, parameter: str) -> str:
        """Return the full name of one of the module's parameters, as this module uses it."""
        return f"{self.name}.{parameter}" if self.name else parameter

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copy and pickle as None."""
        return type(None), ()


# A patched module's attribute, not one dictionary of all: torch.compile would guard that one by the
# order of its keys, which changes when another model is freed.
SITE = "_proxstep_site"


def owner_of(module: nn.Module) -> tuple[Owner, Site] | None:
    """Return who routes a forward, or None where it is to be an ordinary one."""
    site: Site | None = getattr(module, SITE, None)
    owner = site.owner if site is not None else None
    if site is None or owner is None or not torch.is_grad_enabled() or not owner.enabled:
        return None
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    return owner, site


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, whose parameters' gradients come from the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ticket: Tensor,
        owner: int,
        keys: tuple[str, str],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ticket, ctx.owner, ctx.keys = ticket, owner, keys
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_key, bias_key = ctx.keys
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            shape = list(weight.shape)
            grad_weight = parameter_gradient(
                [grad, x], ctx.ticket, shape, ctx.owner, weight_key, -1
            )
        if ctx.needs_input_grad[2]:
            shape = [weight.shape[0]]
            grad_bias = parameter_gradient([grad], ctx.ticket, shape, ctx.owner, bias_key, -1)
        return grad_x, grad_weight, grad_bias, None, None, None


class _Embedding(torch.autograd.Function):
    """A table's rows, whose gradient comes from the operator."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        ticket: Tensor,
        owner: int,
        key: str,
    ) -> Tensor:
        ctx.save_for_backward(token)
        ctx.ticket, ctx.shape, ctx.owner, ctx.key = ticket, list(weight.shape), owner, key
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        return nn.functional.embedding(token, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        grad_weight = parameter_gradient(
            [grad, token], ctx.ticket, ctx.shape, ctx.owner, ctx.key, ctx.padding_idx
        )
        return None, grad_weight, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """The normalization in one piece, as the module computes it.

    In half precision a product and a sum of their own would each round its output once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        shape: tuple[int, ...],
        ticket: Tensor,
        owner: int,
        keys: tuple[str, str],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ticket)
        ctx.eps, ctx.shape, ctx.owner, ctx.keys = eps, (*shape, weight.shape[0]), owner, keys
        return nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ticket = ctx.saved_tensors
        features, wide = list(weight.shape), torch.promote_types(x.dtype, torch.float32)
        grad, wide_x = grad.to(wide), x.to(wide)
        normalized, mean, rstd = torch.native_layer_norm(wide_x, features, None, None, ctx.eps)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                *(grad, wide_x, features, mean, rstd, weight.to(wide), None, [True, False, False])
            )
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            each = (grad * normalized).sum_to_size(ctx.shape)
            grad_weight = _vector_gradient(each, ticket, ctx.owner, ctx.keys[0], weight.dtype)
        if ctx.needs_input_grad[2]:
            each = grad.sum_to_size(ctx.shape)
            grad_bias = _vector_gradient(each, ticket, ctx.owner, ctx.keys[1], weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _vector_gradient(
    grad: Tensor, ticket: Tensor, owner: int, key: str, dtype: torch.dtype
) -> Tensor:
    return parameter_gradient([grad], ticket, [grad.shape[-1]], owner, key, -1).to(dtype)


class _PerPosition(torch.autograd.Function):
    """A vector parameter repeated over positions: backward sees each one's gradient."""

    @staticmethod
    def forward(
        ctx: Any, vector: Tensor, shape: tuple[int, ...], ticket: Tensor, owner: int, key: str
    ) -> Tensor:
        ctx.ticket, ctx.owner, ctx.key, ctx.size = ticket, owner, key, vector.shape[0]
        return vector.expand(*shape, vector.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_vector = parameter_gradient([grad], ctx.ticket, [ctx.size], ctx.owner, ctx.key, -1)
        return grad_vector, None, None, None, None


def _linear_forward(self: nn.Module, x: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, x)
    owner, site = found
    weight, bias = self.weight, self.bias
    if _is(self, "Conv1D", "transformers."):
        weight = weight.mT
    if torch.is_autocast_enabled(x.device.type):
        # Cast outside the function: the casts' own backward returns the gradients to the
        # parameters' dtype.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    keys = (site.key("weight"), site.key("bias"))
    return _Linear.apply(x, weight, bias, owner.ticket, owner.number, keys)


def _embedding_forward(self: nn.Embedding, input: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, input)
    owner, site = found
    if owner.grid is not None and input.dim() == 2 and input.shape[0] == 1:
        # Position embeddings are looked up once and broadcast over the rows; each row needs its
        # own.
        rows, columns = owner.grid
        if input.shape[1] == columns:
            input = input.expand(rows, columns)
    place = (owner.ticket, owner.number, site.key("weight"))
    rows = _Embedding.apply(input, self.weight, self.padding_idx, *place)
    if type(self).forward is nn.Embedding.forward:
        return rows
    scale = self.embed_scale  # a tensor in Gemma's classes, a number in others
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def _layer_norm_forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, x)
    owner, site = found
    keys = (site.key("weight"), site.key("bias"))
    place = (_position_shape(x, owner.grid), owner.ticket, owner.number, keys)
    return _LayerNorm.apply(x, self.weight, self.bias, self.eps, *place)


def _rms_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, x)
    weight = _per_position(self, "weight", x, *found)
    if isinstance(self, nn.RMSNorm):
        return nn.functional.rms_norm(x, self.normalized_shape, None, self.eps) * weight
    # The families' classes differ in where they cast and whether they add 1: run theirs, with the
    # weight repeated.
    self.__dict__["weight"] = weight
    try:
        return type(self).forward(self, x)
    finally:
        del self.__dict__["weight"]


def _dora_forward(
    self: Any,
    x: Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    adapter_name: str = "default",
) -> Tensor:
    """What DoRA adds to the base layer's output: (c - 1) W x + c s B A x with c = m / |W + s B A|.

    The norm is a constant (DoRA, arXiv 2402.09353, section 4.3), and found without a gradient, so
    that the identity matrix that peft sends through the factors is no microbatch.
    """
    found = owner_of(self)
    if found is None:
        return type(self).forward(
            self,
            x,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            base_layer=base_layer,
            base_result=base_result,
            adapter_name=adapter_name,
        )
    if not base_layer.weight.is_floating_point():
        raise ProxstepError(f"{found[1].name}: DoRA on a quantized layer is not covered; use LoRA")
    weight = base_layer.weight.to(x.dtype)
    with torch.no_grad():
        update = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name)
        norm = self.get_weight_norm(weight, update.to(x.dtype), scaling, adapter_name=adapter_name)
    factor = _per_position(self, "weight", x, *found) / norm
    bias = base_layer.bias
    if base_result is None:
        base = nn.functional.linear(x, weight.mT if self.fan_in_fan_out else weight)
    else:
        base = base_result if bias is None else base_result - bias
    return (factor - 1) * base + factor * lora_B(lora_A(x)) * scaling


def _per_position(module: nn.Module, parameter: str, x: Tensor, owner: Owner, site: Site) -> Tensor:
    """Return a vector parameter repeated over the positions of x, broadcastable against it."""
    vector = getattr(module, parameter)
    shape = _position_shape(x, owner.grid)
    return _PerPosition.apply(vector, shape, owner.ticket, owner.number, site.key(parameter))


def _position_shape(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the leading shape of x, with 1 for the heads."""
    if x.dim() <= 3:
        return tuple(x.shape[:-1])
    heads_last = (x.shape[0], x.shape[1], 1)
    heads_first = (x.shape[0], 1, x.shape[2])
    if grid is not None and (x.shape[0], x.shape[1]) != grid:
        return heads_first
    if grid is not None and (x.shape[0], x.shape[2]) != grid:
        return heads_last
    # As many heads as positions: a projection is split into heads in memory order, then perhaps
    # transposed.
    return heads_last if x.stride(1) >= x.stride(2) else heads_first


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear_forward,
    "embedding": _embedding_forward,
    "layer_norm": _layer_norm_forward,
    "rms_norm": _rms_norm_forward,
    "dora": _dora_forward,
}
for _function in FORWARDS.values():
    # A bound method is copied with its module and pickled by its name: an unpickled module finds
    # its class's forward.
    _function.__name__ = "forward"


def kind_of(module: nn.Module) -> str | None:
    """Return which of `FORWARDS` computes the same as the module's own forward, or None."""
    cls = type(module)
    own = dict(module.named_parameters(recurse=False))
    if cls.forward is nn.Linear.forward:
        return "linear"
    if _is(module, "Conv1D", "transformers."):
        return "linear"
    scaled = cls.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    if isinstance(module, nn.Embedding) and (cls.forward is nn.Embedding.forward or scaled):
        ordinary = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if ordinary else None
    if any(parameter.dim() != 1 for parameter in own.values()):
        return None
    if cls.forward is nn.LayerNorm.forward and "weight" in own:
        return "layer_norm"
    if cls.__name__.endswith("RMSNorm") and set(own) == {"weight"}:
        return "rms_norm"
    if _is(module, "DoraLinearLayer", "peft."):
        return "dora"
    return None


def _is(module: nn.Module, name: str, package: str) -> bool:
    """Whether a module is of a class of another library, or of one that FSDP2 derived from it."""
    classes = type(module).__mro__[:2]
    return any(cls.__name__ == name and cls.__module__.startswith(package) for cls in classes)


def patch(module: nn.Module, kind: str, site: Site) -> None:
    """Replace the module's forward on the instance.

    Raises:
        ProxstepError: If something else has replaced it already.
    """
    installed: Site | None = getattr(module, SITE, None)
    if installed is not None and installed.owner is not None:
        raise ProxstepError(
            f"{site.name}: an Isopo is installed on this model already; call its remove() first"
        )
    replaced = module.__dict__.get("forward")
    ours = (*FORWARDS.values(), type(module).forward)  # what copies of a patched module carry
    if replaced is not None and getattr(replaced, "__func__", None) not in ours:
        raise ProxstepError(
            f"{site.name}: its forward was replaced on the instance by another library; install "
            "Isopo first"
        )
    module.forward = FORWARDS[kind].__get__(module)
    module.__dict__[SITE] = site


def unpatch(module: nn.Module) -> None:
    """Give the module its own forward back."""
    del module.__dict__["forward"]
    del module.__dict__[SITE]

"""Forwards that route a module's parameters through ISOPO, one per kind of layer.

Each of them computes what the module's own forward computes, and differs from it only in the
parameters' gradients. A forward that runs without gradients, or inside `Isopo.off()`, is the
module's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from proxstep.errors import ProxstepError
from proxstep.isopo.layers import (
    LookupGradients,
    OuterGradients,
    PositionGradients,
    VectorGradients,
)
from proxstep.types import Tensor


class Sink(Protocol):
    """Where the position-wise gradients of a backward pass go: a microbatch, or the plain sum."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Shape of the token grid, where it is known."""
        ...

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to (positions, features), without padding."""
        ...

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the parameter's gradient."""
        ...


class Owner(Protocol):
    """What a patched module asks of the `Isopo` that patched it."""

    def is_off(self) -> bool:
        """Whether forwards should be ordinary at the moment."""
        ...

    def bind(self) -> Sink | None:
        """Return the active microbatch, to be used in backward."""
        ...

    def resolve(self, bound: Sink | None, key: str) -> Sink:
        """Return the sink for a backward whose forward was bound to `bound`."""
        ...


class Site:
    """A patched module's place: its owner and its name in the model.

    The owner is held weakly, since it holds the model: a model and its `Isopo` are freed together.
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


SITES: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
"""The patched modules. A deep copy of one is not in here, and so behaves as an ordinary module."""


@dataclass(frozen=True)
class Route:
    """What one forward hands to its backward: the owner, the module's place, the microbatch."""

    owner: Owner
    site: Site
    bound: Sink | None

    def sink(self, parameter: str) -> tuple[str, Sink]:
        """Return a parameter's full name, and where its gradients go."""
        key = self.site.key(parameter)
        return key, self.owner.resolve(self.bound, key)


def _route(module: nn.Module) -> Route | None:
    """Return the route of a forward, or None where it is to be an ordinary one."""
    site = SITES.get(module)
    owner = site.owner if site is not None else None
    if site is None or owner is None or not torch.is_grad_enabled() or owner.is_off():
        return None
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    return Route(owner, site, owner.bind())


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, whose parameters' gradients come from the sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, route: Route) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.route = route
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = grad @ weight if need_x else None
        grad_weight = grad_bias = None
        if need_weight:
            key, sink = ctx.route.sink("weight")
            gradients = OuterGradients(sink.select(key, grad), sink.select(key, x))
            grad_weight = sink.reduce(key, gradients)
        if need_bias:
            key, sink = ctx.route.sink("bias")
            grad_bias = sink.reduce(key, VectorGradients(sink.select(key, grad)))
        return grad_x, grad_weight, grad_bias, None


class _Embedding(torch.autograd.Function):
    """A table's rows, whose gradient comes from the sink."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, weight: Tensor, padding_idx: int | None, route: Route
    ) -> Tensor:
        ctx.save_for_backward(token)
        ctx.num_embeddings, ctx.padding_idx, ctx.route = weight.shape[0], padding_idx, route
        return nn.functional.embedding(token, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token,) = ctx.saved_tensors
        key, sink = ctx.route.sink("weight")
        token_T = sink.select(key, token[..., None]).squeeze(1)
        grad_TD = sink.select(key, grad)
        if ctx.padding_idx is not None:
            grad_TD = grad_TD.masked_fill((token_T == ctx.padding_idx)[:, None], 0.0)
        gradients = LookupGradients(grad_TD, token_T, ctx.num_embeddings)
        return None, sink.reduce(key, gradients), None, None


class _PerPosition(torch.autograd.Function):
    """A vector parameter repeated over positions: backward sees each one's gradient."""

    @staticmethod
    def forward(
        ctx: Any, vector: Tensor, shape: tuple[int, ...], parameter: str, route: Route
    ) -> Tensor:
        ctx.parameter, ctx.route = parameter, route
        return vector.expand(*shape, vector.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, sink = ctx.route.sink(ctx.parameter)
        return sink.reduce(key, VectorGradients(sink.select(key, grad))), None, None, None


def _linear_forward(self: nn.Module, x: Tensor) -> Tensor:
    route = _route(self)
    if route is None:
        return type(self).forward(self, x)
    weight, bias = self.weight, self.bias
    if type(self).__name__ == "Conv1D":
        weight = weight.mT
    if torch.is_autocast_enabled(x.device.type):
        # Cast outside the function: the casts' own backward returns the gradients to the
        # parameters' dtype.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, route)


def _embedding_forward(self: nn.Embedding, input: Tensor) -> Tensor:
    route = _route(self)
    if route is None:
        return type(self).forward(self, input)
    bound = route.bound
    if bound is not None and bound.grid is not None and input.dim() == 2 and input.shape[0] == 1:
        # Position embeddings are looked up once and broadcast over the rows; each row needs its
        # own.
        rows, columns = bound.grid
        if input.shape[1] == columns:
            input = input.expand(rows, columns)
    return _Embedding.apply(input, self.weight, self.padding_idx, route)


def _layer_norm_forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
    route = _route(self)
    if route is None:
        return type(self).forward(self, x)
    y = nn.functional.layer_norm(x, self.normalized_shape, None, None, self.eps)
    y = y * _per_position(self, "weight", x, route)
    return y if self.bias is None else y + _per_position(self, "bias", x, route)


def _rms_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    route = _route(self)
    if route is None:
        return type(self).forward(self, x)
    weight = _per_position(self, "weight", x, route)
    if isinstance(self, nn.RMSNorm):
        return nn.functional.rms_norm(x, self.normalized_shape, None, self.eps) * weight
    # The families' classes differ in where they cast and whether they add 1: run theirs, with the
    # weight repeated.
    self.__dict__["weight"] = weight
    try:
        return type(self).forward(self, x)
    finally:
        del self.__dict__["weight"]


def _per_position(module: nn.Module, parameter: str, x: Tensor, route: Route) -> Tensor:
    """Return a vector parameter repeated over the positions of x, broadcastable against it."""
    vector = getattr(module, parameter)
    grid = route.bound.grid if route.bound is not None else None
    return _PerPosition.apply(vector, _position_shape(x, grid), parameter, route)


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
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return "linear"
    if cls.forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        ordinary = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return "embedding" if ordinary else None
    if any(parameter.dim() != 1 for parameter in own.values()):
        return None
    if cls.forward is nn.LayerNorm.forward and "weight" in own:
        return "layer_norm"
    if cls.__name__.endswith("RMSNorm") and set(own) == {"weight"}:
        return "rms_norm"
    return None


def patch(module: nn.Module, kind: str, site: Site) -> None:
    """Replace the module's forward on the instance.

    Raises:
        ProxstepError: If something else has replaced it already.
    """
    if module in SITES and SITES[module].owner is not None:
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
    SITES[module] = site


def unpatch(module: nn.Module) -> None:
    """Give the module its own forward back."""
    del module.__dict__["forward"]
    del SITES[module]

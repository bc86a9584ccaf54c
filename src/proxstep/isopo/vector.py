"""Vectors: the weights of norms, and biases. G_t is a vector itself, and G_b small enough to form.

Legend for shape suffixes: T positions, B sequences, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.isopo.hooks import (
    Owner,
    PositionGradients,
    SequenceGradients,
    Site,
    covers,
    owner_of,
    parameter_gradient,
)
from proxstep.isopo.plan import Layout
from proxstep.logprobs.tokens import wide, wide_dtype
from proxstep.typing import Float, Int, Tensor


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
        microbatch_id: Tensor,
        owner: int,
        keys: tuple[str, str],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.microbatch_id = microbatch_id  # not saved: checkpointing would replace it
        ctx.eps, ctx.shape, ctx.owner, ctx.keys = eps, (*shape, weight.shape[0]), owner, keys
        return nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        microbatch_id = ctx.microbatch_id
        features, wide = list(weight.shape), wide_dtype(x.dtype)
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
            grad_weight = _vector_gradient(
                each, microbatch_id, ctx.owner, ctx.keys[0], weight.dtype
            )
        if ctx.needs_input_grad[2]:
            each = grad.sum_to_size(ctx.shape)
            grad_bias = _vector_gradient(each, microbatch_id, ctx.owner, ctx.keys[1], weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _vector_gradient(
    grad: Tensor, microbatch_id: Tensor, owner: int, key: str, dtype: torch.dtype
) -> Tensor:
    place = (microbatch_id, owner, key)
    return parameter_gradient("VectorGradients", [grad], [], [grad.shape[-1]], *place).to(dtype)


class _PerPosition(torch.autograd.Function):
    """A parameter repeated over positions: backward sees each one's gradient."""

    @staticmethod
    def forward(
        ctx: Any, vector: Tensor, lead: tuple[int, ...], microbatch_id: Tensor, owner: int, key: str
    ) -> Tensor:
        ctx.place, ctx.shape, ctx.lead = (microbatch_id, owner, key), list(vector.shape), lead
        return vector.expand(*lead, *vector.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = [grad.reshape(*ctx.lead, -1)]
        grad_vector = parameter_gradient("VectorGradients", values, [], ctx.shape, *ctx.place)
        return grad_vector, None, None, None, None


def _is_layer_norm(module: nn.Module) -> bool:
    return type(module).forward is nn.LayerNorm.forward and _names_of_vectors(module) in (
        {"weight"},
        {"weight", "bias"},
    )


@covers(_is_layer_norm)
def _layer_norm_forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, x)
    owner, site = found
    keys = (site.key("weight"), site.key("bias"))
    return routed_layer_norm(x, self.weight, self.bias, self.eps, owner, keys)


def routed_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, owner: Owner, keys: tuple[str, str]
) -> Tensor:
    """Return the normalization over the last dimension, with gradients that go to the owner."""
    place = (position_shape(x, owner.grid), owner.microbatch_id, owner.number, keys)
    return _LayerNorm.apply(x, weight, bias, eps, *place)


def _is_rms_norm(module: nn.Module) -> bool:
    forward = type(module).forward
    theirs = str(getattr(forward, "__module__", "")).startswith("transformers.")
    named = theirs and type(module).__name__.endswith("RMSNorm")
    return (named or forward is nn.RMSNorm.forward) and _names_of_vectors(module) == {"weight"}


@covers(_is_rms_norm)
def _rms_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, x)
    weight = per_position(self, "weight", x, *found)
    if isinstance(self, nn.RMSNorm):
        return nn.functional.rms_norm(x, self.normalized_shape, None, self.eps) * weight
    # The classes of transformers differ in where they cast and whether they add 1: run theirs, with
    # the weight repeated.
    self.__dict__["weight"] = weight
    try:
        return type(self).forward(self, x)
    finally:
        del self.__dict__["weight"]


def per_position(module: nn.Module, parameter: str, x: Tensor, owner: Owner, site: Site) -> Tensor:
    """Return a vector parameter repeated over the positions of x, broadcastable against it."""
    shape = position_shape(x, owner.grid)
    return repeated(getattr(module, parameter), shape, owner, site.key(parameter))


def repeated(vector: Tensor, lead: tuple[int, ...], owner: Owner, key: str) -> Tensor:
    """Return a parameter repeated over positions, (*lead, *shape); gradients go to the owner."""
    return _PerPosition.apply(vector, lead, owner.microbatch_id, owner.number, key)


def _names_of_vectors(module: nn.Module) -> set[str] | None:
    """Return the names of a module's parameters where all of them are vectors, else None."""
    own = dict(module.named_parameters(recurse=False))
    return set(own) if all(parameter.dim() == 1 for parameter in own.values()) else None


def position_shape(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, ...]:
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


@dataclass(frozen=True)
class VectorGradients(PositionGradients):
    """A vector (a normalization's weight, a bias): G_t is a vector itself."""

    grad_TD: Float[Tensor, "positions features"]

    def at(self, index: Int[Tensor, " samples"]) -> VectorGradients:
        """Return those of some positions."""
        return type(self)(self.grad_TD[index])

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""
        return wide(self.grad_TD).square().sum(1)

    def sums(self, layout: Layout) -> VectorSums:
        """Return each sequence's gradient."""
        return VectorSums(layout.sum_rows(wide(self.grad_TD)))

    def along(self, direction: Float[Tensor, " features"]) -> Float[Tensor, " positions"]:
        """Return <G_t, direction>."""
        return wide(self.grad_TD) @ wide(direction)

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, " features"]:
        """Return sum_t weight_t G_t."""
        return weight_T.to(wide_dtype(self.grad_TD.dtype)) @ wide(self.grad_TD)


@dataclass(frozen=True)
class VectorSums(SequenceGradients):
    """The gradients G_b of a vector parameter."""

    sum_BD: Float[Tensor, "batch features"]

    def cross(self, sample: VectorGradients) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b>."""
        return sample.grad_TD.to(self.sum_BD.dtype) @ self.sum_BD.mT

    def norm_squares(self) -> Float[Tensor, " batch"]:
        """Return |G_b|^2."""
        return self.sum_BD.square().sum(1)

    def ntk(self) -> Float[Tensor, "batch batch"]:
        """Return <G_b, G_c>."""
        return self.sum_BD @ self.sum_BD.mT

    def contract(self, weight_B: Float[Tensor, " batch"]) -> Float[Tensor, " features"]:
        """Return sum_b weight_b G_b."""
        return weight_B.to(self.sum_BD.dtype) @ self.sum_BD

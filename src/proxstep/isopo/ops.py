"""The one weight-gradient entry point, as an operator that torch.compile takes for a black box.

What a forward hands to its backward is a ticket: a tensor with the microbatch's number. A compiled
graph takes it as an input, so that it is not compiled again for every microbatch, and the operator
finds everything else through it. It lies on the autograd context and not among the saved tensors,
which checkpointing replaces by those of a second forward.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from proxstep.errors import ProxstepError
from proxstep.isopo.layers import (
    LookupGradients,
    OuterGradients,
    PositionGradients,
    VectorGradients,
)


class Sink(Protocol):
    """Where the position-wise gradients of a backward pass go: a microbatch, or the plain sum."""

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to (positions, features)."""
        ...

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the parameter's gradient."""
        ...


class Owner(Protocol):
    """What the operator asks of the `Isopo` that patched a module."""

    def resolve(self, ticket: int, key: str) -> Sink:
        """Return the sink for a backward whose forward got this ticket."""
        ...


OWNERS: WeakValueDictionary[int, Owner] = WeakValueDictionary()
"""Every `Isopo`, by a number that a compiled graph can hold."""

UNBOUND = -1
"""The ticket of a forward outside any microbatch."""


@torch.library.custom_op("proxstep::parameter_gradient", mutates_args=())
def parameter_gradient(
    values: list[torch.Tensor],
    ticket: torch.Tensor,
    shape: list[int],
    owner: int,
    key: str,
    padding_idx: int,
) -> torch.Tensor:
    """Return one parameter's gradient from a backward pass's tensors.

    Args:
        values: The gradient of the layer's output and, for a linear layer, its input, or for an
            embedding its tokens.
        ticket: The microbatch's number.
        shape: Of the parameter.
        owner: Key into `OWNERS`.
        key: The parameter's name, as its module uses it.
        padding_idx: Of an embedding; -1 for none.

    Raises:
        ProxstepError: If the owner or the microbatch is gone, or the backward does not fit it.
    """
    found = OWNERS.get(owner)
    if found is None:
        raise ProxstepError(
            f"backward reached {key}, but its Isopo is gone: keep a reference to it"
        )
    sink = found.resolve(int(ticket), key)
    grad = sink.select(key, values[0])
    if len(values) == 1:
        gradients: PositionGradients = VectorGradients(grad)
    elif values[1].is_floating_point():
        gradients = OuterGradients(grad, sink.select(key, values[1]))
    else:
        token_T = sink.select(key, values[1][..., None]).squeeze(1)
        if padding_idx >= 0:
            grad = grad.masked_fill((token_T == padding_idx)[:, None], 0.0)
        gradients = LookupGradients(grad, token_T, shape[0])
    with torch.autocast(grad.device.type, enabled=False):  # backward may run inside an autocast
        total = sink.reduce(key, gradients)
    return total.to(values[0].dtype).reshape(shape)


@parameter_gradient.register_fake
def _(
    values: list[torch.Tensor],
    ticket: torch.Tensor,
    shape: list[int],
    owner: int,
    key: str,
    padding_idx: int,
) -> torch.Tensor:
    del ticket, owner, key, padding_idx
    return values[0].new_empty(shape)

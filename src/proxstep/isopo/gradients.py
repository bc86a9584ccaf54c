"""What every kind of layer says of its parameters: position-wise gradients, and their statistics.

A parameter's gradient is a sum over token positions, G = sum_t G_t. Each kind of layer has a class
that holds the G_t of one parameter in one backward pass, in the smallest form that it knows.

Legend for shape suffixes: T positions, B sequences, K sampled positions, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from proxstep.isopo.layout import Layout
from proxstep.typing import Float, Int, Tensor

KINDS: dict[str, type[PositionGradients]] = {}
"""Every class of position-wise gradients, by its name."""


@dataclass(frozen=True)
class PositionGradients(ABC):
    """One parameter's G_t: a frozen dataclass of tensors with a row per position, then numbers.

    A subclass is registered by its name, under which the backward of its layer finds it.

    Attributes:
        is_matrix: Whether the parameter is a linear layer's weight, rather than one of the "other
            parameters" of `Isopo`.
    """

    is_matrix: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register the class.

        Raises:
            TypeError: If another class has its name.
        """
        known = KINDS.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"there is a class of position-wise gradients named {cls.__name__}")
        KINDS[cls.__name__] = cls

    @property
    def num_rows(self) -> int:
        """Number of positions."""
        return len(self.first)

    @property
    def first(self) -> Tensor:
        """The first tensor, the gradient of the layer's output: for its dtype and device."""
        return getattr(self, fields(self)[0].name)

    def map(self, function: Callable[[Tensor], Tensor]) -> PositionGradients:
        """Return the same with a function applied to each tensor."""
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        return type(self)(*(function(v) if isinstance(v, Tensor) else v for v in values))

    @abstractmethod
    def at(self, index: Int[Tensor, " samples"]) -> PositionGradients:
        """Return those of some positions."""

    @abstractmethod
    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""

    @abstractmethod
    def contract(self, weight_T: Float[Tensor, " positions"]) -> Tensor:
        """Return sum_t weight_t G_t, in the parameter's shape."""

    def sums(self, layout: Layout) -> SequenceGradients:
        """Return each sequence's gradient; not for matrices, where `reduction` chooses the form."""
        raise NotImplementedError(f"{type(self).__name__}.sums")


class SequenceGradients(ABC):
    """The gradients G_b of one parameter."""

    @abstractmethod
    def cross(self, sample: Any) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b> with the G_k of a sample of positions, in the same class's form."""

    @abstractmethod
    def norm_squares(self) -> Float[Tensor, " batch"]:
        """Return |G_b|^2."""

    @abstractmethod
    def ntk(self) -> Float[Tensor, "batch batch"]:
        """Return <G_b, G_c>."""

    @abstractmethod
    def contract(self, weight_B: Float[Tensor, " batch"]) -> Tensor:
        """Return sum_b weight_b G_b, in the parameter's shape."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype itself where it has more digits."""
    return torch.promote_types(dtype, torch.float32)


def wide(value: Tensor) -> Tensor:
    """Return the value in float32, or as it is where it has more digits."""
    return value.to(wide_dtype(value.dtype))

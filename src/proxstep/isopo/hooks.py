"""The extension point: a kind of layer is a forward, registered by a decorator, and its gradients.

    @covers(lambda module: type(module).forward is nn.Linear.forward, matrices=("weight",))
    def _forward(self: nn.Linear, x: Tensor) -> Tensor: ...

The forward computes what the module's own computes, and differs from it only in its parameters'
gradients, which come from `parameter_gradient`. A forward that runs without gradients, or inside
`Isopo.off()`, is the module's own.

A parameter's gradient is a sum over token positions, G = sum_t G_t. Each kind of layer has a class
that holds the G_t of one parameter in one backward pass, in the smallest form that it knows.

What a forward hands to its backward is the microbatch id, in a tensor. A compiled graph takes it as
an input, so that it is not compiled again for every microbatch, and the operator finds everything
else through it. It lies on the autograd context and not among the saved tensors,
which checkpointing replaces by those of a second forward.

Legend for shape suffixes: T positions, B sequences, K sampled positions.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from proxstep.errors import ProxstepError
from proxstep.isopo.plan import Layout, Memory, Needs, Part
from proxstep.typing import Float, Int

# -- position-wise gradients ----------------------------------------------------------------------

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
        """Return the same with a function applied to each tensor.

        Args:
            function: From a tensor to another with as many rows.
        """
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        return type(self)(*(function(v) if isinstance(v, Tensor) else v for v in values))

    @abstractmethod
    def at(self, index: Int[Tensor, " samples"]) -> PositionGradients:
        """Return those of some positions.

        Args:
            index: Their rows.
        """

    @abstractmethod
    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2."""

    def importance(self) -> Float[Tensor, " positions"]:
        """Return what a position's probability to be sampled is in proportion to."""
        return self.squares()

    @abstractmethod
    def contract(self, weight_T: Float[Tensor, " positions"]) -> Tensor:
        """Return sum_t weight_t G_t, in the parameter's shape.

        Args:
            weight_T: One number per position.
        """

    def along(self, direction: Tensor) -> Float[Tensor, " positions"]:
        """Return <G_t, direction>, for PROMA.

        Args:
            direction: In the parameter's shape.

        Raises:
            ProxstepError: If the class does not say how.
        """
        raise ProxstepError(f"PROMA does not cover {type(self).__name__}: freeze its parameters")

    def factors(self, index_T: Int[Tensor, " kept"]) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield the matrices whose G_t are g_t a_t^T, for Intra-PROMA; none by default.

        Args:
            index_T: The positions that count.

        Yields:
            Where in the parameter a matrix is, its g_t, (rows, out), and its a_t, (rows, in).
        """
        del index_T
        yield from ()

    def sums(self, layout: Layout) -> SequenceGradients:
        """Return each sequence's gradient; not for a class that measures its own `parts`.

        Args:
            layout: Which position belongs to which sequence.
        """
        raise NotImplementedError(f"{type(self).__name__}.sums")

    def parts(
        self,
        layout: Layout,
        needs: Needs,
        sample: Any,
        memory: Memory,
        *,
        separable: bool,
    ) -> Iterator[Part]:
        """Measure the sequences: all at once, or where that is cheaper some at a time.

        Args:
            layout: Which position belongs to which sequence.
            needs: The statistics.
            sample: Gradients at the positions that estimate the Fisher norm, where it is needed.
            memory: The workspace, which a part may use until the next is asked for.
            separable: Whether some sequences may be weighed before the others are measured.
        """
        del memory, separable
        sums = self.sums(layout)
        yield Part(
            slice(None),
            lambda weight_B, _: sums.contract(weight_B),
            None if sample is None else sums.cross(sample),
            sums.norm_squares() if needs.norm else None,
            sums.ntk() if needs.ntk else None,
        )


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


# -- who asks for gradients ------------------------------------------------------------------------


class Sink(Protocol):
    """Where the position-wise gradients of a backward pass go: a microbatch, or the plain sum."""

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to (positions, features)."""
        ...

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the parameter's gradient."""
        ...


@runtime_checkable
class Owner(Protocol):
    """What a patched module asks of the `Isopo` that patched it.

    Attributes:
        number: Its key in `OWNERS`.
        enabled: Whether forwards are to be routed through it at the moment.
        microbatch_id: The active microbatch's number, or `UNBOUND`.
        grid: Shape of the active microbatch's token grid.
    """

    number: int
    enabled: bool
    microbatch_id: Tensor
    grid: tuple[int, int] | None

    def resolve(self, microbatch_id: int, key: str) -> Sink:
        """Return the sink for a backward whose forward got this id."""
        ...

    def spares(self, parameter: Tensor) -> bool:
        """Whether a parameter gets the plain gradient, and its uses are not to be routed."""
        ...

    def spare(self, key: str, parameter: Tensor) -> bool:
        """Spare a parameter from now on, whose use is not covered; return whether that is done."""
        ...


OWNERS: WeakValueDictionary[int, Owner] = WeakValueDictionary()
"""Every `Isopo`, by a number that a compiled graph can hold."""

UNBOUND = -1
"""The id of a forward outside any microbatch."""


SKIPPED: set[int] = set()
"""Owners whose parameters need no gradient from the backward that runs at the moment."""


# -- the operator ----------------------------------------------------------------------------------


# As torch would infer it from the annotations; torch 2.6 cannot read `list[...]` there.
_SCHEMA = (
    "(str kind, Tensor[] values, SymInt[] numbers, SymInt[] shape, Tensor microbatch_id, "
    "SymInt owner, str key) -> Tensor"
)


@torch.library.custom_op("proxstep::parameter_gradient", mutates_args=(), schema=_SCHEMA)
def parameter_gradient(
    kind: str,
    values: list[torch.Tensor],
    numbers: list[int],
    shape: list[int],
    microbatch_id: torch.Tensor,
    owner: int,
    key: str,
) -> torch.Tensor:
    """Return one parameter's gradient from a backward pass's tensors.

    `torch.compile` takes it for a black box.

    Args:
        kind: Name of the class of position-wise gradients.
        values: Its tensors, (..., features), the gradient of the layer's output first. Integers
            with one feature become a vector.
        numbers: Its other fields.
        shape: Of the parameter.
        microbatch_id: The microbatch's number.
        owner: Key into `OWNERS`.
        key: The parameter's name, as its module uses it.

    Raises:
        ProxstepError: If the owner or the microbatch is gone, or the backward does not fit it.
    """
    found = OWNERS.get(owner)
    if found is None:
        raise ProxstepError(
            f"backward reached {key}, but its Isopo is gone: keep a reference to it"
        )
    if owner in SKIPPED:
        return values[0].new_zeros(1).expand(shape)
    sink = found.resolve(int(microbatch_id), key)
    flat = [sink.select(key, value) for value in values]
    flat = [value if value.is_floating_point() else value.squeeze(1) for value in flat]
    gradients = KINDS[kind](*flat, *numbers)
    with torch.autocast(values[0].device.type, enabled=False):  # backward may run inside one
        total = sink.reduce(key, gradients)
    return total.to(values[0].dtype).reshape(shape)


@parameter_gradient.register_fake
def _(
    kind: str,
    values: list[torch.Tensor],
    numbers: list[int],
    shape: list[int],
    microbatch_id: torch.Tensor,
    owner: int,
    key: str,
) -> torch.Tensor:
    del kind, numbers, microbatch_id, owner, key
    return values[0].new_empty(shape)


# -- a patched module ------------------------------------------------------------------------------


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


def owner_of(module: nn.Module, *, borrows: bool = False) -> tuple[Owner, Site] | None:
    """Return who routes a forward, or None where it is to be an ordinary one.

    Args:
        module: The patched module.
        borrows: Whether it uses its submodules' parameters, not its own.
    """
    site: Site | None = getattr(module, SITE, None)
    owner = site.owner if site is not None else None
    if site is None or owner is None or not torch.is_grad_enabled() or not owner.enabled:
        return None
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=borrows)):
        return None
    return owner, site


# -- the kinds of layers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """One kind of layer.

    Attributes:
        covers: Whether `forward` computes what a module's own forward does.
        forward: Replaces it.
        matrices: Names of its parameters that are weights of linear layers.
        borrows: Whether it uses its submodules' parameters, not its own.
    """

    covers: Callable[[nn.Module], bool]
    forward: Callable[..., Any]
    matrices: tuple[str, ...] = ()
    borrows: bool = False

    def concerns(self, module: nn.Module) -> bool:
        """Whether a module uses a trainable parameter."""
        return any(p.requires_grad for p in module.parameters(recurse=self.borrows))


COVERAGE: list[Coverage] = []


def covers(
    test: Callable[[nn.Module], bool],
    *,
    matrices: tuple[str, ...] = (),
    borrows: bool = False,
    last: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a forward for the modules that pass a test; the latest one that fits is used.

    Args:
        test: Whether the forward computes what a module's own does.
        matrices: Names of parameters that are weights of linear layers.
        borrows: Whether it uses its submodules' parameters, not its own.
        last: Use it only where no other one fits.

    Returns:
        A decorator for the forward.
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        # A bound method is copied with its module and pickled by its name: an unpickled module
        # finds its class's forward.
        forward.__name__ = "forward"
        place = 0 if last else len(COVERAGE)
        COVERAGE.insert(place, Coverage(test, forward, matrices, borrows))
        return forward

    return register


def kind_of(module: nn.Module) -> Coverage | None:
    """Return the kind of layer that a module is, or None."""
    return next((kind for kind in reversed(COVERAGE) if kind.covers(module)), None)


def is_class(module: nn.Module, name: str, package: str) -> bool:
    """Whether a module is of a class of another library, or of one that FSDP2 derived from it."""
    classes = type(module).__mro__[:2]
    return any(cls.__name__ == name and cls.__module__.startswith(package) for cls in classes)


# -- the parameters of patched modules ------------------------------------------------------------

Modules = Mapping[nn.Module, str]
"""The patched modules, with their names."""


def parts_of(model: nn.Module) -> tuple[frozenset[int], frozenset[int]]:
    """Return what tells whether modules were exchanged, or parameters frozen or thawed."""
    trainable = (id(p) for p in model.parameters() if p.requires_grad)
    return frozenset(map(id, model.modules())), frozenset(trainable)


def uses(modules: Modules) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every trainable parameter once per module that uses it, by its name there."""
    for module, name in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield f"{name}.{parameter_name}" if name else parameter_name, parameter


def gradient_stamps(modules: Modules) -> dict[str, Any]:
    """Return what changes when a parameter receives a gradient."""
    return {key: _stamp(parameter) for key, parameter in uses(modules)}


def check_bypassed(
    modules: Modules, reduced: set[str], before: Mapping[str, Any], owner: Owner
) -> None:
    """Name a parameter that received a gradient which its layer knows nothing of.

    Raises:
        ProxstepError: If there is one.
    """
    for key, parameter in uses(modules):
        known = key in reduced or owner.spares(parameter)
        if not known and _stamp(parameter) != before[key]:
            raise ProxstepError(
                f"{key} received a gradient without its layer's forward having run: a fused head "
                "or another replacement bypasses it; turn that off, or freeze the parameter"
            )


def _stamp(parameter: nn.Parameter) -> tuple[int, int] | None:
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)

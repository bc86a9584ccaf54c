"""Modules of any other class: their own forward runs, and each use of their parameters is routed.

While the forward runs, torch hands every call that involves a parameter of the module to `_Watch`.
A use that it knows (a linear product, a lookup, a norm, an elementwise operation) goes through the
autograd functions of `linear`, `embedding` and `vector`; a view or a cast of a parameter stands for
the parameter. Any other use is refused by name, so that nothing is transformed by guesswork. This
covers norms of a model's own, subclasses of nn.Linear, routers, learned positions, and a weight of
another module that is used through F.linear (a tied head).

Legend for shape suffixes: none; shapes are those of whatever the module computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from proxstep.errors import ProxstepError
from proxstep.isopo.embedding import routed_embedding
from proxstep.isopo.hooks import Owner, Site, covers, owner_of
from proxstep.isopo.linear import routed_linear
from proxstep.isopo.vector import repeated, routed_layer_norm
from proxstep.typing import Tensor


def _forms_of(names: str) -> frozenset[Any]:
    """Return functions by name: torch's, methods, reflected, in place, and attributes."""
    found = []
    for name in names.split():
        forms = (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
        for form in forms:
            for place in (torch, nn.functional, Tensor):
                function = getattr(place, form, None)
                if callable(function):
                    found.append(function)
                elif function is not None and hasattr(function, "__get__"):
                    found.append(function.__get__)  # an attribute, as a mode is handed it
    return frozenset(found)


_VIEWS = _forms_of(
    "to float double half bfloat16 type type_as contiguous clone view view_as reshape unsqueeze "
    "squeeze flatten unflatten transpose swapaxes permute movedim t T mT narrow getitem"
)
"""Operations whose result has the same numbers: a gradient by it is one by the parameter."""
_POINTWISE = _forms_of(
    "add sub subtract mul multiply div divide truediv true_divide neg negative abs square sqrt "
    "rsqrt exp log sigmoid tanh relu gelu silu softplus pow reciprocal clamp addcmul maximum "
    "minimum where lerp erf sin cos"
) | {torch.rsub}


# -- which modules ---------------------------------------------------------------------------------


def _calls_linear(module: nn.Module) -> bool:
    """Whether its class has code that calls F.linear on the weight of some module."""
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.")]
    members = [member for cls in classes for member in vars(cls).values()]
    functions = [inspect.unwrap(member) for member in members if callable(member)]
    names = [frozenset(f.__code__.co_names) for f in functions if hasattr(f, "__code__")]
    return any({"linear", "weight"} <= one and one & {"F", "functional"} for one in names)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether it has parameters, and its class a forward that is not one of torch's."""
    forward = type(module).forward
    if forward is nn.Module.forward or forward.__module__.startswith("torch."):
        return False
    return _has_parameters(module)


def _borrows(module: nn.Module) -> bool:
    """Whether a module may use another one's weight through F.linear."""
    return not _has_parameters(module) and _calls_linear(module)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


@covers(lambda m: _has_own_forward(m) and _calls_linear(m), matrices=("weight",), last=True)
@covers(_has_own_forward, last=True)
@covers(_borrows, borrows=True, last=True)
def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    found = owner_of(self, borrows=not _has_parameters(self))
    if found is None:
        return type(self).forward(self, *args, **kwargs)
    with _Watch(self, (*args, *kwargs.values()), *found):
        return type(self).forward(self, *args, **kwargs)


class _NotCovered(Exception):
    """A parameter, and a use of it that is not known."""


# -- the uses --------------------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Routes the uses of a module's parameters while its forward runs."""

    def __init__(
        self, module: nn.Module, inputs: tuple[Any, ...], owner: Owner, site: Site
    ) -> None:
        super().__init__()
        self._module, self._owner, self._site = module, owner, site
        floats = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        self._input = next((x for x in floats if x.dim() > 1), None)
        self._uses: dict[str, int] = {}
        self._spread: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._names: dict[int, tuple[Tensor, str, Tensor]] = {}
        self._borrowed = not _has_parameters(module)
        place = f"@{site.name or type(module).__name__}" if self._borrowed else ""
        for name, parameter in module.named_parameters(recurse=self._borrowed):
            if parameter.requires_grad and not owner.spares(parameter):
                self._names[id(parameter)] = (parameter, f"{site.key(name)}{place}", parameter)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Route a call that one of the parameters takes part in."""
        kwargs = dict(kwargs or {})
        ours = any(map(self._is_ours, _tensors(args, kwargs)))
        ours = ours or (func in _NORMS and _is_by_position(*args, **kwargs))
        if not torch.is_grad_enabled() or not ours:
            return func(*args, **kwargs)
        try:
            return self._route(func, args, kwargs)
        except _NotCovered as found:
            self._spare(*found.args)
            return self.__torch_function__(func, types, args, kwargs)

    def _route(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        routed = _ROUTES.get(func)
        if routed is not None:
            return routed(self, *args, **kwargs)
        if func is Tensor.__getitem__ and any(True for _ in _tensors(args[1:], {})):
            return self._rows(*args)
        if func in _VIEWS and self._is_ours(args[0]):
            return self._view(args[0], func(*args, **kwargs))
        if func in _POINTWISE and not self._borrowed:
            return self._pointwise(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._borrowed or not any(x.requires_grad for x in _tensors((result,), {})):
            return result
        for value in filter(self._is_ours, [*_tensors(args, kwargs)]):
            self._spare(value, _name_of(func))
        return result  # not called again, which a checkpointed forward would notice

    def key(self, value: Tensor | None) -> str:
        """Name a use of a parameter; the second one in the same forward has a number."""
        if value is None or not self._is_ours(value):
            return ""
        key = self._names[id(value)][1]
        self._uses[key] = self._uses.get(key, 0) + 1
        return key if self._uses[key] == 1 else f"{key}#{self._uses[key]}"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear."""
        if self._is_ours(x):
            raise _NotCovered(x, "linear, as its input")
        if not self._is_ours(weight):
            return nn.functional.linear(x, weight) + self._over(bias, x)
        if bias is not None and not self._can_route(bias):
            return self.linear(x, weight) + bias
        return routed_linear(x, weight, bias, self._owner, (self.key(weight), self.key(bias)))

    def embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        """F.embedding."""
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise _NotCovered(weight, "embedding with max_norm, scale_grad_by_freq or sparse")
        return routed_embedding(input, weight, padding_idx, self._owner, self.key(weight))

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """F.layer_norm."""
        both = self._can_route(weight) and self._can_route(bias)
        if weight is not None and weight.dim() == 1 and both:
            keys = (self.key(weight), self.key(bias))
            return routed_layer_norm(input, weight, bias, eps, self._owner, keys)
        y = nn.functional.layer_norm(input, tuple(normalized_shape), eps=eps)
        y = y if weight is None else y * self._over(weight, input)
        return y if bias is None else y + self._over(bias, input)

    def rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None
    ) -> Tensor:
        """F.rms_norm."""
        y = nn.functional.rms_norm(input, tuple(normalized_shape), None, eps)
        return y * self._over(weight, input)

    def _rows(self, value: Tensor, index: Any) -> Tensor:
        """A parameter's rows by a tensor of integers: a lookup."""
        integers = isinstance(index, Tensor) and not (
            index.is_floating_point() or index.is_complex()
        )
        if not integers or index.dtype == torch.bool or index.dim() == 0 or value.dim() != 2:
            raise _NotCovered(value, "an index that is no tensor of positions")
        return self.embedding(index, value)

    def _view(self, of: Tensor, result: Tensor) -> Tensor:
        if result.requires_grad:
            self._names[id(result)] = (result, *self._names[id(of)][1:])
        return result

    def _pointwise(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an elementwise operation with the parameters repeated over the positions."""
        like = None
        for x in _tensors(args, kwargs):
            if x.dim() > 1 and not self._is_ours(x) and (like is None or x.dim() > like.dim()):
                like = x
        like = self._input if like is None else like

        def spread(value: Any) -> Any:
            return self._over(value, like) if isinstance(value, Tensor) else value

        args = [spread(value) for value in args]
        return func(*args, **{name: spread(value) for name, value in kwargs.items()})

    def _over(self, value: Tensor | None, like: Tensor | None) -> Any:
        """Return a parameter with a copy for each position of `like`, broadcastable against it."""
        if value is None or not self._is_ours(value):
            return value
        axes = None if like is None else _position_axes(like, self._owner.grid)
        if like is None or axes is None or value.dim() > like.dim():
            raise _NotCovered(value, "an elementwise operation that shows no token positions")
        sizes = (1,) * (like.dim() - value.dim()) + tuple(value.shape)
        lead = tuple(like.shape[axis] for axis in axes)
        found = self._spread.get((id(value), lead))
        if found is None:
            found = self._spread[id(value), lead] = self._repeat(value, sizes, axes, lead)
        return found

    def _repeat(
        self, value: Tensor, sizes: tuple[int, ...], axes: tuple[int, ...], lead: tuple[int, ...]
    ) -> Tensor:
        rest = tuple(size for axis, size in enumerate(sizes) if axis not in axes)
        places = tuple(range(len(axes)))
        if all(sizes[axis] == 1 for axis in axes):
            copies = repeated(value.reshape(rest), lead, self._owner, self.key(value))
            return copies.movedim(places, axes)
        along = [axis for axis in axes if sizes[axis] != 1]
        if along != [axes[-1]] or sizes[axes[-1]] != lead[-1] or len(axes) != 2:
            raise _NotCovered(value, f"an elementwise operation in its shape {sizes}")
        # One row for each column of the grid: learned positions.
        table = value.reshape(sizes).movedim(axes[-1], 0).reshape(lead[-1], -1)
        token = torch.arange(lead[-1], device=value.device).expand(lead)
        rows = routed_embedding(token, table, None, self._owner, self.key(value))
        return rows.reshape(*lead, *rest).movedim(places, axes)

    def _can_route(self, value: Tensor | None) -> bool:
        return value is None or self._is_ours(value) or not value.requires_grad

    def _is_ours(self, value: Any) -> bool:
        return id(value) in self._names

    def _spare(self, value: Tensor, use: str) -> None:
        """Leave a parameter alone from now on, or refuse its use."""
        _, key, parameter = self._names[id(value)]
        if key not in self._uses and self._owner.spare(key, parameter):
            self._names = {n: one for n, one in self._names.items() if one[2] is not parameter}
            return
        raise ProxstepError(
            f"{key}: {type(self._module).__name__}.forward uses it in {use}, which ISOPO does not "
            "cover. Freeze it with requires_grad_(False), give it the plain policy gradient with "
            'other_parameters="reinforce", or register a forward for the class '
            "(proxstep.isopo.hooks.covers)"
        )


_NORMS = (nn.functional.layer_norm, torch.layer_norm, nn.functional.rms_norm, torch.rms_norm)
_ROUTES: dict[Any, Callable[..., Tensor]] = {
    nn.functional.linear: _Watch.linear,
    nn.functional.embedding: _Watch.embedding,
    nn.functional.layer_norm: _Watch.layer_norm,
    torch.layer_norm: lambda watch, x, shape, weight=None, bias=None, eps=1e-5, *_: (
        watch.layer_norm(x, shape, weight, bias, eps)
    ),
    nn.functional.rms_norm: _Watch.rms_norm,
    torch.rms_norm: _Watch.rms_norm,
}


def _position_axes(x: Tensor, grid: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return which axes of an activation are the token grid's, or None where none are."""
    shape = tuple(x.shape)
    if grid is None:  # outside any microbatch: the backward finds out whether it fits
        return (0,) if len(shape) == 2 else (0, 1)
    heads_last, heads_first = shape[:2] == grid, shape[0:3:2] == grid and len(shape) > 3
    if heads_last and heads_first:  # as in `vector.position_shape`
        return (0, 1) if x.stride(1) >= x.stride(2) else (0, 2)
    if heads_last and len(shape) > 2:
        return (0, 1)
    if heads_first:
        return (0, 2)
    return (0,) if shape[:1] == (grid[0] * grid[1],) else None


def _is_by_position(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> bool:
    """Whether a norm's weight or bias was made of one that is repeated over the positions."""
    del input
    of = [value.dim() for value in (weight, bias) if isinstance(value, Tensor)]
    return max(of, default=0) > len(normalized_shape)


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value, {})

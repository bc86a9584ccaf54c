"""That every trainable parameter is covered: patching a model's layers, and finding what is not.

A layer of the model is named as it is in the bare model, whatever it is wrapped in, so that a
checkpoint of ISOPO's state does not depend on it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from proxstep.errors import ProxstepError
from proxstep.isopo import attention, dora, embedding, experts, watched  # noqa: F401
from proxstep.isopo.hooks import COVERAGE, SITE, Coverage, Modules, Owner, Site, kind_of, uses

_NUMBERS_AT_A_TIME = 2**24
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def install(model: nn.Module, owner: Owner) -> dict[nn.Module, str]:
    """Patch every layer with trainable parameters.

    Args:
        model: The model.
        owner: The `Isopo`, which may spare parameters that no kind of layer covers.

    Raises:
        ProxstepError: If one of them is of a kind that is not covered, by name, or there is none,
            or FSDP has flattened them.
    """
    missing = _missing(model, None)
    if any("_flat_param" in name for name in missing):
        raise ProxstepError(
            "FullyShardedDataParallel made one _flat_param of a module's parameters, and ISOPO "
            "needs each of them: give it use_orig_params=True, or use FSDP2's fully_shard"
        )
    missing = {n: p for n, p in missing.items() if p is None or not owner.spare(n, p)}
    _refuse(missing, _BEFORE)
    modules = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and kind.concerns(module):
            modules[module] = _clean(name)
            patch(module, kind, Site(owner, modules[module]))
    if not modules:
        raise ProxstepError("the model has no trainable parameter that ISOPO could transform")
    return modules


_BEFORE = (
    "freeze them with requires_grad_(False), give them the plain policy gradient with "
    'other_parameters="reinforce", or register a forward for their class '
    "(proxstep.isopo.hooks.covers)"
)


def check_coverage(model: nn.Module, modules: Modules, owner: Owner) -> None:
    """Name every trainable parameter that no patched module holds, and that is not spared.

    Raises:
        ProxstepError: If there is one.
    """
    missing = _missing(model, modules)
    missing = {n: p for n, p in missing.items() if p is None or not owner.spares(p)}
    _refuse(missing, "add adapters and unfreeze parameters before Isopo(...)")


def _missing(model: nn.Module, modules: Modules | None) -> dict[str, nn.Parameter | None]:
    """Return what is not covered, by name; None for what no option can cover."""
    missing: dict[str, nn.Parameter | None] = {}
    for name, module in model.named_modules():
        kind = kind_of(module) if modules is None else None
        covered = module in modules if modules is not None else kind is not None
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not covered:
                key = f"{name}.{parameter_name}" if name else parameter_name
                missing[f"{key} ({type(module).__name__})"] = parameter
        bias = getattr(getattr(module, "base_layer", None), "bias", None)
        under_dora = bool(getattr(module, "lora_magnitude_vector", None))
        if under_dora and bias is not None and bias.requires_grad:
            # DoRA subtracts it from the layer's output again, past the layer's forward.
            missing[f"{name}.base_layer.bias (a bias under DoRA)"] = None
    return missing


def _refuse(missing: Mapping[str, object], remedy: str) -> None:
    if missing:
        names = list(missing)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ProxstepError(
            f"ISOPO does not cover these trainable parameters: {', '.join(names[:5])}{more}; "
            f"{remedy}"
        )


def freeze_others(model: nn.Module) -> list[nn.Parameter]:
    """Freeze what is not a linear layer's weight, and return it.

    Raises:
        ProxstepError: If the model is wrapped in DDP, which waits for all gradients that there
            were to be when it was made.
    """
    frozen = []
    for module in model.modules():
        kind = kind_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and (kind is None or name not in kind.matrices):
                frozen.append(parameter)
    if frozen and isinstance(model, DistributedDataParallel):
        raise ProxstepError(
            'other_parameters="freeze" after DistributedDataParallel(...), which would wait for '
            "their gradients: wrap the model in it after Isopo(...)"
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def check_graph(log_prob: Tensor, modules: Modules, owner: Owner) -> None:
    """Name a parameter that log-probabilities depend on past its layer's forward.

    Such a use has no coefficients in its gradient, and where the layer's forward ran as well (a
    tied head), nothing else shows it. What a compiled or checkpointed part did is not seen.

    Raises:
        ProxstepError: If there is one.
    """
    names = {id(p): key for key, p in uses(modules) if not owner.spares(p)}
    seen, stack = set(), [log_prob.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        key = names.get(id(getattr(node, "variable", None)))
        if key is not None:
            raise ProxstepError(
                f"{key} is used past its layer's forward, by an operation that ISOPO does not see: "
                "write it as the layer's own call or as F.linear(x, weight) in the forward of the "
                "module that holds the layer, or freeze the parameter"
            )
        following = [one for one, _ in node.next_functions]
        if hasattr(node, "_forward_cls"):  # an autograd function has its parameters to itself
            following = [one for one in following if not _is_parameter(one)]
        stack += following


_SOURCES = {"LogSoftmaxBackward0": 1, "LogsumexpBackward0": -1, "_GhostHeadBackward": 1}
"""What makes log-probabilities, and the gradient there of a sum of them, where it is not 0."""


def check_sum(log_prob: Tensor) -> None:
    """Have the backward that follows refuse anything but the plain sum of log-probabilities.

    Advantages, ratios, a mean or a sign between the log-probabilities and their sum show in the
    gradient where a softmax begins. What makes log-probabilities otherwise (a fused kernel, a
    compiled function) is not seen, and neither is one that is made of others.

    Raises:
        ProxstepError: In backward, if there is something else.
    """
    sources = [n for n in _walk([log_prob.grad_fn], _SOURCES) if n.name() in _SOURCES]
    below = [one for source in sources for one, _ in source.next_functions]
    if any(node.name() in _SOURCES for node in _walk(below, {})):
        return
    for source in sources:
        source.register_prehook(partial(_check_ones, _SOURCES[source.name()]))


def _walk(stack: list[Any], ends: Container[str]) -> list[Any]:
    """Return the graph's nodes below some, as far as autograd functions and those named `ends`."""
    seen: dict[Any, None] = {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        if not hasattr(node, "_forward_cls") and node.name() not in ends:
            stack += [one for one, _ in node.next_functions]
    return [*seen]


def _check_ones(one: int, grads: tuple[Tensor | None, ...]) -> None:
    grad = grads[0]
    if grad is None:
        return
    flat = grad.reshape(-1)
    wrong = [((part != 0) & (part != one)).any() for part in flat.split(_NUMBERS_AT_A_TIME)]
    if wrong and bool(torch.stack(wrong).any()):
        raise ProxstepError(
            "microbatch.objective(...) was given something else than log-probabilities: they were "
            "multiplied (advantages, a mean, a sign, a ratio to old ones), or another loss shares "
            "their backward. Give it the log-probabilities as they are, and put advantages and "
            "averages into the coefficients; losses of their own belong inside isopo.off()"
        )


def _is_parameter(node: Any) -> bool:
    """Whether a node is a parameter, or a view or a cast of one."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return hasattr(node, "variable")


def _clean(name: str) -> str:
    """Return a module's name without the parts that wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def patch(module: nn.Module, kind: Coverage, site: Site) -> None:
    """Replace the module's forward on the instance.

    Raises:
        ProxstepError: If something else has replaced it already.
    """
    installed: Site | None = getattr(module, SITE, None)
    if installed is not None and installed.owner is not None:
        raise ProxstepError(
            f"an Isopo is installed on this model already, at its layer {site.name!r}: call that "
            "one's remove() first, in a notebook before the cell that makes another"
        )
    replaced = module.__dict__.get("forward")
    # What copies of a patched module carry.
    ours = (*(one.forward for one in COVERAGE), type(module).forward)
    if replaced is not None and getattr(replaced, "__func__", None) not in ours:
        raise ProxstepError(
            f"{site.name}: its forward was replaced on the instance by another library; install "
            "Isopo first"
        )
    module.forward = kind.forward.__get__(module)
    module.__dict__[SITE] = site


def unpatch(module: nn.Module) -> None:
    """Give the module its own forward back."""
    del module.__dict__["forward"]
    del module.__dict__[SITE]

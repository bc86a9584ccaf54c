"""That every trainable parameter is covered: patching a model's layers, and finding what is not.

A layer of the model is named as it is in the bare model, whatever it is wrapped in, so that a
checkpoint of ISOPO's state does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from proxstep.errors import ProxstepError
from proxstep.isopo import attention, dora, embedding, experts, watched  # noqa: F401
from proxstep.isopo.hooks import Owner, Site, kind_of, patch

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Modules = Mapping[nn.Module, str]
"""The patched modules, with their names."""


def install(model: nn.Module, owner: Owner) -> dict[nn.Module, str]:
    """Patch every layer with trainable parameters.

    Args:
        model: The model.
        owner: The `Isopo`, which may spare parameters that no kind of layer covers.

    Raises:
        ProxstepError: If one of them is of a kind that is not covered, by name, or there is none.
    """
    missing = _missing(model, None)
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


def _is_parameter(node: Any) -> bool:
    """Whether a node is a parameter, or a view or a cast of one."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return hasattr(node, "variable")


def _stamp(parameter: nn.Parameter) -> tuple[int, int] | None:
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)


def _clean(name: str) -> str:
    """Return a module's name without the parts that wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

"""That every trainable parameter is covered: patching a model's layers, and finding what is not.

A layer of the model is named as it is in the bare model, whatever it is wrapped in, so that a
checkpoint of ISOPO's state does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proxstep.errors import ProxstepError
from proxstep.isopo import dora, embedding, linear, vector  # noqa: F401
from proxstep.isopo.hooks import Owner, Site, kind_of, patch

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Modules = Mapping[nn.Module, str]
"""The patched modules, with their names."""


def install(model: nn.Module, owner: Owner) -> dict[nn.Module, str]:
    """Patch every layer with trainable parameters.

    Raises:
        ProxstepError: If one of them is of a kind that is not covered, by name, or there is none.
    """
    check_coverage(model, None)
    modules = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and any(p.requires_grad for p in module.parameters(recurse=False)):
            modules[module] = _clean(name)
            patch(module, kind, Site(owner, modules[module]))
    if not modules:
        raise ProxstepError("the model has no trainable parameter that ISOPO could transform")
    return modules


def check_coverage(model: nn.Module, modules: Modules | None) -> None:
    """Name every trainable parameter that no patched module holds.

    Args:
        model: The model.
        modules: The patched modules, or None before the installation.

    Raises:
        ProxstepError: If there is one.
    """
    missing = []
    for name, module in model.named_modules():
        covered = kind_of(module) is not None if modules is None else module in modules
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not covered:
                missing.append(f"{name}.{parameter_name} ({type(module).__name__})")
        bias = getattr(getattr(module, "base_layer", None), "bias", None)
        if getattr(module, "lora_magnitude_vector", None) and bias is not None:
            # DoRA subtracts it from the layer's output again, past the layer's forward.
            missing += [f"{name}.base_layer.bias (a bias under DoRA)"] * bias.requires_grad
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        remedy = (
            "freeze them with requires_grad_(False)"
            if modules is None
            else "add adapters and unfreeze parameters before Isopo(...)"
        )
        raise ProxstepError(
            f"ISOPO does not cover these trainable parameters: {', '.join(missing[:5])}{more}; "
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


def check_bypassed(modules: Modules, reduced: set[str], before: Mapping[str, Any]) -> None:
    """Name a parameter that received a gradient which its layer knows nothing of.

    Raises:
        ProxstepError: If there is one.
    """
    for key, parameter in uses(modules):
        if key not in reduced and _stamp(parameter) != before[key]:
            raise ProxstepError(
                f"{key} received a gradient without its layer's forward having run: a fused head "
                "or another replacement bypasses it; turn that off, or freeze the parameter"
            )


def _stamp(parameter: nn.Parameter) -> tuple[int, int] | None:
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)


def _clean(name: str) -> str:
    """Return a module's name without the parts that wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

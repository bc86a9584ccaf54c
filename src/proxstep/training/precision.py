"""`model.autocast: auto`: bfloat16 where the hardware has it and it is faster, by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.logprobs.evaluating import evaluating

_LEAST_GAIN = 1.1
"""Times as fast as float32 that bfloat16 must be."""
_ROWS, _LENGTH, _REPEATS = 4, 64, 3


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself, rather than by conversion to float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def with_autocast(recipe: Recipe, model: nn.Module, note: Callable[[str], None]) -> Recipe:
    """Return the recipe with `model.autocast` auto replaced by what it comes to here.

    The run folder gets that recipe, so that a resumed run computes as it began.
    """
    if recipe.model.autocast != "auto":
        return recipe
    device = next(model.parameters()).device
    chosen, reason = None, f"this {device.type} has no bfloat16 of its own"
    if has_bfloat16(device):
        gain = bfloat16_gain(model)
        chosen = "bfloat16" if gain >= _LEAST_GAIN else None
        reason = f"bfloat16 takes 1/{gain:.2f} of float32's time in a forward pass"
    note(f"model.autocast auto: {chosen or 'none'}, for {reason}")
    section = recipe.model.model_copy(update={"autocast": chosen})
    return recipe.model_copy(update={"model": section})


@torch.no_grad()
def bfloat16_gain(model: nn.Module) -> float:
    """Return float32's time of a forward pass over bfloat16's, the fastest of a few each."""
    device = next(model.parameters()).device
    token_BT = torch.ones(_ROWS, _LENGTH, dtype=torch.long, device=device)

    def seconds(enabled: bool) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            begun = _clock(device)
            model(input_ids=token_BT)
            return _clock(device) - begun

    with evaluating(model):
        taken = [(seconds(False), seconds(True)) for _ in range(_REPEATS + 1)]
    del taken[0]  # it warms up
    slow, fast = (min(times) for times in zip(*taken, strict=True))
    return slow / fast


def _clock(device: torch.device) -> float:
    """Return seconds, of the processor alone where one thread computes: others may use it too.

    Several threads wait for each other, and their waiting counts as processor time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()

"""What every objective checks first; each failure names the argument and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch

from proxstep.errors import ProxstepError
from proxstep.typing import Tensor


def check_inputs(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor
) -> None:
    """Raise ProxstepError unless the four tensors of an objective fit together."""
    shape = tuple(log_probs.shape)
    if len(shape) != 2:
        raise ProxstepError(f"log_probs has shape {shape}; it must be (batch, tokens).")
    for name, tensor in (("old_log_probs", old_log_probs), ("response_mask", response_mask)):
        if tensor.shape != log_probs.shape:
            raise ProxstepError(
                f"{name} has shape {tuple(tensor.shape)}; it must have that of log_probs, {shape}."
            )
    if advantages.shape != shape[:1]:
        raise ProxstepError(
            f"advantages has shape {tuple(advantages.shape)}; it must be {shape[:1]}, one per "
            "sequence (from per-token advantages, pass one column)."
        )
    if response_mask.dtype != torch.bool:
        raise ProxstepError(f"response_mask is {response_mask.dtype}: pass response_mask.bool().")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ProxstepError, with the nearest choice, unless the value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ProxstepError(
            f"{name} is {value!r}; did you mean {nearest!r}? Choices: {', '.join(choices)}."
        )


def check_positive(name: str, value: float) -> None:
    """Raise ProxstepError unless the number is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ProxstepError(f"{name} is {value}; it must be a finite number above 0.")


def check_clip_range(clip_ratio_low: float, clip_ratio_high: float) -> None:
    """Raise ProxstepError unless both clip widths are 0 or more."""
    for name, value in (("clip_ratio_low", clip_ratio_low), ("clip_ratio_high", clip_ratio_high)):
        if not value >= 0:
            raise ProxstepError(
                f"{name} is {value}; it is a width, 0 or more: the ratio is clipped to "
                "[1 - clip_ratio_low, 1 + clip_ratio_high]."
            )

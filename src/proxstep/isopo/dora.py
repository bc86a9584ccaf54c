"""DoRA's magnitudes: a vector that scales the rows of a projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import covers, is_class, owner_of
from proxstep.isopo.vector import per_position
from proxstep.typing import Tensor


@covers(lambda module: is_class(module, "DoraLinearLayer", "peft."))
def _forward(
    self: Any,
    x: Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    adapter_name: str = "default",
) -> Tensor:
    """What DoRA adds to the base layer's output: (c - 1) W x + c s B A x with c = m / |W + s B A|.

    The norm is a constant (DoRA, arXiv 2402.09353, section 4.3), and found without a gradient, so
    that the identity matrix that peft sends through the factors is no microbatch.
    """
    found = owner_of(self)
    if found is None:
        return type(self).forward(
            self,
            x,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            base_layer=base_layer,
            base_result=base_result,
            adapter_name=adapter_name,
        )
    if not base_layer.weight.is_floating_point():
        raise ProxstepError(f"{found[1].name}: DoRA on a quantized layer is not covered; use LoRA")
    weight = base_layer.weight.to(x.dtype)
    with torch.no_grad():
        update = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name)
        norm = self.get_weight_norm(weight, update.to(x.dtype), scaling, adapter_name=adapter_name)
    factor = per_position(self, "weight", x, *found) / norm
    bias = base_layer.bias
    if base_result is None:
        base = nn.functional.linear(x, weight.mT if self.fan_in_fan_out else weight)
    else:
        base = base_result if bias is None else base_result - bias
    return (factor - 1) * base + factor * lora_B(lora_A(x)) * scaling

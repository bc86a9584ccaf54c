"""Whether a model's logits are its last hidden states times its output layer's weight.

Legend for shape suffixes: B sequences, T token positions, D features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.logprobs.evaluating import evaluating
from proxstep.logprobs.tokens import widest_dtype
from proxstep.training.output_layer import REMEDY, forward_with_head, output_head, unwrapped
from proxstep.typing import Tensor

LOGIT_FIELDS = (
    "final_logit_softcapping",  # Gemma 2 and after
    "logits_soft_cap",  # RecurrentGemma
    "logits_scaling",  # Granite
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # FalconH1
    "output_multiplier",
    "softcap",
)
"""Fields of models' configurations that say what becomes of the output layer's outputs."""


@torch.no_grad()
def check_chunkable(model: nn.Module) -> None:
    """Refuse a model whose logits are not its last hidden states times its output layer's weight.

    Runs two short forwards in evaluation mode: in one the output layer returns numbers of every
    size, which must come out as the logits unchanged; in the other it computes what it does.
    Training modes, gradients and random numbers are left as they were. With DDP or FSDP2 every
    process has to call it.

    Args:
        model: A causal language model of transformers, wrapped or not.

    Raises:
        ProxstepError: If it caps or scales its logits, or its output layer is not a plain linear
            one; the message names what does so.
    """
    head = output_head(model)
    name, device = type(unwrapped(model)).__name__, next(model.parameters()).device
    token_BT = torch.arange(8, device=device).reshape(2, 4) % head.out_features
    position_BT = torch.arange(4, device=token_BT.device).expand(2, 4)
    inputs = token_BT, torch.ones_like(token_BT), position_BT
    own_forward, expected = head.forward, []

    def ramp(hidden_BTD: Tensor) -> Tensor:
        steps = torch.linspace(-1e3, 1e3, 8 * head.out_features, device=hidden_BTD.device)
        expected.append(steps.to(hidden_BTD.dtype).reshape(2, 4, head.out_features))
        return expected[0]

    def observe(hidden_BTD: Tensor) -> Tensor:
        expected.append(nn.functional.linear(hidden_BTD, head.weight, head.bias))
        return own_forward(hidden_BTD)

    with evaluating(model):
        changed_BTV = forward_with_head(model, ramp, *inputs)
        logits_BTV = forward_with_head(model, observe, *inputs)
    ramp_BTV, product_BTV = expected
    digits = widest_dtype(ramp_BTV.device)
    if not torch.equal(changed_BTV.to(digits), ramp_BTV.to(digits)):
        raise ProxstepError(
            f"{name} changes what its output layer returns{_culprits(model)}, so its "
            f"logits are not hidden states times a weight; {REMEDY}"
        )
    error = (logits_BTV.to(digits) - product_BTV.to(digits)).abs().max()
    tolerance = 8 * torch.finfo(product_BTV.dtype).eps * product_BTV.to(digits).abs().max()
    if not error <= tolerance:
        raise ProxstepError(
            f"the output layer of {name} does not return hidden states times its "
            f"weight (they differ by {error:.2g}): a quantized layer or a hook does so; {REMEDY}"
        )


def _culprits(model: nn.Module) -> str:
    """Return the settings of the model's configuration that change logits, in brackets."""
    config: Any = getattr(unwrapped(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = {field: getattr(config, field, None) for field in LOGIT_FIELDS}
    found = [f"{field} = {value}" for field, value in given.items() if value not in (None, 1)]
    return f" ({', '.join(found)})" if found else ""

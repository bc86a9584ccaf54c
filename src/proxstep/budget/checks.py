"""What KlBudget is given: an optimizer of the model, and a function that scores sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.typing import Tensor

MISSING = (
    "optimizer.step() of a KlBudget needs a function that scores a few of the minibatch's "
    "sequences: optimizer.step(log_probs), or KlBudget(..., log_probs=...) where something else "
    "calls step()"
)
RETURNS = (
    "the function given to step() must return two tensors of shape (batch, tokens), the "
    "log-probabilities of tokens and a mask of those that count, as "
    "completion_log_probs(logits, input_ids, mask), mask[:, 1:]"
)
ANEW = (
    "the function given to step() must give the same numbers while the parameters are the same: "
    "draw its sequences before optimizer.step, and leave the model in evaluation mode"
)


def checked(found: Any) -> tuple[Tensor, Tensor]:
    """Return what a user's function returned, if it is what it should be."""
    if not isinstance(found, tuple | list):
        found = (found,)
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found]
    if len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ProxstepError(f"{RETURNS}: got {' and '.join(map(str, shapes))}")
    log_prob_BT, response_BT = found
    if log_prob_BT.dtype not in (torch.float32, torch.float64):
        raise ProxstepError(f"{RETURNS}, in float32: got {log_prob_BT.dtype}")
    return log_prob_BT, response_BT.bool()


def check_trained(optimizer: Any, model: Any) -> None:
    """Refuse arguments of other types, and an optimizer of other parameters than the model's."""
    for name, value, kind in (
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("model", model, nn.Module),
    ):
        if not isinstance(value, kind):
            raise ProxstepError(
                f"{name} is {type(value).__name__}: KlBudget(optimizer, model, nats=...) takes an "
                "optimizer of torch first, and then the model"
            )
    inmost = getattr(optimizer, "optimizer", optimizer)  # accelerate's has these methods of its own
    if callable(getattr(inmost, "train", None)) and callable(getattr(inmost, "eval", None)):
        raise ProxstepError(
            f"{type(inmost).__name__} keeps weights of its own, which would take the whole step "
            "where the model takes a part: a KL budget needs an optimizer without train() and "
            "eval(), as torch.optim.AdamW"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ProxstepError(
            "the model is in a FullyShardedDataParallel, which keeps whole weights from one pass "
            "to the next, so that a step cannot be measured: shard it with "
            "torch.distributed.fsdp.fully_shard (FSDP2), or leave the KL budget out"
        )
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = {name: p.dtype for name, p in model.named_parameters() if id(p) in stepped}
    if not names:
        raise ProxstepError(
            "the optimizer trains no parameter of the model: make it from model.parameters() of "
            "this very model, after the model was moved, wrapped or sharded"
        )
    for name, dtype in names.items():
        if dtype in (torch.bfloat16, torch.float16):
            raise ProxstepError(
                f"a KL budget measures small differences of log-probabilities, and {name} is "
                f"{str(dtype).removeprefix('torch.')}, whose rounding errors are larger: load the "
                'model in float32, as from_pretrained(..., dtype="float32") or in TRL '
                'model_init_kwargs={"dtype": "float32"}'
            )

"""TRL's scoring of tokens, with the output layer's gradient under ISOPO's rule.

TRL's fused output layer computes log-probabilities from the hidden states and the layer's weight,
past the layer's forward. Where the weight is trained, that would leave its gradient plain; here the
same call gives the transformed one: in chunks where the rule and the model allow it, else from all
logits.

A release without it takes the model's own logits, at the completions' positions alone: the layer
would see fewer positions than the others do. Here it gets them all; TRL takes what it needs of the
logits afterwards.

Shapes: B sequences, T token positions, N scored positions, D features, V
vocabulary.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from proxstep.engines.trl.release import FusedOutput
from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import owner_of
from proxstep.logprobs.tokens import entropy, token_log_probs
from proxstep.training.chunkable import check_chunkable
from proxstep.training.output_layer import (
    head_computes,
    output_head,
    scoring_forward,
    spread,
)
from proxstep.typing import Tensor

_IGNORED = -100
_FROM_ALL = "the output layer is transformed from all logits, in T x V memory"


def response_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return where the batch's completion tokens count, as booleans."""
    mask_BT = batch["completion_mask"]
    if "tool_mask" in batch:
        mask_BT = mask_BT * batch["tool_mask"]
    return mask_BT.bool()


def transform_head(core: Any, temperature: float, *, needs_full: bool) -> tuple[int, str]:
    """Put the model's output layer under the rule of the `Isopo` that is installed on it.

    Args:
        core: The transformers model, with TRL's fused head already on it where TRL has one.
        temperature: Of the sampling.
        needs_full: Whether the rule needs what a chunked head does not form.

    Returns:
        What was done, for the log, and at which level: a warning where it costs memory.

    Raises:
        ProxstepError: If TRL's output layer is fused, and the model's not a plain linear one.
    """
    if not any(weight.requires_grad for weight in core.get_output_embeddings().parameters()):
        return logging.INFO, "the output layer is frozen: TRL's scoring is used as it is"
    if FusedOutput is None:
        _give_every_position(core)
        reason = "this release of TRL has no fused one"
        return logging.WARNING, f"{_FROM_ALL}: {reason}"
    try:
        head, fused = output_head(core), core.forward
    except ProxstepError as error:
        reason, _, _ = str(error).partition(";")
        raise ProxstepError(
            f"{reason}; leave it out of target_modules, modules_to_save and "
            "trainable_token_indices, or freeze it"
        ) from None
    reason = "the rule needs them" if needs_full else _not_chunkable(core, head)
    score = _full if reason else functools.partial(_chunked, head)

    @functools.wraps(fused)  # generate() looks at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head") or owner_of(head) is None:
            return fused(*args, **kwargs)
        del kwargs["fused_lm_head"]
        labels_BT = kwargs.pop("labels")
        kwargs["use_cache"] = False
        return score(functools.partial(fused, *args, **kwargs), labels_BT, temperature)

    core.forward = types.MethodType(forward, core)
    if reason:
        return logging.WARNING, f"{_FROM_ALL}: {reason}"
    return logging.INFO, "the output layer is transformed in chunks, in place of TRL's fused one"


def _give_every_position(core: Any) -> None:
    """Let a forward with gradient compute the logits at all positions, as without the argument."""
    own = core.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            kwargs.pop("logits_to_keep", None)
        return own(*args, **kwargs)

    core.forward = types.MethodType(forward, core)


def _not_chunkable(core: Any, head: nn.Linear) -> str:
    if head.bias is not None and head.bias.requires_grad:
        return "it has a trained bias"
    try:
        check_chunkable(core)
    except ProxstepError as error:
        return str(error)
    return ""


def _chunked(head: nn.Linear, forward: Any, labels_BT: Tensor, temperature: float) -> Any:
    """Score the labels a chunk of positions at a time, inside the output layer's call."""
    scored_BT = labels_BT[:, 1:] != _IGNORED
    score, entropies = scoring_forward(head, labels_BT, scored_BT, temperature, with_entropy=True)
    with head_computes(head, score):
        found = forward()
    return _output(found.logits, entropies[0], scored_BT, found)


def _full(forward: Any, labels_BT: Tensor, temperature: float) -> Any:
    """Score the labels from all positions' logits, which come out of the output layer's forward."""
    scored_BT = labels_BT[:, 1:] != _IGNORED
    found = forward()
    logits_NV = found.logits[:, :-1][scored_BT] / temperature
    log_prob_N = token_log_probs(logits_NV[None], labels_BT[:, 1:][scored_BT][None])[0]
    entropy_N = entropy(logits_NV.detach()[None])[0]
    return _output(spread(log_prob_N, scored_BT), spread(entropy_N, scored_BT), scored_BT, found)


def _output(log_prob_BT: Tensor, entropy_BT: Tensor, scored_BT: Tensor, found: Any) -> Any:
    return FusedOutput(
        log_probs=log_prob_BT,
        entropy=entropy_BT,
        label_mask=scored_BT,
        aux_loss=getattr(found, "aux_loss", None),
    )


def rebind_forwards(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy's forwards be its own: a function is copied as it is, with what it holds.

    TRL's and ours hold the forward that they replaced, bound to the model that they were made for.

    Args:
        model: The model that was copied.
        memo: Of `copy.deepcopy`.
    """
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, types.MethodType):
            vars(memo[id(module)])["forward"] = _rebound(forward, memo)


def _rebound(method: types.MethodType, memo: dict[int, Any]) -> types.MethodType:
    """Return a bound method of the copied object, with copies of what its function holds."""
    function: Any = method.__func__
    if function.__closure__:
        held = [cell.cell_contents for cell in function.__closure__]
        cells = tuple(
            types.CellType(
                _rebound(value, memo)
                if isinstance(value, types.MethodType)
                else copy.deepcopy(value, memo)
            )
            for value in held
        )
        copied = types.FunctionType(
            *(function.__code__, function.__globals__, function.__name__),
            *(function.__defaults__, cells),
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        function = functools.update_wrapper(copied, function)
    return types.MethodType(function, copy.deepcopy(method.__self__, memo))

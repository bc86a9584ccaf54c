"""The output layer of a transformers causal LM, replaced for one forward by another computation.

`chunked_log_probs` needs the hidden states that the output layer would turn into T x V logits. The
model is called as ever, through whatever wraps it (PEFT, DDP, FSDP2), but for the length of the
call its output layer computes something else: the wrappers' hooks run, and sharded weights are
whole while they are used.

Legend for shape suffixes: B sequences, T token positions of prompt and completion together, D
features, N chosen positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo.head import head_log_probs
from proxstep.typing import Bool, Float, Int, Tensor

REMEDY = "use the full head"


def forward_with_head(
    model: nn.Module,
    head_forward: Callable[[Tensor], Tensor],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Tensor,
    position_ids: Int[Tensor, "batch tokens"],
) -> Tensor:
    """Call the model with `head_forward` in the place of its output layer's forward.

    Args:
        model: A causal language model that passed `check_chunkable`, wrapped or not.
        head_forward: From the last hidden states (batch, tokens, features) to any one tensor.
        input_ids: Tokens.
        attention_mask: As the model takes it.
        position_ids: Likewise.

    Returns:
        What `head_forward` returned, as the model hands it out for its logits.

    Raises:
        ProxstepError: If the model does not call its output layer once with every position.
    """
    head, calls = output_head(model), []

    def observed(hidden_BTD: Tensor) -> Tensor:
        calls.append(hidden_BTD.shape[:2])
        return head_forward(hidden_BTD)

    with head_computes(head, observed):
        out = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
    if calls != [input_ids.shape]:
        shapes = ", ".join(str(tuple(shape)) for shape in calls) or "none"
        raise ProxstepError(
            f"the model should call its output layer once, with hidden states at the "
            f"{tuple(input_ids.shape)} positions of its input, but the calls were: {shapes}; a "
            f"prompt adapter, a compiled or a fused head does so; {REMEDY}"
        )
    return out.logits


def output_head(model: nn.Module) -> nn.Linear:
    """Return the model's output layer.

    Raises:
        ProxstepError: If it is not a plain linear layer, by name.
    """
    core: Any = unwrapped(model)
    get = getattr(core, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        raise ProxstepError(f"{type(core).__name__} names no output layer; {REMEDY}")
    name = next((name for name, module in core.named_modules() if module is head), "lm_head")
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ProxstepError(
            f"{name} is wrapped by a PEFT adapter ({type(head).__name__}), so its logits are not "
            f"hidden states times one weight; keep adapters off {name}, or {REMEDY}"
        )
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ProxstepError(
            f"{name} is a {type(head).__name__}, not a linear layer with a floating-point weight; "
            f"{REMEDY}"
        )
    return head


def completion_log_probs_chunked(
    model: nn.Module,
    token_BT: Int[Tensor, "batch tokens"],
    attention_BT: Bool[Tensor, "batch tokens"],
    response_BT: Bool[Tensor, "batch tokens"],
    temperature: float,
    *,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Tensor, "batch last"], Float[Tensor, "batch last"] | None]:
    """Return log pi of the completions' tokens, with gradient and without T x V logits.

    Where an `Isopo` is installed on the model, the output layer's gradient follows its rule.

    Args:
        model: A causal language model that passed `check_chunkable`, wrapped or not.
        token_BT: Prompts and completions.
        attention_BT: True at their positions, False at padding.
        response_BT: True at completion positions.
        temperature: Of the sampling.
        chunk_size: Positions whose logits exist at a time, see `chunked_log_probs`.
        with_entropy: Measure the entropies as well.

    Returns:
        Log-probabilities in nats of the tokens from the second position on, 0 outside the
        completions; and the entropies there, without gradient, or None.

    Raises:
        ProxstepError: As `forward_with_head` and `chunked_log_probs` do.
    """
    head_forward, entropies = scoring_forward(
        output_head(model),
        token_BT,
        response_BT[:, 1:],
        temperature,
        chunk_size=chunk_size,
        with_entropy=with_entropy,
    )
    attention = attention_BT.long()
    position_BT = (attention.cumsum(dim=1) - 1).clamp(min=0)
    log_prob_BT = forward_with_head(model, head_forward, token_BT, attention, position_BT)
    return log_prob_BT, entropies[0] if with_entropy else None


def scoring_forward(
    head: nn.Linear,
    token_BT: Int[Tensor, "batch tokens"],
    chosen_BT: Bool[Tensor, "batch last"],
    temperature: float,
    *,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """Return a forward for the output layer that scores tokens in chunks.

    Args:
        head: The output layer.
        token_BT: The tokens; only the chosen ones matter.
        chosen_BT: True where the token after a position is to be scored.
        temperature: Of the sampling.
        chunk_size: Positions whose logits exist at a time, see `chunked_log_probs`.
        with_entropy: Keep the entropies as well.

    Returns:
        From the last hidden states (batch, tokens, features) to log-probabilities (batch, last),
        0 where not chosen; and a list to which each call appends its entropies of that shape.
    """
    target_N = token_BT[:, 1:][chosen_BT]
    position_BT = torch.arange(token_BT.numel(), device=token_BT.device).view_as(token_BT)
    position_N = position_BT[:, :-1][chosen_BT]
    entropies: list[Tensor] = []

    def head_forward(hidden_BTD: Tensor) -> Tensor:
        scores = head_log_probs(
            head,
            hidden_BTD[:, :-1][chosen_BT],
            target_N,
            position_N,
            temperature=temperature,
            chunk_size=chunk_size,
            with_entropy=with_entropy,
        )
        if not isinstance(scores, tuple):
            return spread(scores, chosen_BT)
        entropies.append(spread(scores[1], chosen_BT))
        return spread(scores[0], chosen_BT)

    return head_forward, entropies


def spread(
    value_N: Float[Tensor, " chosen"], chosen_BT: Bool[Tensor, "batch last"]
) -> Float[Tensor, "batch last"]:
    """Return the values at the chosen positions and zeros elsewhere."""
    zeros_BT = value_N.new_zeros(chosen_BT.shape)
    return zeros_BT.index_put(chosen_BT.nonzero(as_tuple=True), value_N)


@contextmanager
def head_computes(head: nn.Linear, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the layer's forward on the instance, and put back what was there.

    Args:
        head: The output layer.
        function: What it computes meanwhile, from its inputs (batch, tokens, features).
    """
    before = {name: value for name, value in vars(head).items() if name == "forward"}
    vars(head)["forward"] = function
    try:
        yield
    finally:
        del vars(head)["forward"]
        vars(head).update(before)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside DDP, torch.compile and PEFT wrappers."""
    inner: Any = model
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

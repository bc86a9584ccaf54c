"""What a loop of one's own hands over: log-probabilities of completions, and whose each token is.

Legend for shape suffixes: B sequences, R rows, T token positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import token_log_probs
from proxstep.typing import Bool, Float, Int, Tensor


def completion_log_probs(
    logits: Float[Tensor, "rows tokens vocab"],
    input_ids: Int[Tensor, "rows tokens"],
    completion_mask: Bool[Tensor, "rows tokens"] | Int[Tensor, "rows tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, "rows predicted"]:
    """Return log pi of each completion token, and 0 at every other token.

        log pi(y_t) = log softmax(logits_{t-1} / temperature)[y_t]

    Rows may be padded on either side, or hold several sequences behind each other.

    Args:
        logits: What the model says at each position about the next one's token.
        input_ids: The tokens, prompts and completions.
        completion_mask: True, or 1, at the tokens that the policy chose.
        temperature: What they were sampled at.

    Returns:
        For each token but a row's first its log-probability, in nats, in float32 or better.

    Raises:
        ProxstepError: If the shapes do not fit, the temperature is not positive, or a completion
            begins at a row's first token, which nothing predicts.

    Source: equation 2 of arXiv 2512.23353 sums them to a sequence's log-probability.

    >>> logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[2, 0, 1]])
    >>> completion_log_probs(logits, tokens, torch.tensor([[0, 0, 1]]))
    tensor([[ 0.0000, -1.3863]])
    """
    if not isinstance(logits, Tensor):
        raise ProxstepError(
            f"logits is {type(logits).__name__}: pass the tensor in it, as model(...).logits"
        )
    if logits.shape[:2] != input_ids.shape or completion_mask.shape != input_ids.shape:
        raise ProxstepError(
            f"logits {tuple(logits.shape)}, input_ids {tuple(input_ids.shape)} and completion_mask "
            f"{tuple(completion_mask.shape)} must agree in their first two dimensions"
        )
    if not temperature > 0:
        raise ProxstepError(f"temperature must be positive, got {temperature}")
    chosen_RT = completion_mask.bool()
    if bool(chosen_RT[:, :1].any()):
        raise ProxstepError(
            "completion_mask is true at a row's first token, which no other token predicts: a "
            "prompt needs a token at least"
        )
    chosen_RT = chosen_RT[:, 1:]
    token_RT = input_ids[:, 1:].masked_fill(~chosen_RT, 0)  # others may be -100, as in labels
    log_prob_RT = token_log_probs(logits[:, :-1] / temperature, token_RT)
    return log_prob_RT.masked_fill(~chosen_RT, 0.0)


def sequence_ids(
    attention_mask: Bool[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"],
) -> Int[Tensor, "batch tokens"]:
    """Return each position's sequence where every row holds one, -1 for padding.

    Args:
        attention_mask: True, or 1, at the tokens that are not padding.

    >>> sequence_ids(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    tensor([[ 0,  0, -1],
            [ 1,  1,  1]])
    """
    row_B1 = torch.arange(len(attention_mask), device=attention_mask.device)[:, None]
    return torch.where(attention_mask.bool(), row_B1, -1)


def packed_sequence_ids(
    lengths: Sequence[int] | Int[Tensor, " batch"], num_tokens: int | None = None
) -> Int[Tensor, "1 tokens"]:
    """Return each position's sequence where one row holds them all, -1 for padding behind them.

    Args:
        lengths: Tokens of each sequence, prompt included, in the row's order.
        num_tokens: Length of the row; by default the sum.

    Raises:
        ProxstepError: If a length is negative, or the row is shorter than their sum.

    >>> packed_sequence_ids([2, 3], 6)
    tensor([[ 0,  0,  1,  1,  1, -1]])
    """
    length_B = torch.as_tensor(lengths)
    total = int(length_B.sum())
    padding = (total if num_tokens is None else num_tokens) - total
    if padding < 0 or bool((length_B < 0).any()):
        raise ProxstepError(
            f"lengths must not be negative, nor their sum, {total}, above num_tokens {num_tokens}"
        )
    id_T = torch.arange(len(length_B), device=length_B.device).repeat_interleave(length_B)
    return torch.nn.functional.pad(id_T, (0, padding), value=-1)[None]

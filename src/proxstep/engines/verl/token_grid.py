"""Where the sequences of one of verl's micro-batches lie in the token grid that the model sees.

verl keeps a micro-batch's tokens without padding, sequence after sequence; the model sees them
packed into one row, or as padded rows.

Legend for shape suffixes: B sequences, N tokens without padding, T columns, R response tokens.
"""

from __future__ import annotations

import torch
from verl.workers.utils.padding import no_padding_2_padding

from proxstep.typing import Bool, Int, Tensor


def response_mask_of(data: object) -> Bool[Tensor, "batch response"]:
    """Return where a micro-batch's response tokens count, as verl's loss sees them."""
    return data.select("response_mask").to_padded_tensor()["response_mask"].bool()  # type: ignore[attr-defined]


def completion_tokens(
    data: object, response_BR: Bool[Tensor, "batch response"], num_tokens: int
) -> Bool[Tensor, " tokens"]:
    """Return which of the tokens without padding are response tokens that count.

    verl's own gathering of log-probabilities says where each one is predicted: a position before.
    """
    place_N = torch.arange(num_tokens, device=response_BR.device)
    predicted_BR = no_padding_2_padding(place_N, data)  # type: ignore[arg-type]
    completion_N = torch.zeros(num_tokens, dtype=torch.bool, device=response_BR.device)
    completion_N[predicted_BR[response_BR] + 1] = True
    return completion_N


def sequence_ids(
    length_B: Int[Tensor, " batch"], counted_B: Bool[Tensor, " batch"]
) -> Int[Tensor, " tokens"]:
    """Return the number of each token's sequence among those that count, else -1."""
    number_B = torch.where(counted_B, counted_B.long().cumsum(0) - 1, -1)
    return number_B.repeat_interleave(length_B)


def packed(value_N: Tensor, fill: int, num_padding: int) -> Tensor:
    """Return the grid of one row, with padding behind."""
    return torch.nn.functional.pad(value_N, (0, num_padding), value=fill)[None]


def padded(value_N: Tensor, fill: int, length_B: Int[Tensor, " batch"]) -> Tensor:
    """Return the grid of one row per sequence, each padded on the right."""
    column_T = torch.arange(int(length_B.max()), device=value_N.device)
    real_BT = column_T < length_B[:, None]
    return torch.full(
        real_BT.shape, fill, dtype=value_N.dtype, device=value_N.device
    ).masked_scatter(real_BT, value_N)

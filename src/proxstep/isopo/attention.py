"""nn.MultiheadAttention: one packed product for queries, keys and values, and one for the output.

The module never calls its output layer, and multiplies by that layer's weight itself.

Legend for shape suffixes: B rows of the token grid, T its columns, H heads, D features of a head,
F features.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import covers, owner_of
from proxstep.isopo.linear import routed_linear
from proxstep.typing import Tensor


def _is_attention(module: nn.Module) -> bool:
    if type(module).forward is not nn.MultiheadAttention.forward:
        return False
    return {name for name, _ in module.named_parameters(recurse=False)} <= {
        "in_proj_weight",
        "in_proj_bias",
    }


@covers(_is_attention, matrices=("in_proj_weight",), borrows=True)
def _forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    found = owner_of(self, borrows=True)
    if found is None:
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return nn.MultiheadAttention.forward(self, query, key, value, *options)
    owner, site = found
    if key is not query or value is not query or query.dim() != 3 or self.add_zero_attn:
        raise ProxstepError(
            f"{site.key('in_proj_weight')}: ISOPO covers self-attention over (batch, positions, "
            "features), called with the same tensor as query, key and value and without "
            'add_zero_attn; freeze it, or set other_parameters="reinforce"'
        )
    x_TBF = query.transpose(0, 1) if self.batch_first else query  # as the module multiplies it
    keys = (site.key("in_proj_weight"), site.key("in_proj_bias"))
    weights = (self.in_proj_weight, self.in_proj_bias)
    packed = routed_linear(x_TBF, *weights, owner, keys, columns_first=True)
    heads = packed.reshape(*x_TBF.shape[:2], 3, self.num_heads, -1).permute(2, 1, 3, 0, 4)
    mask = _mask(attn_mask, key_padding_mask, heads)
    dropout = self.dropout if self.training else 0.0
    weight_BHTT = None
    if need_weights:
        mixed_BHTD, weight_BHTT = _attend(heads, mask, dropout)
    else:
        causal = is_causal and key_padding_mask is None
        mixed_BHTD = nn.functional.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], None if causal else mask, dropout, causal
        )
    mixed_TBF = mixed_BHTD.permute(2, 0, 1, 3).contiguous().flatten(2)
    weights = (self.out_proj.weight, self.out_proj.bias)
    keys = (site.key("out_proj.weight"), site.key("out_proj.bias"))
    y_TBF = routed_linear(mixed_TBF, *weights, owner, keys, columns_first=True)
    if weight_BHTT is not None and average_attn_weights:
        weight_BHTT = weight_BHTT.mean(dim=1)
    return y_TBF.transpose(0, 1) if self.batch_first else y_TBF, weight_BHTT


def _attend(heads: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Return what attention mixes and its weights."""
    query_BHTD, key_BHTD, value_BHTD = heads
    score_BHTT = (query_BHTD * math.sqrt(1.0 / query_BHTD.shape[-1])) @ key_BHTD.mT
    score_BHTT = score_BHTT if mask is None else score_BHTT + mask
    weight_BHTT = nn.functional.dropout(score_BHTT.softmax(dim=-1), dropout)
    return weight_BHTT @ value_BHTD, weight_BHTT


def _mask(attn_mask: Tensor | None, padding: Tensor | None, heads: Tensor) -> Tensor | None:
    """Return what is added to the scores, broadcastable to (batch, heads, queries, keys)."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(heads.dtype)
        zeros = torch.zeros_like(mask, dtype=heads.dtype)
        return zeros.masked_fill(mask, -math.inf)

    parts = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3
        parts.append(
            added(
                attn_mask.view(*heads.shape[1:3], *attn_mask.shape[1:]) if per_head else attn_mask
            )
        )
    if padding is not None:
        parts.append(added(padding)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None

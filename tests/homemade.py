"""Tiny models of the kinds that people write themselves, called as those of `transformers` are.

`NanoGpt` has what karpathy/nanoGPT has: a LayerNorm of its own with an optional bias, positions of
shape (T,), and a head that is the embedding, used through F.linear. `Homemade` has the rest.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm

WIDTH, HEADS, LENGTH = 16, 4, 32


class PlainLayerNorm(nn.Module):
    """nanoGPT's."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(width))
        self.bias = nn.Parameter(0.2 * torch.randn(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class GammaNorm(nn.Module):
    """RMSNorm in LLaMA's way of casting, with another name for its weight, and a shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.2 * torch.randn(width))
        self.beta = nn.Parameter(0.2 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normalized * (1.0 + self.gamma).to(x.dtype) + self.beta


class HeadNorm(Cohere2LayerNorm):
    """Cohere2's, with a weight for each head, and without its casts to float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight.to(hidden_states.dtype) * hidden_states


class ScaledLinear(nn.Linear):
    """A subclass that calls the base class."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.7 * super().forward(input)


class OwnLinear(nn.Linear):
    """A subclass that does not."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Attention(nn.Module):
    """Causal attention with a norm over the heads of its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = ScaledLinear(WIDTH, 3 * WIDTH)
        self.norm = HeadNorm((HEADS, WIDTH // HEADS))
        self.out = OwnLinear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = self.packed(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = self.norm(q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, allowed[:, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class PackedAttention(nn.Module):
    """nn.MultiheadAttention on the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        mask = ~allowed.repeat_interleave(HEADS, dim=0)
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norms
        self.attention = attention
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), allowed)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class _Base(nn.Module):
    """Masks, and checkpointing as `transformers` switches it on."""

    blocks: nn.ModuleList
    checkpointing: bool | None = None

    def activation_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.checkpointing = options["use_reentrant"]

    def enable_input_require_grads(self) -> None:
        pass

    def run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        num_tokens = x.shape[1]
        allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        allowed = allowed.expand(len(x), -1, -1)
        if mask is not None:
            allowed = allowed & (mask[:, 0] if mask.dim() == 4 else mask[:, None]).bool()
        allowed = allowed | torch.eye(num_tokens, dtype=torch.bool)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x, allowed)
            else:
                x = checkpoint(block, x, allowed, use_reentrant=self.checkpointing)
        return x


class NanoGpt(_Base):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            Block((PlainLayerNorm(WIDTH, bias), PlainLayerNorm(WIDTH, not bias)), Attention())
            for bias in (True, False)
        )
        self.norm = PlainLayerNorm(WIDTH, False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: object,
    ) -> SimpleNamespace:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])
        x = self.run(self.wte(input_ids) + self.wpe(position_ids), attention_mask)
        return SimpleNamespace(logits=F.linear(self.norm(x), self.wte.weight))


class Homemade(_Base):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Parameter(0.3 * torch.randn(1, LENGTH, WIDTH))
        self.shift = nn.Parameter(0.3 * torch.randn(WIDTH))
        self.blocks = nn.ModuleList(
            Block((GammaNorm(WIDTH), GammaNorm(WIDTH)), PackedAttention()) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, vocab, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: object,
    ) -> SimpleNamespace:
        if position_ids is None:
            x = self.table(input_ids) + self.positions[:, : input_ids.shape[1]]
        else:
            x = self.table(input_ids) + self.positions[0][position_ids]
        return SimpleNamespace(logits=self.head(self.run(x + self.shift, attention_mask)))

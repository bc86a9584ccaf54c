"""Tiny models that the tests build, in float64 where exactness is measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding


class ExactRMSNorm(Qwen3RMSNorm):
    """Qwen3's RMSNorm without its cast to float32, which would put a floor of 4e-7 under every
    comparison.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class ExactRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding in float64, for the same reason."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.inv_freq.double()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def tiny_qwen3(tied: bool = True, vocab: int = 19, dtype: torch.dtype = torch.float64) -> nn.Module:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        initializer_range=0.3,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    for module in model.modules():
        if type(module) is Qwen3RMSNorm:
            module.__class__ = ExactRMSNorm
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
        if type(module) is Qwen3RotaryEmbedding:
            module.__class__ = ExactRotaryEmbedding
    return model.eval()


def tiny_gpt2(vocab: int = 19, dtype: torch.dtype = torch.float64) -> nn.Module:
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=4,
        attn_implementation="sdpa",
        initializer_range=0.3,
    )
    model = GPT2LMHeadModel(config).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(
                parameter, mean=1.0 if "ln" in name and "weight" in name else 0.0, std=0.2
            )
    return model.eval()

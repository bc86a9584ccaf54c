"""What every benchmark runs on: a Qwen3-architecture model with random weights, and a microbatch.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from proxstep.logprobs.tokens import token_log_probs
from proxstep.typing import Float, Int, Tensor


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3-architecture model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


SHAPES = {
    "qwen3-0.6b": Shape(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
    ),
    "smollm2-135m": Shape(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49_152,
    ),
    "embedded": Shape(
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=16,
    ),
}
"""The sizes of published models, and of the library's own small one; the weights stay random."""


def scaled_shape(hidden_size: int, num_layers: int, vocab_size: int) -> Shape:
    """Return a small model's sizes in Qwen3's proportions, with heads of 64 features."""
    return Shape(
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_layers=num_layers,
        num_heads=max(hidden_size // 64, 1),
        num_key_value_heads=max(hidden_size // 128, 1),
        head_dim=64,
        vocab_size=vocab_size,
    )


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Return a tied model with random weights, without gradient checkpointing."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    with device:
        model: Any = Qwen3ForCausalLM(config)
    return model.to(dtype).train()


def twin_of(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Return a copy with modules of its own that shares the model's parameters."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


def untied(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Return a twin whose head is a parameter of its own, equal to the embedding."""
    twin = twin_of(model)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    return twin


@dataclass(frozen=True)
class Batch:
    """One microbatch of whole sequences: the first half of each is prompt, the rest completion.

    Attributes:
        token_BT: The tokens.
        coefficient_B: Each sequence's advantage over the number of sequences.
    """

    token_BT: Int[Tensor, "batch tokens"]
    coefficient_B: Float[Tensor, " batch"]

    @property
    def sequence_BT(self) -> Int[Tensor, "batch tokens"]:
        """The sequence of each position: row b is sequence b."""
        row_B = torch.arange(len(self.token_BT), device=self.token_BT.device)
        return row_B[:, None].expand_as(self.token_BT)

    @property
    def num_prompt(self) -> int:
        """Tokens of each prompt."""
        return self.token_BT.shape[1] // 2


def draw_batch(num_sequences: int, length: int, vocab_size: int, device: torch.device) -> Batch:
    """Return random tokens and coefficients, always the same for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(vocab_size, (num_sequences, length), generator=generator)
    coefficient_B = torch.randn(num_sequences, generator=generator) / num_sequences
    return Batch(token_BT.to(device), coefficient_B.to(device))


def completion_log_probs(
    model: Callable[..., Any], token_BT: Int[Tensor, "batch tokens"], num_prompt: int
) -> Float[Tensor, " batch"]:
    """Return log pi(completion | prompt) of each row, in nats."""
    logits_BTV = model(input_ids=token_BT, use_cache=False).logits
    log_prob_BT = token_log_probs(logits_BTV[:, num_prompt - 1 : -1], token_BT[:, num_prompt:])
    return log_prob_BT.sum(dim=1)


def reinforce(model: nn.Module, batch: Batch) -> None:
    """Run one microbatch of plain REINFORCE: what everything else is compared with."""
    model.zero_grad()
    log_prob_B = completion_log_probs(model, batch.token_BT, batch.num_prompt)
    (-(batch.coefficient_B * log_prob_B).sum()).backward()

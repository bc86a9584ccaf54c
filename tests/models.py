"""Tiny models of the families that `transformers` has, and the exact float64 versions of their
layers.

Weights are drawn in float32 and cast, so that one seed gives one model in every dtype.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaRotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRMSNorm, MistralRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import (
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralTopKRouter,
)
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm, Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)

from tests.homemade import Homemade, NanoGpt

VOCAB = 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attn_implementation": "sdpa",  # the eager softmax computes in float32
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# -- layers without their casts to float32, which put a floor of 4e-7 under every comparison -------


def _theirs(forward: Any) -> Any:
    """Have a forward count as one of transformers' own: what covers a module tells by that."""
    forward.__module__ = "transformers.models"
    return forward


class _ScalesByWeight:
    weight: Tensor
    variance_epsilon: float

    @_theirs
    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class _ScalesByOnePlusWeight:
    weight: Tensor
    eps: float

    @_theirs
    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.eps) * (1.0 + self.weight)


class _Rotates:
    inv_freq: Tensor
    attention_scaling: float

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return _cos_sin(x, position_ids, self.inv_freq, self.attention_scaling)


class _RotatesByLayerType:
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        inv_freq = getattr(self, f"{layer_type}_inv_freq")
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        return _cos_sin(x, position_ids, inv_freq, scaling)


class _Routes:
    """Scales the chosen experts' shares to a sum of 1, as both families are built here."""

    weight: Tensor
    hidden_dim: int
    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        value, index = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, value / value.sum(dim=-1, keepdim=True), index


def _cos_sin(
    x: Tensor, position_ids: Tensor, inv_freq: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    angle = position_ids[..., None].double() * inv_freq.double()
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * scaling).to(x.dtype), (angle.sin() * scaling).to(x.dtype)


def _exact(mixin: type, *classes: type) -> dict[type, type]:
    """Derive an exact class from each of the library's, which keeps its name's ending."""
    return {
        cls: type(f"Exact{cls.__name__}", (mixin, cls), {"__module__": __name__}) for cls in classes
    }


EXACT = {
    **_exact(
        _ScalesByWeight,
        Qwen2RMSNorm,
        Qwen3RMSNorm,
        LlamaRMSNorm,
        MistralRMSNorm,
        Phi3RMSNorm,
        Qwen3MoeRMSNorm,
        MixtralRMSNorm,
    ),
    **_exact(_Routes, Qwen3MoeTopKRouter, MixtralTopKRouter),
    **_exact(_ScalesByOnePlusWeight, GemmaRMSNorm, Gemma3RMSNorm),
    **_exact(
        _Rotates,
        Qwen2RotaryEmbedding,
        Qwen3RotaryEmbedding,
        LlamaRotaryEmbedding,
        MistralRotaryEmbedding,
        GemmaRotaryEmbedding,
        PhiRotaryEmbedding,
        Phi3RotaryEmbedding,
        Qwen3MoeRotaryEmbedding,
        MixtralRotaryEmbedding,
    ),
    **_exact(_RotatesByLayerType, Gemma3RotaryEmbedding),
}
"""The exact class of each of the library's classes that computes in float32."""
globals().update({cls.__name__: cls for cls in EXACT.values()})  # where pickle looks for them


def finish(model: nn.Module, dtype: torch.dtype, exact: bool) -> nn.Module:
    """Cast the parameters, and give the layers their exact classes if asked to.

    Buffers (frequencies, an embedding's scale) stay in float32, as `from_pretrained` leaves them;
    so do adapters over half-precision weights, as `get_peft_model` makes them.
    """
    for name, parameter in model.named_parameters():
        wanted = torch.promote_types(dtype, torch.float32) if "lora_" in name else dtype
        parameter.data = parameter.data.to(wanted)
    for module in model.modules():
        if exact and type(module) in EXACT:
            module.__class__ = EXACT[type(module)]
    return model.eval()


# -- the families, in float32 and of the library's own layers --------------------------------------


def _sizes(**changes: Any) -> dict[str, Any]:
    return SIZES | changes


def randomized(model: nn.Module) -> nn.Module:
    """Move what the library initializes to constants: normalizations, biases, the padding's row."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.normal_(module.weight.data[module.padding_idx], std=0.3)
    return model


def qwen2() -> nn.Module:
    return randomized(Qwen2ForCausalLM(Qwen2Config(**_sizes(tie_word_embeddings=True))))


def qwen3(tied: bool = True, vocab: int = VOCAB) -> nn.Module:
    sizes = _sizes(vocab_size=vocab, head_dim=6, tie_word_embeddings=tied)
    return randomized(Qwen3ForCausalLM(Qwen3Config(**sizes)))


def llama() -> nn.Module:
    config = LlamaConfig(**_sizes(attention_bias=True, mlp_bias=True))
    return randomized(LlamaForCausalLM(config))


def mistral() -> nn.Module:
    config = MistralConfig(**_sizes(head_dim=6, sliding_window=None))
    return randomized(MistralForCausalLM(config))


def gemma() -> nn.Module:
    return randomized(GemmaForCausalLM(GemmaConfig(**_sizes(head_dim=6, pad_token_id=0))))


def gemma3() -> nn.Module:
    """One layer of each type; the window is wider than any test's sequence."""
    sizes = _sizes(
        head_dim=6,
        pad_token_id=0,
        query_pre_attn_scalar=6,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        attention_bias=True,
    )
    return randomized(Gemma3ForCausalLM(Gemma3TextConfig(**sizes)))


def phi() -> nn.Module:
    """Half of each head is rotated, and heads are normalized by LayerNorm."""
    return randomized(PhiForCausalLM(PhiConfig(**_sizes(qk_layernorm=True))))


def phi3() -> nn.Module:
    """Half of each head is rotated."""
    return randomized(Phi3ForCausalLM(Phi3Config(**_sizes(partial_rotary_factor=0.5))))


def gpt2(vocab: int = VOCAB) -> nn.Module:
    sizes = _sizes(vocab_size=vocab, max_position_embeddings=32)
    del sizes["num_key_value_heads"], sizes["intermediate_size"]
    return randomized(GPT2LMHeadModel(GPT2Config(**sizes)))


def qwen3_moe(experts: str = "eager") -> nn.Module:
    """A mixture: each block's experts are packed into two three-dimensional parameters.

    They are multiplied one by one: the library's grouped product knows no float64.
    """
    sizes = _sizes(
        head_dim=6,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        norm_topk_prob=True,
        experts_implementation=experts,
    )
    return randomized(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))


def mixtral() -> nn.Module:
    sizes = _sizes(
        num_local_experts=3,
        num_experts_per_tok=2,
        intermediate_size=8,
        experts_implementation="batched_mm",
        sliding_window=None,
    )
    return randomized(MixtralForCausalLM(MixtralConfig(**sizes)))


def nano_gpt() -> nn.Module:
    return _drawn(NanoGpt(VOCAB))


def homemade() -> nn.Module:
    return _drawn(Homemade(VOCAB))


def _drawn(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=0.3)
            nn.init.normal_(module.in_proj_bias, std=0.3)
    return randomized(model)


def with_adapters(base: nn.Module, **options: Any) -> nn.Module:
    """Put low-rank adapters on the base; both factors, and DoRA's magnitudes, are random.

    Args:
        base: The model, which is frozen.
        options: Of peft's `LoraConfig`, beside the defaults for rank, scale and modules.
    """
    defaults = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": PROJECTIONS}
    config = LoraConfig(task_type="CAUSAL_LM", **(defaults | options))
    with warnings.catch_warnings():  # peft asks transformers for a property by its old name
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1.0 + 0.3 * torch.randn_like(parameter))
        elif "lora_" in name:
            nn.init.normal_(parameter.data, std=0.3)
    return model


# -- what most tests need --------------------------------------------------------------------------


def tiny_qwen3(
    tied: bool = True, vocab: int = VOCAB, dtype: torch.dtype = torch.float64
) -> nn.Module:
    return finish(qwen3(tied, vocab), dtype, exact=True)


def tiny_gpt2(vocab: int = VOCAB, dtype: torch.dtype = torch.float64) -> nn.Module:
    return finish(gpt2(vocab), dtype, exact=True)

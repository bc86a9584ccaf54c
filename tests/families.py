"""The model families on which ISOPO is tested.

@pytest.mark.parametrize("family", FAMILIES)
def test_something(family: str) -> None:
    model = build(family, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests import models


@dataclass(frozen=True)
class Family:
    """One architecture, tiny.

    Attributes:
        name: As in the test's id.
        make: Draw the model in float32, of the library's own layers.
        notes: What is special about it.
    """

    name: str
    make: Callable[[], nn.Module]
    notes: str


def build(
    family: str, seed: int, dtype: torch.dtype = torch.float64, exact: bool = True
) -> nn.Module:
    """Return a family's model in eval mode; a seed gives the same weights in every dtype.

    Args:
        family: A key of `FAMILIES`, `MORE` or `UNCOVERED`.
        seed: Of the weights; the global generator is left alone.
        dtype: Of the parameters. Adapters stay in float32 at least.
        exact: Replace the layers that compute in float32 whatever the dtype is by ones that do not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (FAMILIES | MORE | UNCOVERED)[family].make()
    return models.finish(model, dtype, exact)


def _named(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families}


FAMILIES = _named(
    Family("qwen2", models.qwen2, "tied head, biases on q, k and v"),
    Family("qwen3-tied", models.qwen3, "tied head, RMSNorm over heads (tokens, heads, features)"),
    Family(
        "qwen3-untied",
        lambda: models.qwen3(tied=False),
        "head of its own, RMSNorm over heads (tokens, heads, features)",
    ),
    Family("llama", models.llama, "biases in attention and mlp"),
    Family("mistral", models.mistral, "heads wider than hidden size / heads"),
    Family("gemma", models.gemma, "tied head, 1 + w RMSNorm, scaled embedding, padding_idx 0"),
    Family(
        "gemma3",
        models.gemma3,
        "as gemma, with biases and RMSNorm over heads (heads, tokens, features)",
    ),
    Family(
        "phi",
        models.phi,
        "parallel block, biases (the head's too), LayerNorm over heads (heads, tokens, features)",
    ),
    Family("phi3", models.phi3, "fused q, k, v and fused gate and up"),
    Family("gpt2", models.gpt2, "tied head, Conv1D, learned positions looked up once per batch"),
    Family("qwen3-lora", lambda: models.with_adapters(models.qwen3()), "frozen base"),
    Family(
        "qwen3-dora",
        lambda: models.with_adapters(models.qwen3(), use_dora=True),
        "frozen base, magnitudes of the projections' rows",
    ),
    Family(
        "qwen3-lora-head",
        lambda: models.with_adapters(models.qwen3(tied=False), modules_to_save=["lm_head"]),
        "frozen base but for the head, which peft copies and trains whole",
    ),
    Family("llama-lora", lambda: models.with_adapters(models.llama()), "frozen base with biases"),
    Family(
        "llama-lora-bias",
        lambda: models.with_adapters(models.llama(), bias="lora_only"),
        "the frozen projections' biases are trained",
    ),
    Family(
        "llama-dora",
        lambda: models.with_adapters(models.llama(), use_dora=True),
        "frozen base with biases, magnitudes of the projections' rows",
    ),
)

MORE = _named(
    Family("qwen3-moe", models.qwen3_moe, "packed experts, one by one; the router's bare weight"),
    Family("mixtral", models.mixtral, "packed experts, in one batched product"),
    Family(
        "nano-gpt",
        models.nano_gpt,
        "a LayerNorm of its own, one per head, tied head through F.linear, positions (T,), "
        "subclasses of nn.Linear",
    ),
    Family(
        "homemade",
        models.homemade,
        "nn.MultiheadAttention, bare positions, a norm with gamma and beta",
    ),
)
"""What people train beside these, on fewer rules and settings."""

UNCOVERED = _named(
    Family(
        "qwen3-lora-embedding",
        lambda: models.with_adapters(
            models.qwen3(tied=False), target_modules=[*models.PROJECTIONS, "embed_tokens"]
        ),
        "the embedding's adapter is two bare parameters",
    ),
)

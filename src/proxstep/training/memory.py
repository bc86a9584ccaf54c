"""How much memory a recipe will take: simple formulas over the model's configuration.

No weights are loaded: the model is built without storage, and its parameters are counted. Every
sequence counts as long as the recipe lets it be.

    proxstep train RECIPE --dry-run
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.training.rollout import SCORED_TOKENS

_OPTIMIZER_STATES = {"adamw": 2, "muon": 2, "soap": 4, "kron": 3}
"""Numbers that an optimizer keeps for a parameter; at least, for soap and kron."""
_LOGIT_COPIES = 4
"""Arrays of the size of the logits at the peak of an update's backward: the logits, and the
gradients of the chosen logit and of the log-sum-exp with their sum."""
_SCORING_COPIES = 2
"""Likewise without gradient: the logits, and one temporary of the log-sum-exp."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a run, by what takes them.

    Attributes:
        weights: Of the policy.
        gradients: Of what is trained.
        optimizer: The optimizer's state.
        initial: A copy of the initial policy.
        activations: What the widest microbatch's forward keeps for its backward.
        logits: Its logits, and what is made of them.
        geometry: ISOPO's sample of positions and its workspace.
        rollout: The KV cache, and the logits of a token.
        scoring: The logits and activations of the widest microbatch that is scored.
        accumulates: Whether there are gradients already while a microbatch is at its peak, its
            logits: where an optimizer step has several.
    """

    weights: float
    gradients: float
    optimizer: float
    initial: float
    activations: float
    logits: float
    geometry: float
    rollout: float
    scoring: float
    accumulates: bool

    @property
    def peak(self) -> float:
        """The most at a time: the phases follow one another, gradients live in the update."""
        gradients = self.gradients if self.accumulates else 0
        update = gradients + self.activations + self.logits + self.geometry
        update = max(update, self.gradients)
        kept = self.weights + self.optimizer + self.initial
        return kept + max(update, self.rollout, self.scoring)

    def lines(self) -> list[str]:
        """Return a line for each part and for the peak, in GB (10^9 bytes)."""
        parts = {**vars(self), "peak": self.peak}
        del parts["accumulates"]
        return [f"{name:12} {size / 1e9:8.2f} GB" for name, size in parts.items()]


def estimate_memory(recipe: Recipe, config: Any) -> MemoryEstimate:
    """Return what a run of a recipe takes on its device with the local engine.

    Args:
        recipe: The recipe.
        config: The model's configuration, of transformers.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text, update = config.get_text_config(), recipe.update
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    computed = 2 if recipe.model.autocast else width
    numbers = sum(p.numel() for p in model.parameters())
    trained = _adapter_numbers(recipe, model) if recipe.model.lora else numbers
    adapters = trained if recipe.model.lora else 0
    longest = recipe.task.max_prompt_length + recipe.rollout.max_completion_length
    total = recipe.rollout.num_prompts * recipe.rollout.num_generations
    minibatch = total // update.num_minibatches
    rows = min(update.microbatch_size or minibatch, minibatch)
    if update.microbatch_tokens is not None:
        rows = min(minibatch, max(1, update.microbatch_tokens // longest))
    scored = min(rows, total)
    if update.microbatch_size is None and update.microbatch_tokens is None:
        scored = min(total, max(1, SCORED_TOKENS // longest))
    sampled = max(
        min(total, recipe.rollout.batch_size or total),
        min(recipe.evaluation.batch_size, recipe.task.num_validation),
    )
    whole = recipe.geometry.rule != "none"
    logit_bytes = 4 * text.vocab_size
    return MemoryEstimate(
        weights=(numbers + adapters) * width,
        gradients=trained * width,
        optimizer=trained * width * _states(recipe),
        initial=numbers * width if recipe.keeps_initial else 0,
        activations=rows * longest * activation_numbers(text) * computed,
        logits=_head_bytes(recipe, rows, longest if whole else None, logit_bytes, _LOGIT_COPIES),
        geometry=_geometry_bytes(recipe, model) if whole else 0,
        rollout=sampled * (longest * cache_numbers(text) * computed + 3 * logit_bytes),
        scoring=_head_bytes(recipe, scored, None, logit_bytes, 2 * _SCORING_COPIES)
        + scored * longest * 4 * (text.hidden_size + text.intermediate_size) * computed,
        accumulates=rows < minibatch,
    )


def config_of(recipe: Recipe) -> Any:
    """Return the configuration of a recipe's model; nothing else of it is fetched.

    Raises:
        ProxstepError: If it is not to be had.
    """
    from transformers import AutoConfig

    if recipe.model.name == "embedded":
        from proxstep.training.demo_model import build_embedded_model

        return build_embedded_model()[1].config
    try:
        return AutoConfig.from_pretrained(recipe.model.name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).partition("\n")[0]
        raise ProxstepError(f"no configuration of {recipe.model.name}: {first}") from None


def memory_note(recipe: Recipe) -> str:
    """Return the estimate as YAML comments, or why there is none."""
    try:
        lines = estimate_memory(recipe, config_of(recipe)).lines()
    except ProxstepError as error:
        return f"# memory: not estimated, {error}\n"
    head = "memory on the device, every sequence as long as it may be:"
    return "".join(f"# {line}\n" for line in [head, *lines])


def activation_numbers(text: Any) -> int:
    """Return what a forward keeps of one token, in numbers, for a Llama-like decoder.

    Of each layer: both norms' input, normalized input and output; queries, keys and values as
    attention takes them (the keys and values repeated for each head), and its output; gate, its
    activation, up and their product. Two more of each head's where queries and keys are normalized.
    """
    heads = text.num_attention_heads
    queries = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    normalized = 3 * queries if text.model_type.startswith(("qwen3", "gemma3")) else 0
    layer = 6 * text.hidden_size + 5 * queries + normalized + 4 * text.intermediate_size
    return text.num_hidden_layers * layer


def cache_numbers(text: Any) -> int:
    """Return the keys and values of one token, in numbers."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    return 2 * text.num_hidden_layers * kept * head


def _states(recipe: Recipe) -> int:
    if recipe.optimizer.name == "sgd":
        return int(bool(recipe.optimizer.momentum))
    return _OPTIMIZER_STATES[recipe.optimizer.name]


def _head_bytes(
    recipe: Recipe, rows: int, width: int | None, logit_bytes: int, copies: int
) -> float:
    """Return what the logits take: of the completions, or of `width` positions of each row."""
    if recipe.model.head == "chunked":
        return 3 * 2**26
    return rows * (width or recipe.rollout.max_completion_length) * logit_bytes * copies


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _geometry_bytes(recipe: Recipe, model: nn.Module) -> float:
    sides = sum(layer.in_features + layer.out_features for layer in _linears(model))
    return 4 * sides * (recipe.geometry.num_overlap_positions or 0) + (
        recipe.geometry.memory_mib * 2**20
    )


def _adapter_numbers(recipe: Recipe, model: nn.Module) -> int:
    """Return the adapters' numbers: of the chosen linear layers, or of all but the output's."""
    assert recipe.model.lora is not None
    chosen = recipe.model.lora.target_modules
    names = [chosen] if isinstance(chosen, str) else chosen
    sides = sum(
        layer.in_features + layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not model.get_output_embeddings()  # type: ignore[operator]
        and (chosen == "all-linear" or name.rpartition(".")[2] in names)
    )
    return recipe.model.lora.rank * sides

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
from proxstep.config.sections import EMBEDDED_MODELS
from proxstep.errors import ProxstepError
from proxstep.hub import hub_or_cache
from proxstep.isopo.plan import Shape, choose, held
from proxstep.isopo.settings import Settings
from proxstep.training.gguf import found_config, is_gguf
from proxstep.training.merging import base_of, has_adapters
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
        casts: The weights' copies in bfloat16 that autocast makes: of every linear layer, once in a
            forward, and kept until its backward.
        activations: What the widest microbatch's forward keeps for its backward.
        logits: Its logits, and what is made of them.
        geometry: The positions that ISOPO carries from step to step.
        workspace: What one layer's gradient takes beside: the head's, before it is added to others;
            under ISOPO the most of any layer's statistics.
        rollout: The KV cache, and the logits of a token.
        scoring: The logits and activations of the widest microbatch that is scored.
        accumulates: Whether there are gradients already while a microbatch is at its peak, its
            logits: where an optimizer step has several.
    """

    weights: float
    gradients: float
    optimizer: float
    initial: float
    casts: float
    activations: float
    logits: float
    geometry: float
    workspace: float
    rollout: float
    scoring: float
    accumulates: bool

    @property
    def peak(self) -> float:
        """The most at a time: the phases follow one another, gradients live in the update."""
        gradients = self.gradients if self.accumulates else 0
        head = max(self.logits, self.logits / 2 + self.workspace)  # then half of them are gone
        forward = max(gradients + self.activations + head, self.rollout, self.scoring) + self.casts
        kept = self.weights + self.optimizer + self.initial + self.geometry
        return kept + max(forward, self.gradients)

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
    shapes = _trained_shapes(recipe, model)
    adapters = sum(out * features for out, features in shapes) if recipe.model.lora else 0
    trained = adapters or numbers
    own = 4 if recipe.model.lora else width  # adapters are in float32
    longest = _longest_prompt(recipe) + recipe.rollout.max_completion_length
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
    carried, workspace = 0.0, 0.0
    if whole:
        carried, workspace = _geometry_bytes(recipe, shapes, rows, longest, computed)
    if not recipe.model.lora:
        table = 4 * text.vocab_size * text.hidden_size
        chunks = recipe.model.head == "chunked" and whole  # one sequence's beside the sum
        workspace = max(workspace, table * (1 + chunks))
    return MemoryEstimate(
        weights=numbers * width + adapters * own,
        gradients=trained * own,
        optimizer=trained * own * _states(recipe),
        initial=numbers * width if recipe.keeps_initial else 0,
        casts=2.0 * _linear_numbers(model) if recipe.model.autocast else 0.0,
        activations=rows * longest * activation_numbers(text) * computed,
        logits=_head_bytes(recipe, rows, longest if whole else None, logit_bytes, _LOGIT_COPIES),
        geometry=carried,
        workspace=workspace,
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

    name = recipe.model.name
    if name in EMBEDDED_MODELS:
        from proxstep.training.demo_model import build_embedded_model

        return build_embedded_model(task=recipe.task.name, name=name)[1].config
    if is_gguf(name):
        return found_config(name)
    if has_adapters(name):
        name = base_of(name)
    try:
        with hub_or_cache(name):
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
    raise ProxstepError(f"no configuration of {name}: {reason}")


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


def _longest_prompt(recipe: Recipe) -> int:
    task = recipe.task
    if recipe.model.name in EMBEDDED_MODELS and task.name == "arithmetic":  # a token a character
        return min(task.max_prompt_length, 2 * task.difficulty + 2)
    return task.max_prompt_length


def _states(recipe: Recipe) -> int:
    copies = 0 if recipe.update.kl_budget is None else 2  # before a step, and as it was proposed
    return copies + _optimizer_states(recipe)


def _optimizer_states(recipe: Recipe) -> int:
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


def _linear_numbers(model: nn.Module) -> int:
    """Return the weights of the linear layers; a tied output layer counts."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def _trained_shapes(recipe: Recipe, model: nn.Module) -> list[tuple[int, int]]:
    """Return output and input features of each linear layer that is trained; of the adapters."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    lora = recipe.model.lora
    if lora is None:
        return [(layer.out_features, layer.in_features) for _, layer in layers]
    chosen = lora.target_modules
    names = [chosen] if isinstance(chosen, str) else chosen
    adapted = [
        layer
        for name, layer in layers
        if layer is not model.get_output_embeddings()  # type: ignore[operator]
        and (chosen == "all-linear" or name.rpartition(".")[2] in names)
    ]
    downs = [(lora.rank, layer.in_features) for layer in adapted]
    return downs + [(layer.out_features, lora.rank) for layer in adapted]


def _geometry_bytes(
    recipe: Recipe, shapes: list[tuple[int, int]], rows: int, longest: int, itemsize: int
) -> tuple[float, float]:
    """Return what is carried from step to step, and the most that a layer's statistics take.

    Carried are the last step's sampled positions and this one's: an output gradient and an input
    each. A layer's statistics are what its plan holds, and Grams of the sample with all positions.
    """
    section = recipe.geometry
    needs = Settings(section.to_rule(), section.fisher).needs
    sampled = (section.num_overlap_positions or rows * longest) * needs.fisher
    carries = section.overlap_source in (None, "previous_step") and section.num_overlap_positions
    row_bytes = [itemsize * (out + features) for out, features in shapes]
    budget = section.memory_mib * 2**20
    most = 0.0
    for (out, features), row in zip(shapes, row_bytes, strict=True):
        shape = Shape(out, features, (longest,) * rows, sampled)
        plan = choose(shape, needs, separable=not needs.ntk, memory_budget=budget)
        grams = min(8 * sampled * rows * longest, budget) * plan.ghost_fisher
        own = 0 if carries else sampled * row
        most = max(most, held(shape, needs, plan) + grams + own)
    return (2.0 * sampled * sum(row_bytes) if carries else 0.0), most

"""Who samples the rollout, by `rollout.engine`: transformers on the policy itself, or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.training.generation import sample
from proxstep.training.rollout import Completions, autocast, joined
from proxstep.training.vllm_sampler import VllmSampler

Sampler = Callable[[Sequence[list[int]]], Completions]
"""Completes each prompt `rollout.num_generations` times, a prompt's completions in a row."""


def make_sampler(recipe: Recipe, model: nn.Module, tokenizer: Any) -> Sampler:
    """Return what samples a recipe's rollout from a model, as the model is at each call."""
    if recipe.rollout.engine == "vllm":
        return VllmSampler(recipe, model, tokenizer)
    return lambda prompts: _sample(recipe, model, tokenizer, prompts)


def _sample(
    recipe: Recipe, model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]]
) -> Completions:
    section = recipe.rollout
    repeated = [prompt for prompt in prompts for _ in range(section.num_generations)]
    size = section.batch_size or len(repeated)
    with autocast(recipe, model):
        parts = [
            sample(
                model,
                tokenizer,
                repeated[start : start + size],
                max_new_tokens=section.max_completion_length,
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
                with_log_probs=recipe.keeps_sampler,
                stop=section.stop or (),
            )
            for start in range(0, len(repeated), size)
        ]
    return joined(parts, tokenizer.pad_token_id)

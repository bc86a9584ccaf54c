"""Contexts that are longer than a model with learned positions can read."""

from __future__ import annotations

from typing import Any

from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.training.prompts import Prompts

_MOST_OFFSET = 2
"""Positions that a family's table has more than its configuration says: OPT's."""

_MADE = 1000
"""Problems of a procedural task that are made to find the longest."""


def check_positions(recipe: Recipe, model: Any, *prompts: Prompts) -> None:
    """Refuse prompts that leave no room for completions in a model with a table of positions.

    Rotary positions go on beyond the length that a model was trained at.

    Raises:
        ProxstepError: With both lengths, and how many positions there are.
    """
    limit, most = recipe.rollout.max_completion_length, num_learned_positions(model)
    if most is None or recipe.task.max_prompt_length + limit <= most:
        return
    longest = max(len(part.tokens(row)) for part in prompts for row in _rows(part))
    if longest + limit > most:
        raise ProxstepError(
            f"the longest prompt has {longest} tokens, and with rollout.max_completion_length "
            f"{limit} that is more than the {most} positions of model.name {recipe.model.name}: "
            "lower it, or leave out long prompts by task.max_prompt_length"
        )


def _rows(prompts: Prompts) -> range:
    """Return the rows to look at: of a procedural task's problems, which are made anew, some."""
    made = not isinstance(prompts.examples, list | tuple)
    return range(min(len(prompts), _MADE) if made else len(prompts))


def num_learned_positions(model: Any) -> int | None:
    """Return how many positions a model has learned one by one, None where it computes them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    words = model.get_input_embeddings()
    learned = any(0 <= m.num_embeddings - most <= _MOST_OFFSET for m in tables if m is not words)
    return most if learned else None

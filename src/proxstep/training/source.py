"""Where a recipe's model is loaded from; one that must be made first is made."""

from __future__ import annotations

import os
from collections.abc import Callable

from proxstep.config.recipe import Recipe
from proxstep.training.demo_model import SIZES, ensure_embedded_model
from proxstep.training.gguf import ensure_converted, is_gguf
from proxstep.training.merging import ensure_merged, has_adapters
from proxstep.training.warmup import ensure_warmed_up


def model_source(recipe: Recipe, note: Callable[[str], None]) -> str:
    """Return the hub name or path to load from; convert, merge or warm up the model if need be.

    `note` is called with how far that is: minutes for an embedded model's warm-up, half a
    minute for a GGUF file of 100 MB, minutes for a warm-up on solutions.
    """
    if recipe.model.name not in SIZES:
        source = os.path.expanduser(recipe.model.name)  # keeps a leading ./
        if is_gguf(recipe.model.name):
            source = str(ensure_converted(recipe.model.name, note))
        elif has_adapters(recipe.model.name):
            source = str(ensure_merged(recipe.model.name, note))
        if recipe.model.warmup_solutions is None:
            return source
        return str(ensure_warmed_up(source, recipe, note))
    task, model = recipe.task, recipe.model
    folder = ensure_embedded_model(
        task.difficulty, model.warmup_score, note, task=task.name, name=model.name
    )
    return str(folder)

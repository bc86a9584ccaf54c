"""From a recipe to a finished run: checks, data, tokenizer, and only then a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.checkpoint import latest_checkpoint, load_state
from proxstep.config import Recipe
from proxstep.data import Prompts, load_prompts
from proxstep.errors import ProxstepError
from proxstep.evaluation import GreedyResult, greedy_score
from proxstep.models import (
    load_model,
    load_tokenizer,
    model_source,
    pick_device,
    quiet_transformers,
)
from proxstep.recipes import load_recipe
from proxstep.runfolder import RunFolder
from proxstep.tasks import Task, arithmetic_task, gsm8k_task, svamp_task, table_task
from proxstep.tracking import check_tracker
from proxstep.trainer import Progress, Trainer


def train(recipe: Recipe, progress: Progress, *, overwrite: bool = False) -> str:
    """Run a recipe from its beginning.

    Args:
        recipe: What to do.
        progress: Who watches.
        overwrite: Delete the run that the output folder holds.

    Returns:
        "finished" or "interrupted".

    Raises:
        ProxstepError: If anything in the recipe, the data or the model is wrong.
    """
    folder = RunFolder(recipe.output_dir)
    if not overwrite:
        folder.check_free()
    tokenizer, source, prompts = _prepare(recipe)
    device = pick_device(recipe.device)
    model = load_model(source, recipe.model.dtype, device, recipe.model.lora)
    folder.clear()
    folder.create(recipe, device, sum(p.numel() for p in model.parameters()))
    return Trainer(recipe, model, tokenizer, *prompts, folder, progress).run()


def resume(path: str | Path, progress: Progress) -> str:
    """Continue a run from its newest checkpoint, to the bit as if it had not stopped.

    Raises:
        ProxstepError: If the folder holds no run with a checkpoint, or its run is finished.
    """
    folder = RunFolder(path)
    recipe = load_run_recipe(path)
    checkpoint = latest_checkpoint(folder.path)
    state = load_state(checkpoint)
    if state["step"] >= recipe.steps:
        raise ProxstepError(
            f"{path}: the run is finished, at step {state['step']} of {recipe.steps}"
        )
    tokenizer, source, prompts = _prepare(recipe)
    device = pick_device(recipe.device)
    initial = None
    if recipe.model.lora is not None:
        model = _load_adapters(source, checkpoint, recipe, device)
    else:
        model = load_model(str(checkpoint), recipe.model.dtype, device)
        if recipe.evaluation.kl_policy_initial:
            initial = load_model(source, recipe.model.dtype, device).eval().requires_grad_(False)
    trainer = Trainer(recipe, model, tokenizer, *prompts, folder, progress, initial)
    trainer.restore(state)
    return trainer.run()


def evaluate(recipe: Recipe, checkpoint: Path | None) -> tuple[GreedyResult, Prompts]:
    """Score a recipe's model, or a checkpoint of its run, greedily on the validation prompts.

    Raises:
        ProxstepError: If anything in the recipe, the data or the model is wrong.
    """
    tokenizer, source, (_, validation) = _prepare(recipe)
    device = pick_device(recipe.device)
    if checkpoint is None:
        model = load_model(source, recipe.model.dtype, device)
    elif recipe.model.lora is not None:
        model = _load_adapters(source, checkpoint, recipe, device)
    else:
        model = load_model(str(checkpoint), recipe.model.dtype, device)
    result = greedy_score(
        model,
        tokenizer,
        validation,
        max_new_tokens=recipe.rollout.max_completion_length,
        batch_size=recipe.evaluation.batch_size,
    )
    return result, validation


def load_run_recipe(path: str | Path) -> Recipe:
    """Return the resolved recipe of a run folder.

    Raises:
        ProxstepError: If the folder holds no run.
    """
    file = Path(path) / "recipe.yaml"
    if not file.is_file():
        raise ProxstepError(f"{path}: not a run folder, it has no recipe.yaml")
    recipe = load_recipe(file)
    return recipe.model_copy(update={"output_dir": str(path)})


def load_task(recipe: Recipe, *, chat: bool) -> Task:
    """Return the recipe's task.

    Args:
        recipe: The recipe.
        chat: Whether the tokenizer has a chat template, for the tasks that can do either.

    Raises:
        ProxstepError: If the data is missing, empty or malformed.
    """
    section = recipe.task
    if section.prompt_format != "auto":
        chat = section.prompt_format == "chat"
    options: dict[str, Any] = {
        "train": section.train,
        "validation": section.validation,
        "num_train": section.num_train,
        "num_validation": section.num_validation,
    }
    if section.name == "arithmetic":
        return arithmetic_task(section.difficulty, section.num_validation)
    if section.name == "table":
        return table_task(
            **options,
            prompt_column=section.prompt_column,
            answer_column=section.answer_column,
            config=section.config,
            train_split=section.train_split,
            validation_split=section.validation_split,
            rewards=tuple(section.rewards or ["numeric_answer"]),
        )
    return {"gsm8k": gsm8k_task, "svamp": svamp_task}[section.name](**options, chat=chat)


def _prepare(recipe: Recipe) -> tuple[Any, str, tuple[Prompts, Prompts]]:
    """Return the tokenizer, the model's source and the prompts, all checked."""
    quiet_transformers()
    pick_device(recipe.device)
    check_tracker(recipe.logging.tracker)
    load_task(
        recipe, chat=False
    )  # the data's own mistakes first: nothing else needs to be there for them
    source = model_source(recipe)
    tokenizer = load_tokenizer(source)
    task = load_task(recipe, chat=tokenizer.chat_template is not None)
    return tokenizer, source, load_prompts(recipe, tokenizer, task)


def _load_adapters(
    source: str, checkpoint: Path, recipe: Recipe, device: torch.device
) -> nn.Module:
    from peft import PeftModel

    base: Any = load_model(source, recipe.model.dtype, device)
    return PeftModel.from_pretrained(base, str(checkpoint), is_trainable=True)

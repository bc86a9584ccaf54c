"""From a recipe to a finished run: checks, data, tokenizer, and only then a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.config.loading import load_recipe
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.rewards import Baselines
from proxstep.rewards.baselines import NUM_PASSES
from proxstep.runs.checkpoint import latest_checkpoint, load_state
from proxstep.runs.folder import RunFolder
from proxstep.runs.telemetry import switch_off_telemetry
from proxstep.runs.tracking import Progress, check_tracker
from proxstep.training.evaluation import GreedyResult, greedy_score, sampled
from proxstep.training.models import (
    load_adapters,
    load_model,
    load_tokenizer,
    pick_device,
    quiet_transformers,
)
from proxstep.training.optimizers import check_optimizer
from proxstep.training.positions import check_positions
from proxstep.training.precision import with_autocast
from proxstep.training.prompts import Prompts, load_prompts, load_rewards
from proxstep.training.rollout import autocast
from proxstep.training.saving import is_stale
from proxstep.training.source import model_source
from proxstep.training.task import load_task
from proxstep.training.trainer import Trainer
from proxstep.training.vllm_sampler import check_vllm


def train(recipe: Recipe, progress: Progress, *, overwrite: bool = False) -> str:
    """Run a recipe from its beginning.

    Args:
        recipe: What to do.
        progress: Shows the run.
        overwrite: Delete the run that the output folder holds, once the new one can begin.

    Returns:
        "finished", "interrupted" or "stopped" by the guard.

    Raises:
        ProxstepError: If anything in the recipe, the data or the model is wrong.
    """
    check_vllm(recipe)
    folder = RunFolder(recipe.output_dir)
    with folder.claimed(overwrite=overwrite):
        with progress.wait("reading the data"):
            check(recipe)
        source = prepared_source(recipe, progress)
        tokenizer, prompts = _tokenized(recipe, source, progress)
        device = pick_device(recipe.device)
        torch.manual_seed(recipe.seed)  # adapters are drawn at random
        with progress.wait(f"loading {source}"):
            model = load_model(source, recipe.model.dtype, device, recipe.model.lora)
        check_positions(recipe, model, *prompts)
        recipe = with_autocast(recipe, model, progress.note)
        folder.check_room(model)
        trainer = Trainer(recipe, model, tokenizer, *prompts, folder, progress)
        folder.create(recipe, device, sum(p.numel() for p in model.parameters()))
        keep_baselines(recipe, prompts[1], folder, progress)
        return trainer.run()


def resume(path: str | Path, progress: Progress) -> str:
    """Continue a run from its newest checkpoint, to the bit as if it had not stopped.

    Raises:
        ProxstepError: If the folder holds no run with a checkpoint, or its run is finished.
    """
    folder = RunFolder(path)
    recipe = load_run_recipe(path)
    check_vllm(recipe)
    with folder.locked():
        checkpoint = latest_checkpoint(folder.path, progress.note)
        state = load_state(checkpoint)
        if folder.status() == "stopped" and recipe.guard in ("halve", "stop"):
            raise ProxstepError(
                f"{path}: the guard stopped the run ({folder.info()['guard']['verdict']}): begin a "
                f"new one with --model.name {checkpoint}, or set guard to warn in its recipe.yaml "
                "to go on as it was"
            )
        waiting = state["unrecorded"] is not None
        ended = state["step"] >= recipe.steps or is_stale(recipe, state["best"])
        if ended and not waiting:
            if folder.status() in ("killed", "failed"):  # after its last checkpoint
                folder.conclude("finished")
                return "finished"
            if state["step"] < recipe.steps:
                raise ProxstepError(
                    f"{path}: evaluation.patience {recipe.evaluation.patience} ended the run "
                    f"early, at step {state['step']} of {recipe.steps}: set it higher, or to null, "
                    "in its recipe.yaml"
                )
            raise ProxstepError(
                f"{path}: the run is finished, at step {state['step']} of {recipe.steps}; a larger "
                "--steps extends it"
            )
        note_changes(state["recipe"], recipe, progress)
        folder.check_logs(state["step"] - waiting, state["logs"], progress.note)
        check(recipe)
        tokenizer, prompts = _tokenized(recipe, str(checkpoint), progress)
        device = pick_device(recipe.device)
        model, initial = _load_checkpoint(recipe, checkpoint, device, progress), None
        check_positions(recipe, model, *prompts)
        if recipe.keeps_initial:
            source = prepared_source(recipe, progress)
            with progress.wait(f"loading the initial policy, {source}"):
                initial = load_model(source, recipe.model.dtype, device)
            initial = initial.eval().requires_grad_(False)
        trainer = Trainer(recipe, model, tokenizer, *prompts, folder, progress, initial)
        trainer.restore(state)
        return trainer.run()


def note_changes(before: Mapping[str, Any], recipe: Recipe, progress: Progress) -> None:
    """Say which keys of a run's recipe are not what they were at its checkpoint."""
    if changed := _changed_keys(before, recipe.model_dump()):
        progress.note(f"recipe.yaml is not what the run wrote: {'; '.join(changed)}")


def _changed_keys(before: Any, now: Any, key: str = "") -> list[str]:
    """Return what was changed of a recipe, the folder it lies in aside."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [name for name in {**before, **now} if name != "output_dir"]
        below = (_changed_keys(before.get(k), now.get(k), f"{key}.{k}") for k in keys)
        return [text for texts in below for text in texts]
    return [] if before == now else [f"{key[1:]} {before} is now {now}"]


def evaluate(
    recipe: Recipe, checkpoint: Path | None, progress: Progress
) -> tuple[GreedyResult, dict[str, float], Prompts]:
    """Score a recipe's model, or a checkpoint of its run, greedily on the validation prompts.

    Returns:
        The greedy completions, avg@n and pass@k where the recipe asks for samples, the prompts.

    Raises:
        ProxstepError: If anything in the recipe, the data or the model is wrong.
    """
    with progress.wait("reading the data"):
        check(recipe)
    device = pick_device(recipe.device)
    source = str(checkpoint) if checkpoint else prepared_source(recipe, progress)
    tokenizer, (_, validation) = _tokenized(recipe, source, progress)
    if checkpoint:
        model = _load_checkpoint(recipe, checkpoint, device, progress)
    else:
        with progress.wait(f"loading {source}"):
            model = load_model(source, recipe.model.dtype, device)
    check_positions(recipe, model, validation)
    recipe = with_autocast(recipe, model, progress.note)
    with autocast(recipe, model):
        result = greedy_score(
            model,
            tokenizer,
            validation,
            max_new_tokens=recipe.rollout.max_completion_length,
            batch_size=recipe.evaluation.batch_size,
            stop=recipe.rollout.stop or (),
            waits=progress,
        )
        scores = sampled(recipe, model, tokenizer, validation, progress)
    return result, scores, validation


def keep_baselines(
    recipe: Recipe, validation: Prompts, folder: RunFolder, progress: Progress
) -> None:
    """Write into run.json what needs no skill, where a recipe asks for it."""
    if (found := baselines_of(recipe, validation, progress)) is not None:
        folder.update_info(baselines=found.to_dict())


def baselines_of(recipe: Recipe, validation: Prompts, progress: Progress) -> Baselines | None:
    """Return what needs no skill, None where a recipe does not ask for it."""
    if not recipe.evaluation.baselines:
        return None
    with progress.wait("baselines", NUM_PASSES, "passes, at most") as wait:
        passes = itertools.count(1)
        return validation.baselines(lambda: wait.advance(next(passes)))


def prepared_source(recipe: Recipe, progress: Progress) -> str:
    """Return where to load the model from; what must be made first is made."""
    with progress.wait("preparing the model") as wait:
        return model_source(recipe, wait.say)


def check(recipe: Recipe) -> None:
    """Find what is wrong with a recipe that no model is needed for.

    Raises:
        ProxstepError: If the device, the tracker, the optimizer, the data or the rewards are not
            as they must be.
    """
    switch_off_telemetry()
    quiet_transformers()
    pick_device(recipe.device)
    check_tracker(recipe.logging.tracker)
    check_optimizer(recipe.optimizer.name)
    load_rewards(recipe, load_task(recipe, chat=recipe.task.system_prompt is not None))


def load_run_recipe(path: str | Path) -> Recipe:
    """Return the resolved recipe of a run folder.

    Raises:
        ProxstepError: If the folder holds no run.
    """
    file = Path(path) / "recipe.yaml"
    if not file.is_file():
        raise ProxstepError(f"{path}: not a run folder, it has no recipe.yaml")
    return load_recipe(file).model_copy(update={"output_dir": str(path)})


def _tokenized(
    recipe: Recipe, source: str, progress: Progress
) -> tuple[Any, tuple[Prompts, Prompts]]:
    with progress.wait("tokenizing the prompts"):
        tokenizer = load_tokenizer(source)
        task = load_task(recipe, chat=tokenizer.chat_template is not None)
        return tokenizer, load_prompts(recipe, tokenizer, task, progress.note)


def _load_checkpoint(
    recipe: Recipe, checkpoint: Path, device: torch.device, progress: Progress
) -> nn.Module:
    with progress.wait(f"loading {checkpoint}"):
        if recipe.model.lora is None:
            return load_model(str(checkpoint), recipe.model.dtype, device)
        base = load_model(prepared_source(recipe, progress), recipe.model.dtype, device)
        return load_adapters(base, checkpoint)

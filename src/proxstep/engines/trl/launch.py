"""A recipe run by TRL: `proxstep train --engine trl`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import PrinterCallback, set_seed

from proxstep.budget import KlBudget
from proxstep.config.recipe import Recipe
from proxstep.engines.trl.expressions import make
from proxstep.engines.trl.record import CHECKPOINTS, RunRecorder
from proxstep.engines.trl.rows import rows
from proxstep.engines.trl.script import script
from proxstep.engines.trl.translation import Translation, translate
from proxstep.errors import ProxstepError
from proxstep.rewards import RewardFunction, reward_name
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.runs.folder import RunFolder
from proxstep.runs.stop import stop_on_signal
from proxstep.runs.tracking import MetricsLog, Progress, Tracker
from proxstep.runs.waiting import UNSEEN
from proxstep.tasks import Task
from proxstep.training import lifecycle
from proxstep.training.guarded import guarded
from proxstep.training.models import load_model, load_tokenizer
from proxstep.training.optimizers import recipe_kept, set_peaks
from proxstep.training.positions import check_positions
from proxstep.training.prompts import Prompts, appends_end, load_prompts

ADDED = ("completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL hands to reward functions besides the prompts, the completions and the columns."""


def command(recipe: Recipe) -> str:
    """Return the script that trains as `train` does.

    Raises:
        ProxstepError: If TRL cannot do what the recipe says.
    """
    return script(recipe)


def train(recipe: Recipe, progress: Progress, *, overwrite: bool = False) -> str:
    """Run a recipe from its beginning; under torchrun, on all of its ranks.

    Args:
        recipe: What to do.
        progress: Where it reports.
        overwrite: Delete the run that the output folder holds, once the new one can begin.

    Returns:
        "finished" or "interrupted".

    Raises:
        ProxstepError: If anything in the recipe, the data or the model is wrong, or TRL cannot do
            it.
    """
    folder = RunFolder(recipe.output_dir)
    with folder.claimed(overwrite=overwrite) if _is_first() else nullcontext():
        prepared = _prepare(recipe, progress)
        with ExitStack() as on_failure:
            on_failure.callback(_remove_if_empty, folder.path)
            trainer = _make_trainer(recipe, prepared)
            on_failure.pop_all()
        if _is_first():
            device = trainer.accelerator.device
            folder.create(recipe, device, sum(p.numel() for p in trainer.model.parameters()))
            folder.update_info(engine="trl", trl_version=trl.__version__)
            lifecycle.keep_baselines(recipe, prepared.validation, folder, progress)
        trainer.accelerator.wait_for_everyone()
        return _run(recipe, prepared, trainer, folder, progress, None)


def resume(path: str | Path, progress: Progress) -> str:
    """Continue a run from its newest checkpoint.

    Raises:
        ProxstepError: If the folder holds no run with a checkpoint, or its run is finished.
    """
    folder = RunFolder(path)
    recipe = lifecycle.load_run_recipe(path)
    with folder.locked() if _is_first() else nullcontext():
        checkpoint = latest_checkpoint(folder.path, progress.note)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        step = state["global_step"] // recipe.update.num_updates
        if step >= recipe.steps:
            raise ProxstepError(f"{path}: the run is finished, at step {step} of {recipe.steps}")
        prepared = _prepare(recipe, progress)
        trainer = _make_trainer(recipe, prepared)
        if _is_first():
            folder.drop_later_steps(step)
        return _run(recipe, prepared, trainer, folder, progress, checkpoint)


@dataclass(frozen=True)
class _Prepared:
    """What a run needs and no model is needed for."""

    translation: Translation
    source: str
    tokenizer: Any
    task: Task
    train: Prompts
    validation: Prompts


def _prepare(recipe: Recipe, progress: Progress) -> _Prepared:
    """Check the recipe, and load tokenizer and data."""
    translate(recipe, chat=False)  # refuses before anything is loaded
    lifecycle.check(recipe)
    source = lifecycle.prepared_source(recipe, progress)
    tokenizer = load_tokenizer(source)
    chat = tokenizer.chat_template is not None
    task = lifecycle.load_task(recipe, chat=chat)
    train, validation = load_prompts(recipe, tokenizer, task, progress.note)
    task = replace(task, train=train.examples)
    if isinstance(task.train[0].prompt, str) and appends_end(tokenizer):
        raise ProxstepError(
            f"model.name {source}: its tokenizer ends every prompt with {tokenizer.eos_token}, and "
            "TRL would sample what comes after the end: save it without (add_eos_token False), "
            "use task.prompt_format chat, or --engine local, which leaves it out"
        )
    if len(task.train) < recipe.rollout.num_prompts:
        raise ProxstepError(
            f"rollout.num_prompts {recipe.rollout.num_prompts} is more than the {len(task.train)} "
            "training prompts, of which TRL would then take none: lower it"
        )
    made = translate(recipe, chat=chat)
    prepared = _Prepared(made, source, tokenizer, task, train, validation)
    _check_rewards(make(prepared.translation.rewards, 1))
    return prepared


def _check_rewards(functions: Sequence[RewardFunction]) -> None:
    """Refuse a reward function that cannot take what TRL hands to it."""
    for function in functions:
        parameters = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        missing = [name for name in ADDED if name not in parameters]
        if missing and not takes_all:
            raise ProxstepError(
                f"task.rewards: TRL also hands {', '.join(missing)} to {reward_name(function)}, "
                "which does not take them: add **columns to its arguments"
            )


def _make_trainer(recipe: Recipe, prepared: _Prepared) -> Any:
    """Return TRL's trainer, which writes below the run folder and reports to nobody."""
    made, world_size = prepared.translation, int(os.environ.get("WORLD_SIZE", "1"))
    set_seed(recipe.seed)
    options = {name: make(value, world_size) for name, value in made.args.keywords.items()}
    options |= {
        "output_dir": str(Path(recipe.output_dir) / CHECKPOINTS),
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = make(made.trainer, world_size)(
        model=prepared.source,
        reward_funcs=[
            guarded(function, recipe.task.reward_seconds)
            for function in make(made.rewards, world_size)
        ],
        args=make(made.args.function, world_size)(**options),
        train_dataset=Dataset.from_list(rows(prepared.task.train)),
        peft_config=make(made.lora, world_size),
    )
    trainer.remove_callback(PrinterCallback)
    check_positions(recipe, trainer.model, prepared.train, prepared.validation)
    return trainer


def _run(
    recipe: Recipe,
    prepared: _Prepared,
    trainer: Any,
    folder: RunFolder,
    progress: Progress,
    checkpoint: Path | None,
) -> str:
    """Train to the end or until somebody interrupts; return which of the two."""
    initial = None
    if recipe.keeps_initial and recipe.evaluation.kl_policy_initial:
        device = trainer.accelerator.device
        initial = load_model(prepared.source, recipe.model.dtype, device)
        initial = initial.eval().requires_grad_(False)
    progress = progress if _is_first() else _NoProgress()
    progress.begin(recipe)
    section, status = recipe.logging, "failed"
    with ExitStack() as stack:
        tracker = Tracker("none", section.project, folder.path, {})
        log = None
        if _is_first():
            folder.update_info(status="running")
            stack.callback(lambda: folder.conclude(status))
            log = MetricsLog(folder.metrics)
            stack.callback(log.close)
            name, settings = section.tracker, recipe.model_dump()
            tracker = stack.enter_context(Tracker(name, section.project, folder.path, settings))
        stop = stack.enter_context(stop_on_signal())
        recorder = RunRecorder(
            *(recipe, trainer, prepared.tokenizer, prepared.validation, initial),
            *(folder, progress, stop, log, tracker),
        )
        if checkpoint is not None:
            recorder.restore(checkpoint)
            _resume_with_recipe(trainer)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finished = trainer.state.global_step >= trainer.state.max_steps
        status = "finished" if finished else "interrupted"
    # A process that ends in its group can abort with all work done (pytorch/pytorch#190489).
    trainer.accelerator.end_training()
    return status


def _resume_with_recipe(trainer: Any) -> None:
    """Let the optimizer that a run resumes with have the recipe's hyper-parameters and schedule.

    transformers takes those of the checkpoint.
    """
    load = trainer._load_optimizer_and_scheduler

    def load_states(checkpoint: str | None) -> None:
        optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
        schedule = getattr(schedule, "scheduler", schedule)  # accelerate's hides it
        peaks = list(schedule.base_lrs)
        with recipe_kept(optimizer):
            load(checkpoint)
        set_peaks(optimizer, schedule, peaks)
        budget = getattr(optimizer, "optimizer", optimizer)
        if isinstance(budget, KlBudget):
            budget.rescale(budget.nats)

    trainer._load_optimizer_and_scheduler = load_states


class _NoProgress:
    """The progress on ranks after the first, which report nothing."""

    def begin(self, recipe: Recipe) -> None:
        """Report nothing."""

    def note(self, text: str) -> None:
        """Report nothing."""

    wait = UNSEEN.wait

    def record(self, record: Any) -> None:
        """Report nothing."""


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _remove_if_empty(path: Path) -> None:
    """Remove what TRL made before it failed."""
    for folder in (path / CHECKPOINTS, path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

"""What of a run is saved, when, and how it goes on from there."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from proxstep.config.loading import with_absolute_paths
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo
from proxstep.runs.checkpoint import checkpoints, save_checkpoint
from proxstep.runs.folder import RunFolder
from proxstep.runs.tracking import Progress
from proxstep.training.evaluation import Probe
from proxstep.training.optimizers import recipe_kept, set_peaks

_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EIO, errno.ENOENT),
)


def is_stale(recipe: Recipe, best: Mapping[str, Any] | None) -> bool:
    """Whether a run stops early, its best score being `best`, as `Resumable` keeps it."""
    patience = recipe.evaluation.patience
    return patience is not None and best is not None and best["ago"] >= patience


class Resumable:
    """A run that can be stopped between any two steps and go on to the bit.

    Attributes:
        step: Rollout steps done.
        num_updates: Optimizer steps done.
        num_prompts: Prompts drawn for training in them.
        num_sequences: Completions sampled for training in them.
        unrecorded: What the last step measured, while it is not in metrics.jsonl yet. Step 0 is the
            evaluation before any training.
        best: The validation's best score, its step, and how many evaluations ago that was; None
            before the first score that is finite.
        good: The step of the checkpoint that the guard would go back to, if any.
        returns: Where the guard went back: after step "from" to the policy of step "to".
        torn: Whether parameters or optimizer are in the middle of a step, which nothing can
            continue.
    """

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    folder: RunFolder
    progress: Progress
    device: torch.device
    isopo: Isopo | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    probe: Probe | None

    def __init__(self) -> None:
        self.step, self.num_updates, self.num_prompts, self.num_sequences = 0, 0, 0, 0
        self.unrecorded: dict[str, Any] | None = {"step": 0}
        self.best: dict[str, Any] | None = None
        self.good: int | None = None
        self.returns: list[dict[str, int]] = []
        self.torn = False
        self._saved_step, self._saved_time = -1, time.monotonic()
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Return the seconds of the run, those of its earlier parts included."""
        return time.perf_counter() - self._started

    @property
    def stopped_early(self) -> bool:
        """Whether the validation's score has not risen for as long as the recipe waits."""
        return is_stale(self.recipe, self.best)

    @property
    def at_best(self) -> bool:
        """Whether the recipe keeps the best policy, and this step's is the best so far."""
        best = self.best if self.recipe.evaluation.patience else None
        return best is not None and best["step"] == self.step

    @property
    def besides(self) -> list[int]:
        """The steps whose checkpoints stay beside the newest: the best and the last good one."""
        best = [self.best["step"]] if self.recipe.evaluation.patience and self.best else []
        return [*best, *([] if self.good is None else [self.good])]

    def judge(self, score: float) -> None:
        """Compare an evaluation's score, which is recorded by now, with the best one."""
        if math.isfinite(score) and (self.best is None or score > self.best["score"]):
            self.best = {"score": score, "step": self.step, "ago": 0}
        elif self.best is not None:
            self.best = {**self.best, "ago": self.best["ago"] + 1}

    def tell_best(self) -> None:
        """Record the best evaluation, and say so if the run ended for want of a better one."""
        if self.best is None or self.recipe.evaluation.patience is None:
            return
        step, score = self.best["step"], self.best["score"]
        early = self.stopped_early and self.step < self.recipe.steps
        self.folder.update_info(best_step=step, best_score=score, stopped_early=early)
        if early:
            self.progress.note(
                f"stopped early at step {self.step}: {self.best['ago']} evaluations without a "
                f"better score than {score:.3f} at step {step} (evaluation.patience)"
            )

    def save_if_due(self) -> None:
        """Save the run if the recipe wants it: by steps, by time, or the best one."""
        section = self.recipe.logging
        if self.at_best:
            self.save()
        if self.step == 0:
            return
        by_steps = section.checkpoint_every and self.step % section.checkpoint_every == 0
        seconds = time.monotonic() - self._saved_time
        if by_steps or (section.checkpoint_minutes and seconds >= 60 * section.checkpoint_minutes):
            self.save()

    def save(self) -> None:
        """Save the run, if the last step did not already.

        Raises:
            ProxstepError: If it cannot be written.
        """
        if self.step == self._saved_step:
            return
        kept = self.recipe.logging.checkpoints_kept
        path = self.folder.path
        try:
            if self.unrecorded is not None:
                self.folder.drop_later_steps(self.step - 1)
            saved = (path, self.step, self.model, self.tokenizer, self._state())
            save_checkpoint(*saved, kept, self.besides)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own
            raise ProxstepError(
                f"step {self.step}: the checkpoint cannot be written below {path} ({error}): make "
                f"room, then {self._way_on()}"
            ) from error
        self._saved_step, self._saved_time = self.step, time.monotonic()

    def rescue(self) -> bool:
        """After a failure, save the last whole step, and return whether it is saved."""
        if self.torn or (self.step == 0 and self.unrecorded is not None):
            return False
        try:
            self.save()
        except ProxstepError:  # the disk is full, say, which may be the failure itself
            return False
        return True

    def explained(self, error: BaseException) -> ProxstepError | None:
        """Return a failure in plain words with its step, if it is a mistake or the disk's."""
        step = f"step {self.step + (self.unrecorded is None)}"
        if isinstance(error, ProxstepError) and not str(error).startswith("step "):
            return ProxstepError(f"{step}: {error}")
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            path = self.folder.path
            return ProxstepError(
                f"{step}: {error.filename or path} cannot be written ({error.strerror}): make "
                f"room or mend the folder, then {self._way_on()}"
            )
        return None

    def _way_on(self) -> str:
        """Return how a run goes on that could not write something."""
        path = self.folder.path
        if checkpoints(path):
            return f"go on from the last checkpoint: proxstep train --resume {path}"
        return "begin again with --overwrite: there is no checkpoint yet"

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_updates": self.num_updates,
            "num_prompts": self.num_prompts,
            "num_sequences": self.num_sequences,
            "elapsed_seconds": self.elapsed(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "isopo": self.isopo.state_dict() if self.isopo else None,
            "probe": self.probe.state_dict() if self.probe else None,
            "recipe": with_absolute_paths(self.recipe).model_dump(),
            "trained": self._trained(),
            "unrecorded": self.unrecorded,
            "best": self.best,
            "guard": {"good": self.good, "returns": self.returns},
            "logs": self.folder.log_sums(),
        }

    def _trained(self) -> dict[str, Any]:
        """Return whose the optimizer's state is."""
        named = self.model.named_parameters()
        shapes = {name: list(p.shape) for name, p in named if p.requires_grad}
        return {"optimizer": self.recipe.optimizer.name, "parameters": shapes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state; the model was loaded from the same one.

        Hyper-parameters and the schedule are those of the recipe, which may have changed.

        Raises:
            ProxstepError: If the state is another model's or optimizer's.
        """
        foreign = ProxstepError(
            f"{self.folder.path}: the checkpoint's optimizer state is of another model or "
            "optimizer than recipe.yaml names: restore recipe.yaml as the run wrote it"
        )
        if state["trained"] != self._trained():
            raise foreign
        try:
            returns = list(state["guard"]["returns"])
            peaks = [rate / 2 ** len(returns) for rate in self.schedule.base_lrs]
            with recipe_kept(self.optimizer):
                self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            set_peaks(self.optimizer, self.schedule, peaks)
            if self.isopo is not None:
                self.isopo.load_state_dict(state["isopo"])
            if state["probe"] is not None:
                self.probe = Probe.from_state_dict(state["probe"], self.device)
        except (ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
            raise foreign from error
        self.step, self.num_updates = state["step"], state["num_updates"]
        self.num_prompts = state["num_prompts"]
        self.num_sequences, self.unrecorded = state["num_sequences"], state["unrecorded"]
        self.best = state["best"]
        self.good, self.returns = state["guard"]["good"], returns
        self._started = time.perf_counter() - state["elapsed_seconds"]
        self._saved_step = self.step

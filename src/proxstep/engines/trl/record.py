"""The run folder of a TRL run: metrics, samples and checkpoints as the local engine writes them."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from proxstep.config.loading import with_absolute_paths
from proxstep.config.recipe import Recipe
from proxstep.engines.trl.logs import record_of
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import publish
from proxstep.runs.folder import RunFolder
from proxstep.runs.stop import StopRequest
from proxstep.runs.tracking import MetricsLog, Progress, Tracker
from proxstep.training.clock import Clock
from proxstep.training.evaluation import Probe, evaluate
from proxstep.training.lifecycle import note_changes
from proxstep.training.objective import Objective
from proxstep.training.prompts import Prompts
from proxstep.training.rollout import autocast

STATE_FILE = "proxstep_run.pt"
CHECKPOINTS = "checkpoints"
"""Where TRL writes, in the run folder."""


class RunRecorder(TrainerCallback):
    """Writes a run's records, evaluates it, stops it on request and names its checkpoints.

    Every rank evaluates, so that none waits for another; the first one alone writes.

    Args:
        recipe: The recipe.
        trainer: TRL's trainer, to which the callback is then added.
        tokenizer: The policy's.
        validation: Validation prompts.
        initial: The initial policy, where its drift is measured.
        folder: The run folder.
        progress: Where it reports.
        stop: Whether somebody asked the run to stop.
        log: The run's metrics; None on the ranks that write nothing.
        tracker: Their second destination.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer: Any,
        tokenizer: Any,
        validation: Prompts,
        initial: nn.Module | None,
        folder: RunFolder,
        progress: Progress,
        stop: StopRequest,
        log: MetricsLog | None,
        tracker: Tracker,
    ) -> None:
        self._recipe, self._trainer, self._tokenizer = recipe, trainer, tokenizer
        self._validation, self._initial, self._folder = validation, initial, folder
        self._progress, self._stop, self._log, self._tracker = progress, stop, log, tracker
        self._num_updates, self._algorithm = recipe.update.num_updates, Objective(recipe)
        self._clock, self._recorded = Clock(trainer.accelerator.device), 0.0
        self._logs: list[Mapping[str, Any]] = []
        self._probe: Probe | None = None
        self._saved, self._started = time.monotonic(), time.perf_counter()

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint's probe and time, and say what of the recipe has changed."""
        path = checkpoint / STATE_FILE
        if not path.exists():
            raise ProxstepError(f"{path} is missing, so the run cannot be continued")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._probe = Probe.from_state_dict(state["probe"], self._trainer.accelerator.device)
        self._started = time.perf_counter() - state["elapsed_seconds"]
        self._recorded = state["elapsed_seconds"]
        if "recipe" in state:  # those of earlier releases have none
            note_changes(state["recipe"], self._recipe, self._progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the initial policy."""
        if self._probe is None:
            self._write(0, self._evaluate(0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop or save between two rollouts, where a run can be continued exactly."""
        if state.global_step % self._num_updates:
            return
        minutes = self._recipe.logging.checkpoint_minutes or math.inf
        due = time.monotonic() - self._saved >= 60 * minutes
        asked = torch.tensor([[self._stop.made, due]], device=self._trainer.accelerator.device)
        stop, save = self._trainer.accelerator.gather(asked).any(dim=0).tolist()
        control.should_training_stop |= stop
        control.should_save |= stop or save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a rollout's record after its last update."""
        if "loss" not in logs:  # the summary of the whole run
            return
        self._logs.append(dict(logs))
        step, rest = divmod(state.global_step, self._num_updates)
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise ProxstepError(
                f"step {step + (rest > 0)}, update {state.global_step}: the gradient's norm is "
                f"{logs['grad_norm']}: lower optimizer.learning_rate, and begin again or resume"
            )
        if rest:
            return
        kept = self._trainer._logs
        record = record_of(self._recipe, self._logs, kept["rewards"], kept["advantages"])
        record |= self._algorithm.bounds(record)
        self._logs = []
        if step == self._recipe.steps or step % self._recipe.evaluation.every == 0:
            record |= self._evaluate(step)
        self._write(step, record)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give a complete checkpoint its manifest and its name, and delete the oldest ones."""
        self._trainer.accelerator.wait_for_everyone()
        if self._log is None:
            return
        assert self._probe is not None  # the run began with an evaluation
        parent = self._folder.path / CHECKPOINTS
        written = parent / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        kept = {
            "probe": self._probe.state_dict(),
            "elapsed_seconds": self._seconds(),
            "recipe": with_absolute_paths(self._recipe).model_dump(),
        }
        torch.save(kept, written / STATE_FILE)
        publish(
            *(written, self._folder.path, state.global_step // self._num_updates),
            self._recipe.logging.checkpoints_kept,
        )
        for other in parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(other)
        self._saved = time.monotonic()

    def _seconds(self) -> float:
        """Return the seconds of the run, those of its earlier parts included."""
        return time.perf_counter() - self._started

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Measure the policy as it is now; the training's generators stay as they are."""
        device, model = self._trainer.accelerator.device, self._trainer.model
        devices = [device] if device.type == "cuda" else []
        with (
            self._clock.phase("evaluation"),
            torch.random.fork_rng(devices),
            autocast(self._recipe, model),
        ):
            measured, samples, self._probe = evaluate(
                *(self._recipe, model, self._initial),
                *(self._tokenizer, self._validation, self._probe, self._progress),
            )
        if self._log is not None:
            self._folder.add_samples([{"step": step, **sample} for sample in samples])
        return measured

    def _write(self, step: int, record: dict[str, Any]) -> None:
        rollout = self._recipe.rollout
        elapsed = self._seconds()
        record = {
            "step": step,
            **record,
            "num_updates": step * self._num_updates,
            "num_sequences": step * rollout.num_prompts * rollout.num_generations,
            "elapsed_seconds": elapsed,
            **self._clock.take(),
            "seconds_step": elapsed - self._recorded,
        }
        self._recorded = elapsed
        if self._log is not None:
            self._log.write(record)
        self._tracker.log(record)
        self._progress.record(record)

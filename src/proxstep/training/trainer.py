"""The local engine: sample, reward, update, measure; readable top to bottom.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from proxstep.budget import KlBudget
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.isopo.diagnostics.summary import summary
from proxstep.runs.folder import RunFolder
from proxstep.runs.stop import StopRequest, stop_on_signal
from proxstep.runs.tracking import MetricsLog, Progress, Tracker
from proxstep.training.batch import Batch, collect, shortage
from proxstep.training.chunkable import check_chunkable
from proxstep.training.clock import Clock
from proxstep.training.evaluation import Probe, evaluate, truncation_note
from proxstep.training.guarding import Guarding
from proxstep.training.judging import judged, with_budget
from proxstep.training.objective import Objective, make_isopo
from proxstep.training.optimizers import make_optimizer, make_schedule
from proxstep.training.prompts import Prompts
from proxstep.training.regularizers import loss_penalty
from proxstep.training.rollout import Completions, Scores, autocast, score
from proxstep.training.sampler import make_sampler
from proxstep.typing import Tensor

_MOST_IDLE_STEPS = 5


class Trainer(Guarding):
    """A run of one recipe.

    Args:
        recipe: What to do.
        model: The policy, on its device.
        tokenizer: Its tokenizer.
        train: Training prompts.
        validation: Validation prompts.
        folder: The run folder, already created.
        progress: Shows the run.
        initial: The initial policy, where `model` is not it any more: in a resumed run.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: Any,
        train: Prompts,
        validation: Prompts,
        folder: RunFolder,
        progress: Progress,
        initial: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.train_prompts, self.validation = train, validation
        self.folder, self.progress = folder, progress
        self.device = next(model.parameters()).device
        self.initial = initial
        if initial is None and recipe.keeps_initial:
            self.initial = copy.deepcopy(model).eval().requires_grad_(False)
        if recipe.model.head == "chunked":
            check_chunkable(model)
        self.objective = Objective(recipe)
        self.isopo = make_isopo(recipe, model)
        self.optimizer = make_optimizer(recipe.optimizer, model)
        if recipe.update.kl_budget is not None:
            self.optimizer = with_budget(recipe.update, self.optimizer, model, progress.note)
        self.schedule = make_schedule(
            self.optimizer, recipe.optimizer, recipe.steps * recipe.update.num_updates
        )
        self.sampler = make_sampler(recipe, model, tokenizer)
        self.clock = Clock(self.device, progress)
        self.probe: Probe | None = None
        self._idle_steps = 0
        self._warned: set[str] = set()

    def run(self) -> str:
        """Train to the recipe's last step, or until interrupted.

        Returns:
            "finished", "interrupted", or "stopped" by the guard; each leaves a checkpoint.

        Raises:
            ProxstepError: If the gradient is not finite, or a reward function misbehaves.
        """
        log, status = None, "failed"
        try:
            self.folder.update_info(status="running")
            # A resumed run does what came after its checkpoint again.
            self.folder.drop_later_steps(self.step - (self.unrecorded is not None))
            self.begin_watch()
            log = MetricsLog(self.folder.metrics)
            self.progress.begin(self.recipe)
            with self._tracker() as tracker, stop_on_signal() as stop:
                self._train(log, tracker, stop)
            status = "stopped" if self.stopped else "finished" if self._done else "interrupted"
        except BaseException as error:
            saved = self.rescue()
            if saved:
                self.progress.note(
                    f"saved up to step {self.step}: proxstep train --resume {self.folder.path}"
                )
            if isinstance(error, KeyboardInterrupt):
                status = "interrupted"
            elif (explained := self.explained(error)) is not None:
                raise explained from error
            if status == "failed" or not saved:
                raise
        finally:
            if log is not None:
                log.close()
            self.folder.conclude(status)
        return status

    @property
    def _done(self) -> bool:
        """Whether the last step is taken and recorded, or the last before an early stop."""
        return self.unrecorded is None and (self.stopped_early or self.step == self.recipe.steps)

    def _tracker(self) -> Tracker:
        section = self.recipe.logging
        recipe = self.recipe.model_dump()
        return Tracker(section.tracker, section.project, self.folder.path, recipe)

    def _train(self, log: MetricsLog, tracker: Tracker, stop: StopRequest) -> None:
        """Take the steps that are left, until asked to stop; evaluate, record and save them."""
        recipe = self.recipe
        while self.unrecorded is not None or self.step < recipe.steps:
            if stop.made or self.stopped or (self.unrecorded is None and self.stopped_early):
                break
            if self.unrecorded is None:
                self.unrecorded = self._train_step()
            record = dict(self.unrecorded)
            if self.step == recipe.steps or self.step % recipe.evaluation.every == 0:
                record |= self._evaluate()
            self._write(log, tracker, record)
            if "score" in record:
                self.judge(record["score"])
            self.watch(record)
            if not self.stopped:
                self.save_if_due()
        if self.stopped:
            self.keep_last_good()
        elif recipe.logging.checkpoint_last or not self._done:
            self.save()
        self.tell_best()

    def _train_step(self) -> dict[str, Any]:
        """Sample, reward and update once; return what was measured."""
        recipe = self.recipe
        # Everything random of a step follows from seed and step: a resumed run repeats it exactly.
        # Which prompts are drawn follows from how many were, for a step can take several batches.
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        batch, measured = collect(
            recipe,
            self.objective,
            self.model,
            self.sampler,
            self.tokenizer,
            self.train_prompts,
            self.num_prompts,
            self.clock.phase,
            self.initial,
        )
        measured["skipped"] = int(batch is None)
        self._warn("rollout", shortage(recipe, measured))
        limit = recipe.rollout.max_completion_length
        self._warn("length", truncation_note(measured["completions_clipped_ratio"], limit))
        self._warn_of_idleness(measured)
        if batch is not None:
            with self.clock.phase("update"):
                measured |= self._update(batch)
            measured |= self.objective.bounds(measured)
            self._warn("objective", self.objective.warning(measured))
            if measured["advantage_range"] > 0:
                half_range = measured["advantage_range"] / 2
                measured["grad_response_efficiency"] = measured["grad_norm"] / half_range
        drawn = measured["generation_batches"] * recipe.rollout.num_prompts
        self.num_prompts += drawn
        self.num_sequences += drawn * recipe.rollout.num_generations
        self.step += 1
        self.unrecorded = {"step": self.step, **measured}
        self.torn = False
        return self.unrecorded

    def _warn_of_idleness(self, measured: Mapping[str, Any]) -> None:
        """Warn where step after step no reward says which completion is better."""
        added = self.recipe.regularizer.in_reward or self.recipe.rollout.overlong_buffer
        idle = not measured.get("advantage_range")
        idle = idle or bool(added and measured["frac_informative_groups"] == 0)
        self._idle_steps = self._idle_steps + 1 if idle else 0
        if self._idle_steps == min(_MOST_IDLE_STEPS, self.recipe.steps):
            self._warn(
                "rewards",
                f"{self._idle_steps} steps in a row in which every reward was missing, not finite "
                "or equal to the others: nothing is learned. Look at rewards/ in metrics.jsonl and "
                "at the completions in samples.jsonl",
            )

    def _warn(self, about: str, text: str | None) -> None:
        """Show a warning, once for each subject."""
        if text is not None and about not in self._warned:
            self._warned.add(about)
            self.progress.note(text)

    def _update(self, batch: Batch) -> dict[str, Any]:
        """Take the recipe's optimizer steps on one batch."""
        section = self.recipe.update
        every = self.recipe.geometry.diagnose_every
        if self.isopo is not None:
            self.isopo.diagnose = every is not None and self.step % every == 0
        sequences: dict[str, list[Tensor]] = {}
        steps: dict[str, list[float]] = {}
        self.model.train()
        minibatches = list(batch.minibatches(section.num_minibatches))
        if isinstance(self.optimizer, KlBudget):
            self.optimizer.begin_rollout(len(minibatches) * section.num_iterations)
        rate = 0.0
        for iteration in range(section.num_iterations):
            for minibatch in minibatches:
                rate = float(self.optimizer.param_groups[0]["lr"])
                self._measure_past(minibatch)
                taken = self._accumulate(minibatch, sequences, measure_entropy=iteration == 0)
                taken |= self._optimizer_step(taken, minibatch)
                taken |= self._geometry_step()
                for name, value in taken.items():
                    steps.setdefault(name, []).append(value)
        self.model.eval()
        return {
            "learning_rate": rate,
            **{name: sum(values) / len(values) for name, values in steps.items()},
            **{name: torch.cat(parts).float().mean().item() for name, parts in sequences.items()},
        }

    def _accumulate(
        self, minibatch: Batch, measured: dict[str, list[Tensor]], *, measure_entropy: bool
    ) -> dict[str, float]:
        """Accumulate the gradient of one optimizer step; return its loss, and the regularizer's."""
        response = minibatch.completions.response_BT
        num_tokens = int(response.sum())
        taken: dict[str, float] = defaultdict(float)
        learning = minibatch.with_signal() if self.recipe.leaves_out_idle else minibatch
        for part in learning.microbatches(self.recipe.update):
            completions = part.completions
            scores = self._score(completions, with_entropy=measure_entropy)
            log_prob_BT, response_BT = scores.log_prob_BT, completions.response_BT[:, 1:]
            if scores.entropy_BT is not None:
                measured.setdefault("entropy", []).append(scores.entropy_BT[response_BT])
            old_log_prob_BT = part.old_log_prob_BT
            regularized = self.recipe.regularizer.in_loss
            extra_loss = None
            if regularized and self.isopo is None:
                extra_loss = self._regularizer_loss(scores, completions, num_tokens, taken)
            share, metrics = self.objective.backward(
                log_prob_BT,
                log_prob_BT.detach() if old_log_prob_BT is None else old_log_prob_BT,
                part.signal_B,
                response_BT,
                num_sequences=int(response.any(dim=1).sum()),
                num_tokens=num_tokens,
                isopo=self.isopo,
                extra_loss=extra_loss,
                sequence_ids=completions.sequence_ids(),
                completion_mask=completions.response_BT,
                groups=part.group_B,
                sequence_keys=part.index_B,
                importance_B=part.importance_B,
                hyper=part.hyper,
            )
            if regularized and self.isopo is not None:
                with self.isopo.off():
                    scores = self._score(completions)
                    self._regularizer_loss(scores, completions, num_tokens, taken).backward()
            taken["loss"] += share.item()
            for name, value_B in metrics.items():
                measured.setdefault(f"objective/{name}", []).append(value_B)
        return taken

    def _measure_past(self, minibatch: Batch) -> None:
        """Let the geometry measure what it builds on and has no past: see `Isopo.measuring`."""
        while self.isopo is not None and self.isopo.needs_past:
            self.torn = True
            with self.isopo.measuring():
                for part in minibatch.microbatches(self.recipe.update):
                    completions = part.completions
                    log_prob_BT = self._score(completions).log_prob_BT
                    with self.isopo.microbatch(
                        completions.sequence_ids(),
                        torch.zeros(len(completions), device=log_prob_BT.device),
                        completions.response_BT,
                        groups=part.group_B.to(log_prob_BT.device),
                        sequence_keys=part.index_B,
                    ) as microbatch:
                        response_BT = completions.response_BT[:, 1:]
                        microbatch.objective(log_prob_BT, response_BT).backward()

    def _geometry_step(self) -> dict[str, float]:
        """End the geometry's optimizer step; return what it measured."""
        if self.isopo is None:
            return {}
        measured = self.isopo.step()
        diagnostics = self.isopo.diagnostics
        if self.isopo.diagnose and diagnostics is not None:
            self.folder.add_diagnostics(
                {
                    "step": self.step + 1,
                    "update": self.num_updates,
                    "summary": summary(diagnostics),
                    **diagnostics.to_dict(),
                }
            )
        return {f"geometry/{name}": value for name, value in measured.items()}

    def _score(self, completions: Completions, *, with_entropy: bool = False) -> Scores:
        """Return the policy's log-probabilities at the sampling temperature, with their graph."""
        recipe = self.recipe
        with autocast(recipe, self.model):
            return score(
                self.model,
                completions,
                recipe.rollout.temperature,
                recipe.model.head,
                with_entropy=with_entropy,
            )

    def _regularizer_loss(
        self, scores: Scores, completions: Completions, num_tokens: int, taken: dict[str, float]
    ) -> Tensor:
        """Return a microbatch's regularizer loss, and add its terms to `taken`."""
        loss, terms = loss_penalty(
            self.recipe, self.model, self.initial, scores, completions, num_tokens
        )
        for name, value in terms.items():
            taken[f"regularizer/{name}"] += value
        return loss

    def _optimizer_step(self, losses: Mapping[str, float], minibatch: Batch) -> dict[str, float]:
        """Clip, step and clear; return the gradient's norm before clipping, and the step in nats.

        Raises:
            ProxstepError: If the gradient or a loss is not finite; the parameters are left as they
                were.
        """
        limit = self.recipe.optimizer.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        for name, value in {"gradient's norm": norm, **losses}.items():
            if not math.isfinite(value):
                raise ProxstepError(
                    f"step {self.step + 1}, update {self.num_updates + 1}: the {name} is {value}; "
                    "the parameters were not changed. Lower optimizer.learning_rate, or look at "
                    "the last completions in samples.jsonl"
                )
        self.torn = True
        taken = {"grad_norm": norm}
        if isinstance(self.optimizer, KlBudget):
            self.optimizer.step(judged(self.recipe, self.model, minibatch))
            taken |= {f"kl_budget/{name}": x for name, x in self.optimizer.measured.items()}
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.num_updates += 1
        return taken

    def _evaluate(self) -> dict[str, Any]:
        """Measure the policy as it is now; no step's randomness depends on it."""
        with self.clock.phase("evaluation"), autocast(self.recipe, self.model):
            measured, samples, self.probe = evaluate(
                *(self.recipe, self.model, self.initial, self.tokenizer, self.validation),
                *(self.probe, self.progress),
            )
        self.folder.add_samples([{"step": self.step, **sample} for sample in samples])
        return measured

    def _write(self, log: MetricsLog, tracker: Tracker, record: dict[str, Any]) -> None:
        record |= {
            "num_updates": self.num_updates,
            "num_sequences": self.num_sequences,
            "elapsed_seconds": self.elapsed(),
            **self.clock.take(),
        }
        log.write(record)
        self.unrecorded = None
        tracker.log(record)
        self.progress.record(record)

"""The local engine: sample, reward, advantages, update, measure; one process, readable top to
bottom.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from proxstep.algorithm import Algorithm, make_isopo, make_optimizer
from proxstep.checkpoint import save_checkpoint
from proxstep.config import Recipe
from proxstep.data import Prompts, step_rows
from proxstep.errors import ProxstepError
from proxstep.evaluation import Probe, completion_log_probs, greedy_score, kl_from_initial
from proxstep.masked import masked_sum
from proxstep.metrics import entropy, token_log_probs
from proxstep.rollout import Completions, response_logits, sample
from proxstep.runfolder import RunFolder
from proxstep.tracking import MetricsLog, Tracker
from proxstep.types import Float, Int, Tensor


class Progress(Protocol):
    """Who watches a run."""

    def begin(self, recipe: Recipe) -> None:
        """A run begins, or goes on."""

    def record(self, record: Mapping[str, Any]) -> None:
        """One line of metrics was written."""


@dataclass(frozen=True)
class Batch:
    """One step's completions, ready for the update.

    Attributes:
        completions: The completions that have a reward.
        signal_B: What the objective takes as its advantages.
        group_B: Each completion's prompt, counted from 0.
        old_log_prob_BT: Log-probabilities under the policy that sampled, or None where the update's
            single pass computes the same.
    """

    completions: Completions
    signal_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"]
    old_log_prob_BT: Float[Tensor, "batch tokens"] | None


class Trainer:
    """A run of one recipe.

    Args:
        recipe: What to do.
        model: The policy, on its device.
        tokenizer: Its tokenizer.
        train: Training prompts.
        validation: Validation prompts.
        folder: The run folder, already created.
        progress: Who watches.
        initial: A copy of the initial policy where the model is not one any more (a resumed run);
            None otherwise.
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
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.train_prompts, self.validation = train, validation
        self.folder, self.progress = folder, progress
        self.device = next(model.parameters()).device
        self._initial = initial
        if initial is None and recipe.evaluation.kl_policy_initial and recipe.model.lora is None:
            self._initial = copy.deepcopy(model).eval().requires_grad_(False)
        self.algorithm = Algorithm(recipe)
        self.isopo = make_isopo(recipe, model)
        self.optimizer, self.schedule = make_optimizer(recipe, model)
        self.probe: Probe | None = None
        self.step, self.num_updates, self.num_sequences = 0, 0, 0
        self._elapsed_before, self._started = 0.0, time.perf_counter()
        self._seconds: dict[str, float] = {}

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to the recipe's last step, or until somebody interrupts.

        Returns:
            "finished" or "interrupted"; a checkpoint is written in either case.

        Raises:
            ProxstepError: If the gradient is not finite, or a reward function misbehaves.
        """
        recipe = self.recipe
        self.progress.begin(recipe)
        self.folder.update_info(status="running")
        log = MetricsLog(self.folder.metrics, keep_until=self.step if self.probe else None)
        status, saved = "failed", -1
        tracker = Tracker(
            recipe.logging.tracker, recipe.logging.project, self.folder.path, recipe.model_dump()
        )
        try:
            with tracker, _stop_on_signal() as stop:
                if self.probe is None:
                    self._write(log, tracker, {"step": 0, **self._evaluate()})
                while self.step < recipe.steps and not stop.requested:
                    record = self._train_step()
                    last = self.step == recipe.steps or stop.requested
                    if last or self.step % recipe.evaluation.every == 0:
                        record |= self._evaluate()
                    self._write(log, tracker, record)
                    every = recipe.logging.checkpoint_every
                    if every and self.step % every == 0:
                        saved = self._save()
            if saved != self.step:
                self._save()
            status = "finished" if self.step == recipe.steps else "interrupted"
        finally:
            log.close()
            self.folder.update_info(status=status)
        return status

    def _write(self, log: MetricsLog, tracker: Tracker, record: dict[str, Any]) -> None:
        record |= {
            "num_updates": self.num_updates,
            "num_sequences": self.num_sequences,
            "elapsed_seconds": self._elapsed(),
            **{f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()},
            "seconds_step": sum(self._seconds.values()),
        }
        self._seconds = {}
        log.write(record)
        tracker.log(record)
        self.progress.record(record)

    def _train_step(self) -> dict[str, Any]:
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        batch, measured = self._collect()
        if batch is not None:
            with self._phase("update"):
                measured |= self._update(batch)
            spread = measured["advantage_range"]
            if spread > 0:
                measured["grad_response_efficiency"] = measured["grad_norm"] / (spread / 2)
        self.step += 1
        return {"step": self.step, **measured}

    # -- sampling and rewards ----------------------------------------------------------------------

    def _collect(self) -> tuple[Batch | None, dict[str, Any]]:
        """Sample and grade one step's completions; None where no group has enough rewards."""
        section = self.recipe.rollout
        rows = step_rows(len(self.train_prompts), section.num_prompts, self.step, self.recipe.seed)
        repeated = [row for row in rows for _ in range(section.num_generations)]
        with self._phase("rollout"):
            completions = sample(
                self.model,
                self.tokenizer,
                [self.train_prompts.tokens(row) for row in repeated],
                max_new_tokens=section.max_completion_length,
                temperature=section.temperature,
                top_p=section.top_p,
                top_k=section.top_k,
            )
        self.num_sequences += len(completions)
        with self._phase("reward"):
            table = self.train_prompts.grade(repeated, completions.texts(self.tokenizer))
        reward_B = torch.tensor(table.total, dtype=torch.float64)
        group_B = torch.arange(len(rows)).repeat_interleave(section.num_generations)
        measured = _describe(completions, reward_B)
        for name, values in table.per_function.items():
            given = [value for value in values if value is not None and math.isfinite(value)]
            measured[f"rewards/{name}"] = sum(given) / len(given) if given else None
        kept = _with_reward(reward_B, group_B, minimum=min(2, section.num_generations))
        if not len(kept):
            return None, measured
        completions, group_B = completions.rows(kept.to(self.device)), group_B[kept]
        advantage_B, spread = self.algorithm.advantages(reward_B[kept].float(), group_B)
        measured |= {name: spread[name] for name in ("frac_reward_zero_std", "reward_std")}
        measured["advantage_range"] = (advantage_B.max() - advantage_B.min()).item()
        old_log_prob_BT, signal_B, more = self._anchor(completions, advantage_B, group_B)
        measured |= {f"objective/{name}": value for name, value in more.items()}
        return Batch(completions, signal_B.to(self.device), group_B, old_log_prob_BT), measured

    def _anchor(
        self, completions: Completions, advantage_B: Tensor, group_B: Tensor
    ) -> tuple[Tensor | None, Tensor, dict[str, float]]:
        """Return the sampling policy's log-probabilities where they are needed, and the
        objective's signal.
        """
        update = self.recipe.update
        old_log_prob_BT = anchor_B = None
        if update.num_minibatches * update.num_iterations > 1 or self.algorithm.needs_anchor:
            with self._phase("log_probs"):
                size = update.microbatch_size or len(completions)
                old_log_prob_BT = completion_log_probs(
                    self.model, completions, self.recipe.rollout.temperature, size
                )
            anchor_B = masked_sum(old_log_prob_BT, completions.response_BT[:, 1:]).cpu()
        signal_B, more = self.algorithm.signal(
            advantage_B, group_B, anchor_B, completions.lengths().cpu()
        )
        return old_log_prob_BT, signal_B, more

    # -- the update --------------------------------------------------------------------------------

    def _update(self, batch: Batch) -> dict[str, Any]:
        """Take the recipe's optimizer steps on one batch."""
        self.model.train()
        section = self.recipe.update
        sums: dict[str, list[Tensor]] = {}
        geometry: dict[str, list[float]] = {}
        losses, norms = [], []
        for iteration in range(section.num_iterations):
            for rows in _minibatches(batch.group_B, section.num_minibatches):
                loss = self._accumulate(batch, rows, sums, measure_entropy=iteration == 0)
                norms.append(self._optimizer_step())
                losses.append(loss)
                for name, value in (self.isopo.step() if self.isopo else {}).items():
                    geometry.setdefault(name, []).append(value)
        self.model.eval()
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": self.schedule.get_last_lr()[0],
            **{name: torch.cat(values).float().mean().item() for name, values in sums.items()},
            **{f"geometry/{name}": sum(values) / len(values) for name, values in geometry.items()},
        }

    def _accumulate(
        self, batch: Batch, rows: Tensor, sums: dict[str, list[Tensor]], *, measure_entropy: bool
    ) -> float:
        """Accumulate the gradient of one minibatch, microbatch by microbatch; return its loss.

        The trainer owns the microbatches' composition, which the natural rule depends on: rows in
        the order of their prompts, `microbatch_size` at a time, so that a prompt's completions stay
        together where they fit.
        """
        response = batch.completions.response_BT[:, 1:][rows.to(self.device)]
        num_tokens = int(response.sum())
        num_sequences = int(response.any(dim=1).sum())
        loss = 0.0
        for micro in rows.split(self.recipe.update.microbatch_size or len(rows)):
            on_device = micro.to(self.device)
            part = batch.completions.rows(on_device)
            logits = response_logits(self.model, part, self.recipe.rollout.temperature)
            log_prob_BT = token_log_probs(logits, part.token_BT[:, 1:])
            response_BT = part.response_BT[:, 1:]
            old_log_prob_BT = log_prob_BT.detach()
            if batch.old_log_prob_BT is not None:
                old_log_prob_BT = torch.zeros_like(old_log_prob_BT)
                old_log_prob_BT[response_BT] = batch.old_log_prob_BT[on_device][
                    batch.completions.response_BT[on_device, 1:]
                ]
            if measure_entropy:
                with torch.no_grad():
                    entropy_BT = entropy(logits.detach())
                sums.setdefault("entropy", []).append(entropy_BT[response_BT])
            share, metrics = self.algorithm.backward(
                log_prob_BT,
                old_log_prob_BT,
                batch.signal_B[on_device],
                response_BT,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                isopo=self.isopo,
                sequence_ids=part.sequence_ids(),
                completion_mask=part.response_BT,
            )
            loss += share.item()
            for name, value_B in metrics.items():
                sums.setdefault(f"objective/{name}", []).append(value_B)
        return loss

    def _optimizer_step(self) -> float:
        """Clip, step and clear; return the gradient's norm before clipping.

        Raises:
            ProxstepError: If the gradient is not finite; the parameters are left as they were.
        """
        limit = self.recipe.optimizer.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not math.isfinite(norm):
            raise ProxstepError(
                f"step {self.step + 1}, update {self.num_updates + 1}: the gradient's norm is "
                f"{norm}; the parameters "
                "were not changed. Lower optimizer.learning_rate, or look at the last completions "
                "in samples.jsonl"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.num_updates += 1
        return norm

    # -- evaluation and checkpoints ----------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        """Measure the policy as it is now; none of it touches the random state of training."""
        section, limit = self.recipe.evaluation, self.recipe.rollout.max_completion_length
        count = min(section.num_probe_prompts, len(self.validation))
        prompts = [self.validation.tokens(row) for row in range(count)]
        measured: dict[str, Any] = {}
        with self._phase("evaluation"):
            torch.manual_seed(self.recipe.seed)
            if self.probe is None:
                self.probe = Probe.draw(self.model, self.tokenizer, prompts, limit)
            greedy = greedy_score(
                self.model,
                self.tokenizer,
                self.validation,
                max_new_tokens=limit,
                batch_size=section.batch_size,
            )
            measured = {"score": greedy.score, "score_mean_length": greedy.mean_length}
            measured["kl_initial_policy"] = self.probe.kl(self.model)
            if section.kl_policy_initial:
                measured["kl_policy_initial"] = kl_from_initial(
                    self.model, self._initial, self.tokenizer, prompts, limit
                )
        shown = range(min(self.recipe.logging.num_samples, len(self.validation)))
        self.folder.add_samples(
            [
                {
                    "step": self.step,
                    "prompt": self.validation.examples[row].prompt,
                    "completion": greedy.completions[row],
                    "answer": self.validation.examples[row].answer,
                    "reward": greedy.rewards[row],
                }
                for row in shown
            ]
        )
        return measured

    def _save(self) -> int:
        state = {
            "step": self.step,
            "num_updates": self.num_updates,
            "num_sequences": self.num_sequences,
            "elapsed_seconds": self._elapsed(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "isopo": self.isopo.state_dict() if self.isopo else None,
            "probe": self.probe.state_dict() if self.probe else None,
        }
        save_checkpoint(self.folder.path, self.step, self.model, self.tokenizer, state)
        return self.step

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's trainer state; the model was loaded from the same
        checkpoint.
        """
        self.step, self.num_updates = state["step"], state["num_updates"]
        self.num_sequences = state["num_sequences"]
        self._elapsed_before = state["elapsed_seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.isopo is not None:
            self.isopo.load_state_dict(state["isopo"])
        if state["probe"] is not None:
            self.probe = Probe.from_state_dict(state["probe"], self.device)

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


def _minibatches(group_B: Tensor, number: int) -> Iterator[Tensor]:
    """Yield the rows of each minibatch, whole groups in order."""
    for groups in group_B.unique().chunk(number):
        yield torch.isin(group_B, groups).nonzero().squeeze(1)


def _with_reward(reward_B: Tensor, group_B: Tensor, minimum: int) -> Tensor:
    """Return the rows whose reward is finite, in groups that keep at least `minimum` of them."""
    finite_B = reward_B.isfinite()
    left = torch.zeros(int(group_B.max()) + 1, dtype=torch.long).index_add_(
        0, group_B, finite_B.long()
    )
    return (finite_B & (left[group_B] >= minimum)).nonzero().squeeze(1)


def _describe(completions: Completions, reward_B: Tensor) -> dict[str, Any]:
    lengths = completions.lengths().double()
    finite = reward_B[reward_B.isfinite()]
    return {
        "reward": finite.mean().item() if len(finite) else None,
        "frac_invalid_reward": 1 - len(finite) / len(reward_B),
        "completions_mean_length": lengths.mean().item(),
        "completions_max_length": int(lengths.max()),
        "completions_clipped_ratio": completions.truncated_B.double().mean().item(),
    }


class _Stop:
    requested = False


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; a second Ctrl-C
    stops at once.
    """
    stop = _Stop()

    def request(number: int, frame: Any) -> None:
        del frame
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        previous = {
            number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: whoever runs us handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

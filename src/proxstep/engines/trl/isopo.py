"""ISOPO in TRL: the gradient of a sequence-level algorithm, transformed in the backward pass.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.grpo_trainer import GRPOTrainer

from proxstep.algorithms import sequence_coefficients
from proxstep.engines.trl.configs import IsopoConfig, PolicyConfig
from proxstep.engines.trl.policy import GROUP, KEY, PolicyTrainer, Scored
from proxstep.engines.trl.refusals import refuse_adapters, refuse_vision
from proxstep.engines.trl.scoring import response_mask, transform_head
from proxstep.isopo import Isopo
from proxstep.training.objective import install_geometry
from proxstep.typing import Tensor

logger = get_logger(__name__)

STATE_FILE = "proxstep.pt"


class IsopoTrainer(PolicyTrainer):
    """PolicyTrainer with ISOPO's gradient; same arguments, with an `IsopoConfig`.

    `isopo` is the `proxstep.Isopo` that is installed on the model while `train` runs; before and
    after, the model is an ordinary one, so that another trainer can have it.

    Source: arXiv 2512.23353.
    """

    config_class: type[PolicyConfig] = IsopoConfig
    _tag_names = ["trl", "proxstep", "isopo"]  # noqa: RUF012
    _name = "ISOPO"
    _paper = {"title": "ISOPO: Proximal policy gradients without pi-old", "id": "2512.23353"}  # noqa: RUF012

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any
    ) -> None:
        named = inspect.signature(GRPOTrainer.__init__)
        given = named.bind_partial(self, model, reward_funcs, args, *more, **options)
        refuse_adapters(given.arguments.get("peft_config"), model)
        super().__init__(model, reward_funcs, args, *more, **options)
        refuse_vision(self._core())
        self._forward: Any = None
        self.isopo = self._install()
        self.isopo.remove()
        self._open: ExitStack | None = None
        self._passes_before = 0
        self._value: Tensor | None = None

    def _core(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _install(self) -> Isopo:
        """Install ISOPO on the model, and on its scoring where another trainer has put its own."""
        section, core = self.args.geometry(), self._core()
        isopo = install_geometry(section, self.model, self.args.seed)
        if vars(core).get("forward") is not self._forward or self._forward is None:
            level, text = transform_head(core, self.temperature, needs_full=section.needs_full_head)
            self._forward = vars(core).get("forward")
            logger.log(level, "ISOPO: %s", text)
        return isopo

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with ISOPO on the model, which before and after is an ordinary one."""
        before, self.isopo = self.isopo, self._install()
        self.isopo.load_state_dict(before.state_dict())
        self.isopo.diagnose = before.diagnose
        try:
            return super().train(*args, **kwargs)
        finally:
            self.isopo.remove()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the microbatch open until its backward has ended; return the loss's value."""
        try:
            with ExitStack() as self._open:
                backpropagated = super().training_step(*args, **kwargs)
        finally:
            self._open = None
        return backpropagated if self._value is None else self._value

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Give ISOPO a past that it lacks, which needs the step's microbatches."""
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._open is not None:
            while self.isopo.needs_past:
                self._measure()
        return inputs

    def _measure(self) -> None:
        """Run the optimizer step's microbatches for ISOPO's statistics alone.

        Where a step accumulates over several generations, only the first of them is there.
        """
        logged = {name: list(values) for name, values in self._metrics["train"].items()}
        model, buffered = self.model_wrapped, self._buffered_inputs
        assert buffered is not None  # the step that measures has generated
        start = self._step % self.args.steps_per_generation
        with self.isopo.measuring(), self.accelerator.no_sync(model):
            for inputs in buffered[start:][: self.current_gradient_accumulation_steps]:
                counted_B = response_mask(inputs).any(dim=1)
                with ExitStack() as opened:
                    with self.compute_loss_context_manager():
                        if not counted_B.any():  # other ranks exchange what they measure
                            self._without_completions(model, inputs)
                            continue
                        objective, _ = self._objective(opened, model, inputs, counted_B)
                    self.accelerator.backward(objective)
        self._metrics["train"].clear()
        self._metrics["train"].update(logged)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """Return what training back-propagates: in it, the sum of log-probabilities.

        The other terms have a forward and a backward of their own, on which ISOPO is off: under
        activation checkpointing, backward runs the forward again.
        """
        if self._open is None:  # evaluation
            return super()._compute_loss(model, inputs)
        counted_B = response_mask(inputs).any(dim=1)  # the others are no part of the microbatch
        if not counted_B.any():
            self._open.enter_context(self.isopo.off())
            other_loss, self._value = self._without_completions(model, inputs)
            return other_loss
        other_value: Tensor | float = 0.0
        if self.beta != 0 or self.entropy_coef != 0 or self.aux_loss_enabled:
            with self.isopo.off():
                other_loss = self._score(model, inputs).other_loss
                self.accelerator.backward(other_loss)
            other_value = other_loss.detach()
        objective, value = self._objective(self._open, model, inputs, counted_B)
        self._value = value + other_value
        return objective

    def _without_completions(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the other terms' loss and the whole value, where all completions are masked."""
        scored = self._score(model, inputs)
        _, value = self._coefficients(scored, inputs)
        return scored.other_loss, value + scored.other_loss.detach()

    def _objective(
        self, opened: ExitStack, model: Any, inputs: Any, counted_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Open a microbatch; return its sum of log-probabilities, and the loss's value."""
        microbatch = opened.enter_context(
            self.isopo.microbatch(
                _sequence_ids(inputs, counted_B),
                torch.zeros(int(counted_B.sum()), device=counted_B.device),
                _completion_mask(inputs),
                groups=inputs[GROUP][counted_B],
                sequence_keys=self._keys(inputs)[counted_B],
            )
        )
        scored = self._score(model, inputs)
        coefficient_B, value = self._coefficients(scored, inputs)
        microbatch.set_coefficients(coefficient_B[counted_B])
        return microbatch.objective(scored.log_prob_BT, scored.response_BT), value

    def _keys(self, inputs: Any) -> Tensor:
        """Return a number for each sequence that no other one of the optimizer step has.

        A step may take several rollouts, or one of them several times: each pass counts on. It is
        counted from the step's start, which a resumed run knows.
        """
        passes = self._passes() - self._passes_before
        return inputs[KEY] + passes * self.args.generation_batch_size

    def _passes(self) -> int:
        return self._step // self.args.steps_per_generation

    def end_step(self) -> None:
        """End ISOPO's step after the optimizer's, and log what it measured."""
        super().end_step()
        self._passes_before = self._passes()
        self._log_step({f"geometry/{k}": value for k, value in self.isopo.step().items()})

    def _judge(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Score without ISOPO: no gradient is taken."""
        with self.isopo.off():
            return super()._judge(inputs)

    def _coefficients(self, scored: Scored, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return each sequence's coefficient, and the loss's value."""
        tensors, options = self._loss_arguments(scored, inputs)
        coefficient_B, loss, metrics = sequence_coefficients(self.algorithm, *tensors, **options)
        share = self._share(inputs)
        self._note(loss * share, metrics)
        return coefficient_B * share, loss * share

    # -- checkpoints -------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save ISOPO's trailing means beside the optimizer's state."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            folder = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(self.isopo.state_dict(), folder / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """Continue from a checkpoint's trailing means."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            logger.warning("ISOPO: %s is missing; its trailing means start again", path)
            return
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self.isopo.load_state_dict(state)


def _sequence_ids(inputs: Any, counted_B: Tensor) -> Tensor:
    """Return the number of each position's sequence among those that count, else -1."""
    mask_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    number_B = counted_B.long().cumsum(0) - 1
    return torch.where(mask_BT & counted_B[:, None], number_B[:, None], -1)


def _completion_mask(inputs: Any) -> Tensor:
    """Return where the input's positions are completion tokens."""
    prompt_BT = torch.zeros_like(inputs["prompt_mask"])
    return torch.cat([prompt_BT, inputs["completion_mask"]], dim=1).bool()

"""The two trainers: OPO in the loss, ISOPO in the backward pass.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from proxstep.algorithms import sequence_coefficients
from proxstep.engines.trl.base import GROUP, KEY, Scored, SequenceTrainer
from proxstep.engines.trl.configs import IsopoConfig, OpoConfig
from proxstep.engines.trl.head import transform_head
from proxstep.errors import ProxstepError
from proxstep.training.objective import install_geometry
from proxstep.typing import Tensor

logger = get_logger(__name__)

STATE_FILE = "proxstep.pt"


class OpoTrainer(SequenceTrainer):
    """GRPOTrainer with OPO's objective; same arguments, with an `OpoConfig`.

    L = mean_b(-drive_b u_b + (mu / 2) u_b^2), and TRL's KL and entropy terms where they are on.

    Source: arXiv 2601.12415.
    """

    _tag_names = ["trl", "proxstep", "opo"]  # noqa: RUF012 (as TRL's own)
    _name = "OPO"
    _paper = {"title": "Orthogonalized Policy Optimization", "id": "2601.12415"}  # noqa: RUF012

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return self._plain_loss(model, inputs)


class IsopoTrainer(SequenceTrainer):
    """GRPOTrainer with ISOPO's gradient; same arguments, with an `IsopoConfig`.

    `isopo` is the `proxstep.Isopo` that is installed on the model.

    Source: arXiv 2512.23353.
    """

    config_class: type[OpoConfig] = IsopoConfig
    _tag_names = ["trl", "proxstep", "isopo"]  # noqa: RUF012
    _name = "ISOPO"
    _paper = {"title": "ISOPO: Proximal policy gradients without pi-old", "id": "2512.23353"}  # noqa: RUF012

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **options: Any
    ) -> None:
        super().__init__(model, reward_funcs, args, *more, **options)
        if self.aux_loss_enabled:
            raise ProxstepError(
                "the model's router has an auxiliary loss, which goes through the layers that "
                "ISOPO transforms: set router_aux_loss_coef=0.0"
            )
        section = self.args.geometry_section()
        self.isopo = install_geometry(section, self.model, self.args.seed)
        core = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        level, text = transform_head(core, self.temperature, needs_kernel=section.needs_kernel)
        logger.log(level, "ISOPO: %s", text)
        self._open: ExitStack | None = None
        self._passes_before = 0
        self._value: Tensor | None = None
        self.add_callback(_EndOfStep(self))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the microbatch open until its backward has ended; return the objective's value."""
        try:
            with ExitStack() as self._open:
                backpropagated = super().training_step(*args, **kwargs)
        finally:
            self._open = None
        return backpropagated if self._value is None else self._value

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """Return what training back-propagates: in it, the sum of log-probabilities.

        The other terms have a forward and a backward of their own, on which ISOPO is off: under
        activation checkpointing, backward runs the forward again.
        """
        if self._open is None:  # evaluation
            return self._plain_loss(model, inputs)
        self._measure_past(model)
        counted_B = _counted(inputs)
        if not counted_B.any():  # every completion is masked: the policy term is exactly zero
            self._open.enter_context(self.isopo.off())
            self._value = (other_loss := self._score(model, inputs).other_loss).detach()
            return other_loss
        other_value: Tensor | float = 0.0
        if self.beta != 0 or self.entropy_coef != 0:
            with self.isopo.off():
                other_loss = self._score(model, inputs).other_loss
                self.accelerator.backward(other_loss)
            other_value = other_loss.detach()
        microbatch = self._open.enter_context(
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
        self._value = value + other_value
        return microbatch.objective(scored.log_prob_BT, scored.response_BT)

    def _measure_past(self, model: Any) -> None:
        """Before the very first update, let ISOPO measure what it starts from: all of the step."""
        num_microbatches = self.current_gradient_accumulation_steps
        logged = {mode: dict(values) for mode, values in copy.deepcopy(self._metrics).items()}
        while self.isopo.needs_past:
            with self.isopo.measuring():
                for inputs in self._buffered_inputs[:num_microbatches]:
                    self._measure(model, inputs)
            for mode, values in logged.items():  # those of the measuring pass are no step's
                self._metrics[mode].clear()
                self._metrics[mode].update(copy.deepcopy(values))

    def _measure(self, model: Any, inputs: Any) -> None:
        counted_B = _counted(inputs)
        if not counted_B.any():  # every rank runs as many passes
            with self.isopo.off():
                (0.0 * self._score(model, inputs).log_prob_BT.sum()).backward()
            return
        with self.isopo.microbatch(
            _sequence_ids(inputs, counted_B),
            torch.zeros(int(counted_B.sum()), device=counted_B.device),
            _completion_mask(inputs),
            groups=inputs[GROUP][counted_B],
            sequence_keys=inputs[KEY][counted_B],
        ) as microbatch:
            scored = self._score(model, inputs)
            microbatch.objective(scored.log_prob_BT, scored.response_BT).backward()

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
        self._passes_before = self._passes()
        for name, value in self.isopo.step().items():
            self._metrics["train"][f"geometry/{name}"].append(value)

    def _coefficients(self, scored: Scored, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return each sequence's coefficient, and the objective's value."""
        tensors, hyper = self._objective_arguments(scored, inputs)
        coefficient_B, loss, metrics = sequence_coefficients(self.objective, *tensors, **hyper)
        self._note(metrics)
        share = self._share(inputs)
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


class _EndOfStep(TrainerCallback):
    """Ends ISOPO's step after the optimizer's."""

    def __init__(self, trainer: IsopoTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Fold the trailing means."""
        self._trainer.end_step()


def _counted(inputs: Any) -> Tensor:
    """Return which sequences have a token that counts; the others are no part of the microbatch."""
    mask_BT = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask_BT = mask_BT * inputs["tool_mask"]
    return mask_BT.bool().any(dim=1)


def _sequence_ids(inputs: Any, counted_B: Tensor) -> Tensor:
    """Return the number of each position's sequence among those that count, else -1."""
    mask_BT = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    number_B = counted_B.long().cumsum(0) - 1
    return torch.where(mask_BT & counted_B[:, None], number_B[:, None], -1)


def _completion_mask(inputs: Any) -> Tensor:
    """Return where the input's positions are completion tokens."""
    prompt_BT = torch.zeros_like(inputs["prompt_mask"])
    return torch.cat([prompt_BT, inputs["completion_mask"]], dim=1).bool()

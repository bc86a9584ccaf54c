"""verl's FSDP2 engine with ISOPO's gradient in the backward pass of training.

Legend for shape suffixes: B sequences, R response tokens, N tokens without padding.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fs import copy_to_local, is_non_local
from verl.workers.utils.padding import no_padding_2_padding

from proxstep.engines.verl import token_grid
from proxstep.engines.verl.actor_config import BACKEND, IsopoActorConfig, read_geometry
from proxstep.engines.verl.budget import BudgetEngine
from proxstep.engines.verl.coefficients import Terms, policy_coefficients, split_terms
from proxstep.engines.verl.estimator import numbered
from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo, NaturalRule
from proxstep.isopo.microbatch import Microbatch
from proxstep.training.objective import install_geometry
from proxstep.typing import Bool, Tensor

logger = logging.getLogger(__name__)

STATE_FILE = "proxstep.pt"
"""Of ISOPO, in the actor's folder of verl's checkpoints."""

KEY, GROUP = "chi2_key", "chi2_group"
"""What a mini-batch carries beside verl's own tensors; verl splits it with them."""


class IsopoEngine(BudgetEngine):
    """FSDPEngineWithLMHead whose training gives ISOPO's gradient; the rest is verl's.

    `isopo` is the `proxstep.Isopo` that is installed on the model; None in a reference policy,
    which is an ordinary FSDP2 engine.

    Source: arXiv 2512.23353.
    """

    backend: ClassVar[str] = BACKEND
    actor_class: ClassVar[type] = IsopoActorConfig
    isopo: Isopo | None = None

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self._open = ExitStack()
        self._measured: dict[str, float] = {}

    def _check(self, model_config: Any, engine_config: Any) -> None:
        """Refuse what cannot be trained, and read the geometry."""
        super()._check(model_config, engine_config)
        self._section, self._rule = read_geometry(engine_config.geometry)

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        """Draw the adapters from the seed; verl draws them from whatever came before."""
        with torch.random.fork_rng():
            torch.manual_seed(self.engine_config.seed)
            return super()._build_lora_module(module)

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        """Install the geometry on the whole model, with its adapters, before it is sharded."""
        if not self.engine_config.forward_only:
            self.isopo = install_geometry(self._section, module, self.engine_config.seed)
        return super()._build_fsdp_module(module)

    # -- an optimizer step -------------------------------------------------------------------------

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        """Train on a mini-batch; ISOPO's diagnostics are among the metrics."""
        outputs = super().train_batch(data, loss_function)
        outputs["metrics"] |= {f"geometry_{key}": [value] for key, value in self._measured.items()}
        return outputs

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False
    ) -> Any:
        """Run a mini-batch's micro-batches, in training each with its sequences known."""
        if forward_only or self.isopo is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        data[KEY] = (self.rank << 32) + torch.arange(len(data))
        if "uid" in data.keys():  # noqa: SIM118 (a TensorDict iterates over rows)
            data[GROUP] = numbered(list(tu.get(data, "uid")))
        terms = split_terms(loss_function)
        try:
            while self.isopo.needs_past:  # its gradients are zero
                with self.isopo.measuring():
                    policy_alone = replace(terms, has_others=False)
                    super().forward_backward_batch(data, policy_alone, forward_only=False)
                    self._open.close()
            return super().forward_backward_batch(data, terms, forward_only=False)
        finally:
            self._open.close()

    def optimizer_step(self) -> float:
        """Step the optimizer, and end ISOPO's step after it."""
        grad_norm = super().optimizer_step()
        if self.isopo is None:
            return grad_norm
        if math.isfinite(grad_norm):
            self._measured = self.isopo.step()
        else:  # verl skipped the step and goes on: nothing of it is kept
            self._measured = {}
            with suppress(ProxstepError):
                self.isopo.step()
        return grad_norm

    # -- a micro-batch -----------------------------------------------------------------------------

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Any, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return what verl back-propagates: in training, the sum of log-probabilities.

        Entropy and KL terms have a forward and a backward of their own, on which ISOPO is off:
        under activation checkpointing, backward runs the forward again. The microbatch stays open
        until its backward has ended, which the next one, or the end of the mini-batch, tells.
        """
        self._open.close()
        if forward_only or self.isopo is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        terms: Terms = loss_function
        micro_batch = micro_batch.to(get_device_id())
        response_BR = token_grid.response_mask_of(micro_batch)
        counted_B = response_BR.any(dim=1)
        self._check_counted(counted_B)
        other: dict[str, Any] = {"loss": 0.0, "metrics": {}}
        if terms.has_others:
            with self.isopo.off():
                loss, other = super().forward_step(micro_batch, terms.others, False)
                loss.backward()
            tu.assign_non_tensor(micro_batch, calculate_entropy=False)
        values = [0.0]
        if counted_B.any():
            microbatch = self._enter(micro_batch, response_BR, counted_B)
            act = self._acting(terms, microbatch, response_BR, counted_B, values)
        else:  # all of it is padding: the policy term is exactly zero
            self._open.enter_context(self.isopo.off())
            act = terms.nothing
        total, output = super().forward_step(micro_batch, act, False)
        output["loss"] = values[-1] + other["loss"]
        output["metrics"] = other["metrics"] | output["metrics"]
        return total, output

    def _acting(
        self,
        terms: Terms,
        microbatch: Microbatch,
        response_BR: Bool[Tensor, "batch response"],
        counted_B: Bool[Tensor, " batch"],
        values: list[float],
    ) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
        """Return the loss function that hands the policy term's coefficients to the microbatch.

        It appends the term's value to `values`.
        """

        def act(model_output: Any, data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
            found = policy_coefficients(terms.policy, model_output, data, response_BR, dp_group)
            coefficient_B, value, metrics = found
            microbatch.set_coefficients(coefficient_B[counted_B])
            values.append(value.item())
            log_prob_BR = no_padding_2_padding(model_output["log_probs"], data)
            return microbatch.objective(log_prob_BR, response_BR), metrics

        return act

    def _enter(
        self,
        micro_batch: TensorDict,
        response_BR: Bool[Tensor, "batch response"],
        counted_B: Bool[Tensor, " batch"],
    ) -> Microbatch:
        """Open the microbatch of the sequences that have a response token."""
        assert self.isopo is not None
        length_B = micro_batch["input_ids"].offsets().diff()
        id_N = token_grid.sequence_ids(length_B, counted_B)
        completion_N = token_grid.completion_tokens(micro_batch, response_BR, len(id_N))
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", True):
            pad_size = self._get_packed_pad_size(len(id_N))
            ids, completion = (
                token_grid.packed(id_N, -1, pad_size),
                token_grid.packed(completion_N, False, pad_size),
            )
        else:
            ids, completion = (
                token_grid.padded(id_N, -1, length_B),
                token_grid.padded(completion_N, False, length_B),
            )
        return self._open.enter_context(
            self.isopo.microbatch(
                ids,
                torch.zeros(int(counted_B.sum()), device=ids.device),
                completion,
                groups=self._groups(micro_batch, counted_B),
                sequence_keys=micro_batch[KEY][counted_B],
            )
        )

    def _groups(self, micro_batch: TensorDict, counted_B: Tensor) -> Tensor | None:
        """Return each sequence's prompt, where verl says which it is.

        Raises:
            ProxstepError: If the rule needs it and verl does not.
        """
        if GROUP in micro_batch.keys():  # noqa: SIM118
            return micro_batch[GROUP][counted_B]
        if isinstance(self._rule, NaturalRule) and self._rule.interact == "group":
            raise ProxstepError(
                "actor_rollout_ref.actor.geometry.interact=group needs the batch's uid, which this "
                "trainer of verl does not hand to its workers: use interact=microbatch"
            )
        return None

    def _check_counted(self, counted_B: Tensor) -> None:
        """Refuse a micro-batch of padding where every rank must have a sample to share.

        Raises:
            ProxstepError: On all ranks, if one of them has none.
        """
        if self._section.overlap_source != "ranks":
            return
        least = counted_B.any().long()
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.get_data_parallel_group())
        if not least:
            raise ProxstepError(
                "actor_rollout_ref.actor.geometry.overlap_source=ranks: a rank's micro-batch has "
                "no response token: use microbatch or previous_step"
            )

    # -- checkpoints -------------------------------------------------------------------------------

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save ISOPO's state beside the optimizer's, in one file: all ranks have the same."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.isopo is None or local_path is None:
            return
        if self.checkpoint_manager.should_save_optimizer and self.rank == 0:
            torch.save(self.isopo.state_dict(), Path(local_path) / STATE_FILE)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Continue from a checkpoint's state of ISOPO; without one, with new trailing means."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if self.isopo is None or local_path is None:
            return
        if not self.checkpoint_manager.should_load_optimizer:
            return
        found = [_read_state(local_path) if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            logger.warning(
                "ISOPO: %s is not in %s; its trailing means start again", STATE_FILE, local_path
            )
            return
        state = torch.load(io.BytesIO(found[0]), map_location=get_device_name(), weights_only=True)
        self.isopo.load_state_dict(state)


def _read_state(folder: str) -> bytes | None:
    place = f"{folder}/{STATE_FILE}"
    path = Path(copy_to_local(place) if is_non_local(folder) else place)
    return path.read_bytes() if path.exists() else None

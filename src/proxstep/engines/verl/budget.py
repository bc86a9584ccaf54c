"""verl's FSDP2 engine with a KL budget for its optimizer's steps.

verl's worker hands its engine a mini-batch, and the engine makes the optimizer, runs forward and
backward, and steps: all that a budget needs is there. The step is judged by some of the mini-batch,
which verl's own inference scores.

Legend for shape suffixes: B sequences, J judges, R response tokens.
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, NamedTuple

import torch
from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

from proxstep.budget import KlBudget
from proxstep.budget.prediction import judges
from proxstep.engines.verl.actor_config import BUDGET_BACKEND, BudgetActorConfig
from proxstep.engines.verl.refusals import refuse_engine
from proxstep.engines.verl.seams import LIBRARY
from proxstep.engines.verl.token_grid import response_mask_of
from proxstep.errors import ProxstepError
from proxstep.training.judging import with_budget
from proxstep.typing import Bool, Int, Tensor

logger = logging.getLogger(__name__)


class Judged(NamedTuple):
    """The sequences that judge a step.

    Attributes:
        data: A part of verl's mini-batch.
        count: How many of its sequences, the first ones, have a say.
    """

    data: TensorDict
    count: int


class BudgetEngine(FSDPEngineWithLMHead):
    """FSDPEngineWithLMHead whose optimizer is a `KlBudget` around verl's own.

    A reference policy, and an actor without a budget, are an ordinary FSDP2 engine.
    """

    backend: ClassVar[str] = BUDGET_BACKEND
    actor_class: ClassVar[type] = BudgetActorConfig

    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        if not engine_config.forward_only:
            self._check(model_config, engine_config)
        object.__setattr__(engine_config, "strategy", "fsdp2")  # as verl itself sets it
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self._judged: Judged | None = None
        self._taken = 0

    def _check(self, model_config: Any, engine_config: Any) -> None:
        """Refuse what cannot be trained.

        Raises:
            ProxstepError: If an option does not fit, or the configuration is of another class.
        """
        if not isinstance(engine_config, self.actor_class.engine_class):
            target = f"{LIBRARY}.{self.actor_class.__name__}"
            raise ProxstepError(
                f"actor_rollout_ref.actor.strategy={self.backend} needs its configuration class: "
                f"set actor_rollout_ref.actor._target_={target}"
            )
        isopo, budget = self.backend != BUDGET_BACKEND, engine_config.budget is not None
        refuse_engine(model_config, engine_config, isopo=isopo, budget=budget)

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Put the budget around verl's optimizer, before its schedule is made."""
        optimizer = super()._build_optimizer(module)
        section = self.engine_config.budget
        if section is None:
            return optimizer
        return with_budget(section, optimizer, module, logger.warning, self._log_probs)

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        """Train on a mini-batch; what the step was is among the metrics."""
        optimizer = self.optimizer
        if not isinstance(optimizer, KlBudget):
            return super().train_batch(data, loss_function)
        self._share_rollout(optimizer, tu.get_non_tensor_data(data, "update_lr_scheduler", None))
        self._judged = self._choose(data)
        outputs = super().train_batch(data, loss_function)
        self._judged = None
        if math.isfinite(outputs["metrics"]["grad_norm"]):  # else verl skipped the step
            outputs["metrics"] |= {f"kl_budget_{k}": [x] for k, x in optimizer.measured.items()}
        return outputs

    def _share_rollout(self, optimizer: KlBudget, is_last: bool | None) -> None:
        """Let a rollout's steps share its budget.

        Args:
            optimizer: The engine's.
            is_last: Whether the step is its rollout's last; None where verl does not say.

        Raises:
            ProxstepError: If there are more or fewer steps than was said.
        """
        number = self.engine_config.num_updates
        if self._taken == 0:
            optimizer.begin_rollout(number)
        self._taken += 1
        if is_last is not None and is_last != (self._taken == number):
            more = "more" if self._taken == number else f"{self._taken}"
            raise ProxstepError(
                f"actor_rollout_ref.actor.kl_num_updates is {number}, but a rollout gave {more} "
                "optimizer steps, which share its KL budget: set it to data.train_batch_size / "
                "ppo_mini_batch_size * ppo_epochs"
            )
        self._taken %= number

    def _choose(self, data: TensorDict) -> Judged:
        """Return the judges of a mini-batch's step: this rank's, spread over its sequences."""
        given = self.engine_config.budget.kl_num_sequences
        own = None if given is None else math.ceil(given / self.get_data_parallel_size())
        row_J, count = judging_rows(response_mask_of(data), len(judges(len(data), own)))
        part = tu.index_select_tensor_dict(data, row_J)
        size = tu.get_non_tensor_data(data, "micro_batch_size_per_gpu", 1)
        size = max(number for number in range(1, size + 1) if len(row_J) % number == 0)
        tu.assign_non_tensor(part, micro_batch_size_per_gpu=size, calculate_entropy=False)
        return Judged(part, count)

    def _log_probs(self) -> tuple[Tensor, Tensor]:
        """Score the judges with the model as it is, at the sampling temperature."""
        assert self._judged is not None
        data, count = self._judged
        log_prob = self.infer_batch(data)["model_output"]["log_probs"]
        log_prob_JR = no_padding_2_padding(log_prob, data)[:count].float()
        return log_prob_JR, response_mask_of(data)[:count].to(log_prob_JR.device)


def judging_rows(
    response_BR: Bool[Tensor, "batch response"], number: int
) -> tuple[Int[Tensor, " judges"], int]:
    """Return which sequences are scored, and how many of them, the first ones, judge.

    verl pads batches with sequences that have no token that counts, and these have no say; yet all
    ranks score as many, since FSDP runs their forward passes together.

    Args:
        response_BR: Where the mini-batch's response tokens count.
        number: How many are scored.

    >>> judging_rows(torch.tensor([[True], [False], [True]]), 3)
    (tensor([0, 2, 0]), 2)
    """
    counted_C = response_BR.any(dim=1).nonzero().flatten().cpu()
    row_J = counted_C[judges(len(counted_C), number)]
    return torch.cat([row_J, row_J.new_zeros(number - len(row_J))]), len(row_J)

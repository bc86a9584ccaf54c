"""A KL budget for the steps of TRL's trainers: who judges a step, and what is logged of it.

TRL steps its optimizer itself, so the budget gets its function beforehand. A step is judged by some
completions of the microbatches that it was made of, which are remembered until it is over.

Shapes: B sequences, C those with a token that counts, J judges, T completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from proxstep.budget import KlBudget
from proxstep.budget.prediction import judges
from proxstep.engines.trl.scoring import response_mask
from proxstep.errors import ProxstepError
from proxstep.typing import Tensor

Score = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""From some of a microbatch's sequences to their tokens' log-probabilities, (batch, tokens), and
which of these count."""


class StepBudget:
    """A trainer's KL budget.

    Attributes:
        optimizer: The trainer's optimizer with the budget, once there is one.

    Args:
        args: A `PolicyConfig`, with `kl_budget`.
        score: Scores sequences with the model as it is, at the sampling temperature.
        log: Called with each step's metrics.
    """

    def __init__(
        self,
        args: Any,
        score: Score,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        self._args, self._score, self._log = args, score, log
        self._microbatches: list[Mapping[str, Tensor]] = []
        self.optimizer: KlBudget | None = None

    def around(self, optimizer: torch.optim.Optimizer, model: Any) -> KlBudget:
        """Return an optimizer with the budget."""
        self.optimizer = KlBudget(
            optimizer,
            model,
            self._args.kl_budget,
            per=self._args.kl_budget_per,
            control=self._args.kl_control,
            log_probs=self._log_probs,
        )
        return self.optimizer

    def begin_rollout(self) -> None:
        """Let the optimizer steps of a rollout share its budget."""
        args = self._args
        microbatches = args.steps_per_generation * args.num_iterations
        if self.optimizer is not None:
            self.optimizer.begin_rollout(math.ceil(microbatches / args.gradient_accumulation_steps))

    def remember(self, microbatch: Mapping[str, Tensor]) -> None:
        """Keep a microbatch of the step that is being made."""
        if "pixel_values" in microbatch:
            raise ProxstepError(
                "kl_budget judges a step by some of its completions, and images are not cut by "
                "completions here: leave kl_budget out"
            )
        self._microbatches.append(microbatch)

    def end_step(self) -> None:
        """Forget the step's microbatches, and log what it was."""
        self._microbatches.clear()
        if self.optimizer is not None:
            self._log({f"kl_budget/{k}": x for k, x in self.optimizer.measured.items()})

    def _log_probs(self) -> tuple[Tensor, Tensor]:
        """Score the step's judges: sequences spread evenly over its microbatches.

        Those that TRL masks because they were cut off have no say.
        """
        counted_B = torch.cat([response_mask(b).any(dim=1).cpu() for b in self._microbatches])
        row_C = counted_B.nonzero().flatten() if counted_B.any() else torch.arange(len(counted_B))
        row_J = row_C[judges(len(row_C), self._args.kl_num_sequences)]
        found, first = [], 0
        for batch in self._microbatches:
            size = len(batch["completion_ids"])
            own_J = row_J[(row_J >= first) & (row_J < first + size)] - first
            first += size
            if len(own_J):
                part = {k: v[own_J.to(v.device)] for k, v in batch.items() if _is_of_rows(v, size)}
                found.append(self._score(part))
        width = max(log_prob_BT.shape[1] for log_prob_BT, _ in found)  # rollouts differ in it
        log_prob_BT, response_BT = (
            torch.cat([pad(value, (0, width - value.shape[1])) for value in values])
            for values in zip(*found, strict=True)
        )
        return log_prob_BT, response_BT


def _is_of_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size

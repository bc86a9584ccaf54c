"""A recipe's KL budget: which completions judge an optimizer step, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from proxstep.budget import KlBudget
from proxstep.budget.prediction import LogProbs, judges
from proxstep.config.recipe import Recipe
from proxstep.config.sections import UpdateSection
from proxstep.training.batch import Batch
from proxstep.training.rollout import Cut, completion_log_probs
from proxstep.typing import Tensor


def with_budget(
    section: UpdateSection,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    note: Callable[[str], None],
    log_probs: LogProbs | None = None,
) -> KlBudget:
    """Return an optimizer with a recipe's budget; `log_probs` where a host steps by itself."""
    assert section.kl_budget is not None
    return KlBudget(
        optimizer,
        model,
        section.kl_budget,
        per=section.kl_budget_per,
        control=section.kl_control,
        note=note,
        log_probs=log_probs,
    )


def judged(recipe: Recipe, model: nn.Module, minibatch: Batch) -> LogProbs:
    """Return the function that scores the completions which judge a minibatch's step.

    Completions that teach nothing are among them. They are scored without autocast, whose rounding
    errors would be larger than what is measured.
    """
    row_B = judges(len(minibatch), recipe.update.kl_num_sequences)
    completions = minibatch.rows(row_B).trimmed().completions
    response_BT = completions.response_BT[:, 1:]
    settings = (recipe.rollout.temperature, Cut.of(recipe.update), recipe.model.head)

    def log_probs() -> tuple[Tensor, Tensor]:
        return completion_log_probs(model, completions, *settings), response_BT

    return log_probs

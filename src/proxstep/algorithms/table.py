"""The table of objectives: what the trainer, the engines and the composition with ISOPO look up."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxstep.algorithms.aggregate import Aggregation
from proxstep.algorithms.checks import check_choice
from proxstep.algorithms.cispo import cispo
from proxstep.algorithms.dro import dro
from proxstep.algorithms.grpo import dapo, grpo
from proxstep.algorithms.gspo import gspo
from proxstep.algorithms.opo import opo
from proxstep.algorithms.reinforce import reinforce
from proxstep.typing import Tensor


@dataclass(frozen=True)
class Objective:
    """An objective and what its users must know of it.

    Objectives may share a loss: `rloo` is `reinforce`, and `dr-grpo` is `grpo` aggregated in its
    own way, each with its paper's advantage as the default in its recipe section.

    Attributes:
        name: The name in recipes.
        loss: (log_probs, old_log_probs, advantages, response_mask, *, hyper-parameters,
            aggregation) -> (scalar loss, per-sequence metrics). Its keyword defaults are the only
            place where defaults stand.
        level: "sequence" if the loss depends on each sequence through log pi(y_b) alone, so that
            every token of it has the same gradient; "token" otherwise. Only the former composes
            with ISOPO.

    Raises:
        ProxstepError: The level is unknown.
    """

    name: str
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    level: str

    def __post_init__(self) -> None:
        check_choice("level", self.level, ("token", "sequence"))

    @property
    def default_loss_agg_mode(self) -> str:
        """The aggregation's mode when none is given."""
        return self._keywords()["aggregation"].mode

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The loss's keyword arguments other than the aggregation, with their defaults."""
        keywords = self._keywords()
        return {name: keywords[name] for name in keywords if name != "aggregation"}

    def _keywords(self) -> dict[str, Any]:
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


# arXiv 2503.20783, section 3.2: a sum over tokens, over a constant, takes the length bias away.
_DR_GRPO = partial(grpo, aggregation=Aggregation("seq-mean-token-sum-norm"))

LOSSES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("reinforce", reinforce, "sequence"),
        Objective("grpo", grpo, "token"),
        Objective("dapo", dapo, "token"),
        Objective("gspo", gspo, "sequence"),
        Objective("cispo", cispo, "token"),
        Objective("dro", dro, "token"),
        Objective("opo", opo, "sequence"),
        Objective("dr-grpo", _DR_GRPO, "token"),
        Objective("rloo", reinforce, "sequence"),
    )
}


def find_objective(name: str) -> Objective:
    """Return the objective of that name.

    Raises:
        ProxstepError: There is none; the message names the nearest.

    >>> find_objective("gspo").default_loss_agg_mode
    'seq-mean-token-mean'
    """
    check_choice("objective", name, LOSSES)
    return LOSSES[name]

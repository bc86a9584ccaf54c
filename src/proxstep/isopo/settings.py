"""What an `Isopo` and its microbatches are told: the rule, the settings, the sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from proxstep.algorithms.aggregate import as_integers, as_tensor
from proxstep.errors import ProxstepError
from proxstep.isopo.plan import Needs
from proxstep.isopo.proma import IntraProjectingRule, ProjectingRule
from proxstep.isopo.rule import IsometricRule, NaturalRule
from proxstep.typing import Float, Int, Tensor

Rule = IsometricRule | NaturalRule | ProjectingRule | IntraProjectingRule
"""What `Isopo` takes beside a preset's name."""

PRESETS: dict[str, Rule] = {
    "reinforce": IsometricRule(0.0, 0.0, 0.0),
    "isopo": IsometricRule(-1.0, 0.0, 0.0),
    "isopo-npg": IsometricRule(0.0, 0.0, -2.0),
    "isopo-figure4": IsometricRule(0.0, -1.0, -2.0),
    "isopo-euclidean": IsometricRule(0.0, -1.0, 0.0),
    "isopo-natural": NaturalRule(),
    "proma": ProjectingRule(),
    "proma-intra": IntraProjectingRule(),
}
"""ISOPO's settings in the paper, and PROMA's two rules; "reinforce" is the identity."""

Fisher = Literal["positions", "sequences"]
Denominator = Literal["sample", "trailing"]


def as_rule(rule: str | Rule) -> Rule:
    """Return a rule, or the preset of a name.

    Raises:
        ProxstepError: If it is neither.
    """
    if not isinstance(rule, str):
        if not isinstance(rule, get_args(Rule)):
            raise ProxstepError(f"rule must be a preset's name or a rule, got {rule!r}")
        return rule
    if rule not in PRESETS:
        raise ProxstepError(f"rule {rule!r} is not a preset; choose one of {', '.join(PRESETS)}")
    return PRESETS[rule]


@dataclass(frozen=True)
class Settings:
    """What holds for all microbatches; see `Isopo` for the meaning."""

    rule: Rule
    fisher: Fisher = "positions"
    fisher_denominator: Denominator = "sample"
    only_linear: bool = False

    @property
    def needs(self) -> Needs:
        """The statistics that the weights are made of."""
        needs = self.rule.needs
        if needs.fisher and self.fisher == "sequences":
            return replace(needs, fisher=False, ntk=True)
        return needs


@dataclass(frozen=True)
class Sequences:
    """What is known of a microbatch's sequences.

    Attributes:
        coefficient_B: Each one's coefficient.
        group_B: Each one's group, where groups were given.
        fisher_sq: F_b^2 by parameter use, where the caller knows them better than an estimate.
    """

    coefficient_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"] | None
    fisher_sq: Mapping[str, Float[Tensor, " batch"]]

    @classmethod
    def of(cls, coefficients: Any, groups: Any, fisher_squares: Any, like: Tensor) -> Sequences:
        """Return a microbatch's arguments, checked.

        Raises:
            ProxstepError: If they are not one number per sequence.
        """
        coefficient_B = check_coefficients(coefficients, like)
        if groups is not None:
            groups = as_integers("groups", groups, like)
            if groups.shape != coefficient_B.shape:
                raise ProxstepError(
                    f"groups must be {len(coefficient_B)} numbers, one per sequence"
                )
        given = {}
        if not isinstance(fisher_squares, Mapping | None):
            raise ProxstepError("fisher_squares must be a dictionary, by parameter use")
        for key, square in (fisher_squares or {}).items():
            given[key] = as_tensor(f"fisher_squares[{key!r}]", square, coefficient_B)
            if given[key].shape != coefficient_B.shape or not bool(
                (given[key].isfinite() & (given[key] >= 0)).all()
            ):
                raise ProxstepError(
                    f"fisher_squares[{key!r}] must be {len(coefficient_B)} finite numbers, 0 or "
                    "more, one per sequence"
                )
        return cls(coefficient_B, groups, given)


def check_coefficients(coefficients: Any, like: Tensor, count: int | None = None) -> Tensor:
    """Return the coefficients as a tensor without a graph.

    Raises:
        ProxstepError: Unless they are one finite number per sequence.
    """
    found = as_tensor("coefficients", coefficients, like).detach()
    fits = found.dim() == 1 and count in (None, len(found)) and found.dtype != torch.bool
    found = found if found.is_floating_point() else found.to(torch.get_default_dtype())
    if not fits:
        raise ProxstepError(
            f"coefficients must be one number per sequence, ({'batch' if count is None else count}"
            f",): got shape {tuple(found.shape)}"
        )
    if not torch.isfinite(found).all():
        raise ProxstepError("coefficients must be one finite number per sequence")
    return found

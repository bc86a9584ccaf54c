"""The rules that exactness is tested with: as the library takes them, and as the oracle does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.isopo.grids import Position
from tests.oracle import Formula, isopo_gradient
from torch import Tensor

from proxstep.isopo import PRESETS, IsometricRule, NaturalRule, Rule

Gradients = dict[str, Tensor]
Means = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One rule with its options.

    Attributes:
        rule: As the library takes it.
        formula: As the oracle does; None for Fisher norms from the sequences' gradients.
        options: Of `Isopo`.
    """

    rule: str | Rule
    formula: Formula | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def looks_back(self) -> bool:
        """Whether the second step depends on the first."""
        rule = PRESETS[self.rule] if isinstance(self.rule, str) else self.rule
        return bool(rule.averages)

    @property
    def num_lengths(self) -> float:
        """How many lengths are factors of a weight, counting powers."""
        if self.formula is None:
            return 2.0  # F_b of the kernel's entries, which have two lengths each
        return sum(abs(power) for power in self.formula.powers or ())

    def expected(
        self,
        per_sequence: list[Gradients],
        sampled: list[Position],
        coefficients: list[float],
        trailing: Means | None,
    ) -> tuple[Gradients, Means]:
        """The gradient of every parameter use and its means of squares, by the oracle."""
        if self.formula is not None:
            return isopo_gradient(per_sequence, sampled, coefficients, self.formula, trailing)
        return _by_sequences(per_sequence, coefficients), {}


def _by_sequences(per_sequence: list[Gradients], coefficients: list[float]) -> Gradients:
    """F_b^2 = (1 / B) sum_c <G_b, G_c>^2, equation 2, and weights coefficient_b / F_b."""
    total = {}
    for key in per_sequence[0]:
        whole = [sequence[key].sum(0) for sequence in per_sequence]
        total[key] = 0
        for gradient, coefficient in zip(whole, coefficients, strict=True):
            square = sum(float((gradient * other).sum()) ** 2 for other in whole) / len(whole)
            total[key] = total[key] - coefficient * (square + 1e-8) ** -0.5 * gradient
    return total


RULES: dict[str, Case] = {
    "reinforce": Case("reinforce", Formula((0, 0, 0))),
    "isopo": Case("isopo", Formula((-1, 0, 0))),
    "isopo-npg": Case("isopo-npg", Formula((0, 0, -2))),
    "isopo-figure4": Case("isopo-figure4", Formula((0, -1, -2))),
    "isopo-euclidean": Case("isopo-euclidean", Formula((0, -1, 0))),
    "isopo-natural": Case("isopo-natural", Formula(None, damping=1.0)),
    "all-positions": Case("isopo", Formula((-1, 0, 0)), {"num_overlap_positions": None}),
    "sequences": Case("isopo", None, {"fisher": "sequences"}),
    "all-powers-damped": Case(
        IsometricRule(-0.5, -1.5, 0.7, damping=2.0), Formula((-0.5, -1.5, 0.7), damping=2.0)
    ),
    "relative": Case(
        IsometricRule(-1.0, damping=0.5, damping_form="relative"),
        Formula((-1, 0, 0), damping=0.5, relative=True),
    ),
    "preserved": Case(
        IsometricRule(-1.0, 0.0, -2.0, damping=0.1, scale="preserved"),
        Formula((-1, 0, -2), damping=0.1, preserved=True),
    ),
    "natural-relative": Case(
        NaturalRule(0.3, damping_form="relative"), Formula(None, damping=0.3, relative=True)
    ),
    "natural-preserved": Case(
        NaturalRule(3.0, scale="preserved"), Formula(None, damping=3.0, preserved=True)
    ),
}

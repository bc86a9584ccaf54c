"""Where a backward pass's position-wise gradients go: into a microbatch's rule, or a plain sum.

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

import torch

from proxstep.errors import ProxstepError
from proxstep.isopo.layers import (
    ALL,
    Layout,
    OuterGradients,
    PositionGradients,
    fisher_squares,
    norm_squares,
    ntk,
)
from proxstep.isopo.trailing import TrailingMeans
from proxstep.isopo.weights import (
    IsometricRule,
    NaturalRule,
    Rule,
    isometric_moments,
    isometric_weights,
    natural_weights,
)
from proxstep.types import Float, Tensor


class Microbatch:
    """One microbatch's layout and coefficients, and what becomes of its gradients.

    Args:
        layout: Which position belongs to which sequence.
        coefficient_B: One coefficient per sequence.
        rule: What turns coefficients into weights.
        trailing: Averages over earlier optimizer steps; this microbatch is added to them.
        diagnostics: Values to average over layers, by name; this microbatch's are appended.
        only_linear: Give everything but linear layers' weights the plain policy gradient.
    """

    def __init__(
        self,
        layout: Layout,
        coefficient_B: Float[Tensor, " batch"],
        rule: Rule,
        trailing: TrailingMeans,
        diagnostics: dict[str, list[Tensor]],
        *,
        only_linear: bool,
    ) -> None:
        self.layout = layout
        self.reduced: set[str] = set()
        self._coefficient_B, self._rule, self._trailing = coefficient_B, rule, trailing
        self._diagnostics, self._only_linear = diagnostics, only_linear

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of the token grid, (rows, columns)."""
        return self.layout.grid

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to the positions that belong to a sequence.

        Raises:
            ProxstepError: If the layer saw another number of positions than sequence_ids has.
        """
        flat = value.reshape(-1, value.shape[-1])
        expected = self.grid[0] * self.grid[1]
        if flat.shape[0] != expected:
            raise ProxstepError(
                f"{key} saw {flat.shape[0]} token positions, but sequence_ids has {expected} "
                f"({self.grid[0]} x {self.grid[1]}): turn off logits_to_keep and fused heads, and "
                "run the forward inside isopo.microbatch(...)"
            )
        return flat if len(self.layout.position_T) == expected else flat[self.layout.position_T]

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the parameter's gradient, -sum_b weight_b G_b.

        Raises:
            ProxstepError: If the parameter's use was reduced before in this microbatch.
        """
        if key in self.reduced:
            raise ProxstepError(
                f"{key} was back-propagated twice in one microbatch: a sequence's gradient must "
                "arrive whole; use one forward and one backward per isopo.microbatch(...)"
            )
        self.reduced.add(key)
        weight_B = self._weights(key, gradients)
        return gradients.contract(-weight_B[self.layout.sequence_T])

    def _weights(self, key: str, gradients: PositionGradients) -> Tensor:
        if self._only_linear and not isinstance(gradients, OuterGradients):
            return self._coefficient_B
        if isinstance(self._rule, IsometricRule):
            return self._isometric(key, gradients, self._rule)
        return self._natural(key, gradients, self._rule)

    def _isometric(self, key: str, gradients: PositionGradients, rule: IsometricRule) -> Tensor:
        fisher_B = norm_B = None
        if rule.needs_fisher:
            fisher_B, filled_B = fisher_squares(gradients, self.layout)
            self._note("frac_filled_fisher", filled_B.float().mean())
        if rule.needs_norm:
            norm_B = norm_squares(gradients, self.layout)
        moments = isometric_moments(fisher_B, norm_B)
        ones_B = torch.ones_like(self._coefficient_B)
        scale_B = isometric_weights(ones_B, moments, rule, self._trailing.of(key))
        self._trailing.add(key, moments)
        self._note("weight_spread", scale_B.std(correction=0) / scale_B.mean())
        return self._coefficient_B * scale_B

    def _natural(self, key: str, gradients: PositionGradients, rule: NaturalRule) -> Tensor:
        # Small, and a matter of small eigenvalues: in double precision where there is one.
        wide = torch.float32 if self._coefficient_B.device.type == "mps" else torch.float64
        ntk_BB = ntk(gradients, self.layout).to(wide)
        trailing = self._trailing.of(key)
        weight_B = natural_weights(self._coefficient_B.to(wide), ntk_BB, rule, trailing)
        self._trailing.add(key, {"eigenvalue": ntk_BB.diagonal()})
        total = ntk_BB.abs().sum()
        share = ntk_BB.diagonal().sum() / torch.where(total > 0, total, 1.0)
        self._note("ntk_off_diagonal", 1 - share)
        return weight_B

    def _note(self, name: str, value: Tensor) -> None:
        self._diagnostics.setdefault(name, []).append(value.detach())


class PlainSum:
    """The sink of a backward inside `off()` whose forward ran outside: the ordinary gradient."""

    grid = None

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to all positions."""
        del key
        return value.reshape(-1, value.shape[-1])

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the sum over positions."""
        del key
        return gradients.contract(torch.ones_like(gradients.squares(ALL)))

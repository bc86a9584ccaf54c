"""What one parameter's reduction measured in one microbatch: the raw material of diagnostics.

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class LayerRecord:
    """One parameter's statistics over the sequences of one microbatch.

    Attributes:
        coefficient_B: Each sequence's coefficient, as handed to `Isopo.microbatch`.
        weight_B: What the rule made of it: the gradient is -sum_b weight_b G_b.
        fisher_sq_B: F_b^2, where it was estimated.
        filled_B: Which of the estimates were exactly zero and were filled in with the mean.
        norm_sq_B: |G_b|^2, where it was measured.
        ntk_BB: K_bc = <G_b, G_c>, where it was measured.
        group_B: Each sequence's group (its prompt), where groups were given.
    """

    coefficient_B: Float[Tensor, " batch"]
    weight_B: Float[Tensor, " batch"]
    fisher_sq_B: Float[Tensor, " batch"] | None = None
    filled_B: Bool[Tensor, " batch"] | None = None
    norm_sq_B: Float[Tensor, " batch"] | None = None
    ntk_BB: Float[Tensor, "batch batch"] | None = None
    group_B: Int[Tensor, " batch"] | None = None

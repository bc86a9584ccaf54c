"""What one parameter's reduction measured in one microbatch: the raw material of diagnostics.

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

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
        ntk_BB: K_bc = <G_b, G_c>, where it was measured and kept.
        group_B: Each sequence's group (its prompt), where groups were given.
        moments: What the trailing means average, by name.
        report: What the rule says of itself: "scale", by which an isometric one multiplied the
            coefficients, "off_diagonal", the share of |K| off the diagonal in a natural one.
        length_B: Each sequence's number of positions, prompt and completion, where it is kept.
    """

    coefficient_B: Float[Tensor, " batch"]
    weight_B: Float[Tensor, " batch"]
    fisher_sq_B: Float[Tensor, " batch"] | None = None
    filled_B: Bool[Tensor, " batch"] | None = None
    norm_sq_B: Float[Tensor, " batch"] | None = None
    ntk_BB: Float[Tensor, "batch batch"] | None = None
    group_B: Int[Tensor, " batch"] | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Tensor] = field(default_factory=dict)
    length_B: Int[Tensor, " batch"] | None = None


def joined(parts: Sequence[LayerRecord]) -> LayerRecord:
    """Return one record of sequences that were measured in parts, without a kernel."""

    def join(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return {key: join([value[key] for value in values if key in value]) for key in first}
        return torch.cat(values) if isinstance(first, Tensor) else first

    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(LayerRecord)]
    return LayerRecord(**{name: join([getattr(part, name) for part in parts]) for name in names})

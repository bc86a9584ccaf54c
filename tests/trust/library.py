"""A model of two layers and a norm, its microbatch, and what the oracle says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from proxstep import Isopo
from tests import oracle

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 2]])
IDS = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, -1]])
MASK = IDS[:, 1:] >= 0
COEFFICIENTS = torch.tensor([0.5, -0.25], dtype=torch.float64)
FORMULAS = {
    "reinforce": oracle.Formula((0, 0, 0)),
    "isopo": oracle.Formula((-1, 0, 0), preserved=True),
    "isopo-npg": oracle.Formula((0, 0, -2), preserved=True),
    "isopo-figure4": oracle.Formula((0, -1, -2), preserved=True),
    "isopo-euclidean": oracle.Formula((0, -1, 0), preserved=True),
    "isopo-natural": oracle.Formula(None, damping=1.0, preserved=True),
    "proma": oracle.Formula((0, 0, 0)),  # of the first microbatch
}
"""The presets that the oracle knows."""


class Tiny(nn.Module):
    """A policy."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table, self.norm, self.head = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11)
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values.to(dtype)

    def forward(self, input_ids: Tensor) -> Any:
        """Sum what came before: a token's log-probability depends on all earlier ones."""
        return SimpleNamespace(logits=self.head(self.norm(self.table(input_ids).cumsum(1).tanh())))


def log_probs(model: nn.Module, token: Tensor = TOKENS) -> Tensor:
    logits = model(input_ids=token).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, token[:, 1:, None]).squeeze(-1)


@dataclass
class World:
    """A model with ISOPO on it."""

    rule: Any = "isopo"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.model = Tiny(self.dtype)
        self.isopo = Isopo(
            self.model, self.rule, **({"overlap_source": "microbatch"} | self.options)
        )

    def backward(self, ids: Any = IDS, coefficients: Any = COEFFICIENTS, **more: Any) -> None:
        """The right way."""
        with self.isopo.microbatch(ids, coefficients, **more) as microbatch:
            microbatch.objective(log_probs(self.model), MASK).backward()

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in self.model.named_parameters()}

    def is_right(self, factor: float = 1.0) -> bool:
        """Whether the gradient is the oracle's."""
        wanted = expected(self.rule)
        for name, found in self.gradients().items():
            if found is None or not found.isfinite().all():
                return False
            if (found - factor * wanted[name]).norm() > 1e-9 * wanted[name].norm():
                return False
        return True


def expected(rule: str, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The oracle's gradient of the usual microbatch."""
    model = Tiny() if model is None else model
    rows = [row[ids >= 0].tolist() for row, ids in zip(TOKENS, IDS, strict=True)]
    each = [oracle.position_gradients(model, oracle.Sequence(row, 1)) for row in rows]
    sampled = [(b, t) for b, row in enumerate(rows) for t in range(len(row))]
    per_use, _ = oracle.isopo_gradient(each, sampled, COEFFICIENTS.tolist(), FORMULAS[rule])
    return per_use

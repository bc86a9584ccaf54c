"""The recipe's section of the optimizer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from proxstep.config.sections import Section, Share, default_of

_ADAMW = {name: default_of(torch.optim.AdamW, name) for name in ("betas", "eps")}


class OptimizerSection(Section):
    """The optimizer; null keys are the optimizer's own default."""

    name: Literal["adamw", "sgd", "muon", "soap", "kron"] = Field(
        default="adamw",
        description="adamw and sgd: torch's. muon: torch's, orthogonalized momentum, for the "
        "weights of hidden linear layers (of LoRA's adapters too); adamw for embeddings, output "
        "layer, norms and biases. soap: Adam in the eigenbasis of Shampoo's preconditioner (arXiv "
        "2409.11321); the first update only fills the preconditioner. kron: PSGD with Kronecker "
        "factors, the nearest to K-FAC. soap and kron are pytorch-optimizer's.",
    )
    learning_rate: float = Field(default=1e-6, gt=0, le=1e4, description="Peak learning rate.")
    muon_learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1e4,
        description="muon: peak learning rate of its matrices, in the units of adamw's (a step's "
        "RMS is 0.2 times it); null for learning_rate.",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay; decoupled, except sgd's."
    )
    betas: list[Share] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description=f"Decay of the moments in adamw (null for {_ADAMW['betas']}), muon's adamw "
        "and soap.",
    )
    eps: float | None = Field(
        default=None,
        gt=0,
        description=f"Numerical guard of adamw (null for {_ADAMW['eps']}), muon's adamw and soap.",
    )
    momentum: Share | None = Field(
        default=None, description="Momentum of sgd (null for none), muon and kron."
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Norm at which the gradient is clipped; null for never."
    )
    warmup_updates: int = Field(
        default=0, ge=0, description="Linear warm-up of the learning rate, in optimizer steps."
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="What the learning rate does after the warm-up: stay, or fall to min_lr_rate "
        "times the peak at the run's last optimizer step; each step that is skipped leaves it that "
        "much higher. TRL's name.",
    )
    min_lr_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Lowest learning rate of linear and cosine, as a share of the peak.",
    )

    def options(self) -> dict[str, Any]:
        """Return what is set of the optimizer's own options; what is null is left out.

        Raises:
            ValueError: If one of another optimizer is set.
        """
        given = {key: getattr(self, key) for key in _OPTIMIZER_KEYS}
        given = {key: value for key, value in given.items() if value is not None}
        own = OPTIMIZER_OPTIONS[self.name]
        foreign = sorted(set(given) - set(own))
        if foreign:
            raise ValueError(
                f"optimizer.{foreign[0]} is not an option of {self.name}, which has "
                f"{' and '.join(own)}: leave it null"
            )
        return given


OPTIMIZER_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps"),
    "sgd": ("momentum",),
    "muon": ("muon_learning_rate", "momentum", "betas", "eps"),
    "soap": ("betas", "eps"),
    "kron": ("momentum",),
}
"""Which keys of `OptimizerSection` are options of which optimizer."""
_OPTIMIZER_KEYS = ("muon_learning_rate", "betas", "eps", "momentum")

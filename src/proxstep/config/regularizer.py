"""The regularizer's section of a recipe."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field

from proxstep.config.sections import Section


class RegularizerSection(Section):
    """An entropy bonus, and a penalty for leaving the initial policy, on the sampled completions.

    In the loss they are added to the objective, and no geometry transforms them.
    """

    entropy_coef: float = Field(
        default=0.0,
        ge=0,
        description="Subtracts this times the policy's entropy, in nats per completion token (mean "
        "over the optimizer step), exact over the vocabulary. verl's entropy_coeff.",
    )
    kl_coef: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Weight of a penalty on KL(policy || initial), per nat; above 0 the run keeps "
        "a copy of the initial weights, except with LoRA. TRL's beta, verl's kl_loss_coef.",
    )
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = Field(
        default="exact",
        description="exact over the vocabulary, or from the sampled tokens alone. In the loss use "
        "exact or k2, whose expected gradients are that of KL(policy || initial); k3, TRL's and "
        "verl's, descends KL(initial || policy), k1 nothing in expectation. In the reward use k1.",
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss",
        description="loss: a mean over the optimizer step's completion tokens is added to the "
        "loss. reward: each completion's sum is subtracted from its reward before the advantages "
        "(verl's use_kl_in_reward); not with exact, which does not depend on the sampled token.",
    )

    @cached_property
    def in_loss(self) -> bool:
        """Whether anything is added to the loss."""
        return self.entropy_coef > 0 or (self.kl_coef > 0 and self.kl_in == "loss")

    @cached_property
    def in_reward(self) -> bool:
        """Whether anything is subtracted from the reward."""
        return self.kl_coef > 0 and self.kl_in == "reward"

    @cached_property
    def needs_logits(self) -> bool:
        """Whether log-probabilities of the sampled tokens do not suffice."""
        exact_kl = self.kl_coef > 0 and self.kl_estimator == "exact"
        return self.entropy_coef > 0 or exact_kl

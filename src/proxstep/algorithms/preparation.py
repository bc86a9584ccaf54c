"""From a rollout's advantages to what the loss takes, once for all updates of the rollout.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proxstep.algorithms.importance import importance_weights, sampler_mismatch
from proxstep.logprobs.tokens import masked_mean
from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class OldPolicy:
    """The policy before a rollout's first update, as the rollout's completions see it.

    Attributes:
        log_prob_BT: Its log-probabilities of the tokens from the second on, in nats.
        response_BT: True at completion tokens, aligned with them.
        vocabulary_size: Of the policy.
        sampler_log_prob_BT: The log-probabilities with which the tokens were drawn, or None where
            nobody kept them.
    """

    log_prob_BT: Float[Tensor, "batch tokens"]
    response_BT: Bool[Tensor, "batch tokens"]
    vocabulary_size: int
    sampler_log_prob_BT: Float[Tensor, "batch tokens"] | None = None

    def importance(self, cap: float) -> tuple[Float[Tensor, " batch"], dict[str, float]]:
        """Return the truncated importance weights against the sampler, and what they are like.

        Args:
            cap: Where they are truncated.
        """
        assert self.sampler_log_prob_BT is not None  # rollout.importance_cap keeps them
        weight_B, metrics = importance_weights(
            self.log_prob_BT, self.sampler_log_prob_BT, self.response_BT, cap=cap
        )
        return weight_B.cpu(), metrics

    def mismatch(self) -> dict[str, float]:
        """Return how far it is from the sampler; nothing where nobody kept the sampler's."""
        if self.sampler_log_prob_BT is None:
            return {}
        return sampler_mismatch(self.log_prob_BT, self.sampler_log_prob_BT, self.response_BT)


@dataclass(frozen=True)
class SignalInputs:
    """What an algorithm's preparation sees of a rollout.

    Attributes:
        advantage_B: One advantage per sequence.
        group_B: Each sequence's prompt.
        old_policy: Where the algorithm reads it, else perhaps None.
        importance_B: Truncated importance weights, where the recipe has them.
    """

    advantage_B: Float[Tensor, " batch"]
    group_B: Int[Tensor, " batch"]
    old_policy: OldPolicy | None = None
    importance_B: Float[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class Signal:
    """What an algorithm makes of a rollout's advantages.

    Attributes:
        value_B: What the loss takes as its advantages.
        importance_B: Weight of each sequence's loss, or None for 1.
        hyper: Keys of the loss that follow from the rollout; they take the place of the recipe's.
        metrics: What was measured.
    """

    value_B: Float[Tensor, " batch"]
    importance_B: Float[Tensor, " batch"] | None = None
    hyper: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def mean_log_probs(inputs: SignalInputs) -> Float[Tensor, " batch"]:
    """Return log pi_k(y_b) / length_b, in nats per token; 0 for an empty completion."""
    old = inputs.old_policy
    assert old is not None  # the algorithm's reads_old_policy
    return masked_mean(old.log_prob_BT, old.response_BT).cpu()

"""An algorithm of one's own: its loss, its keys, and their registration.

    proxstep train arithmetic --external_lib examples/my_objective.py --algorithm hinge

It is REINFORCE that stops pushing a sequence whose log-probability has moved by `margin` nats in
the direction of its advantage. Each sequence has one gradient, so that ISOPO can have it too:
`--algorithm isopo+hinge`. The signature declares the keys with their types and defaults; the
declaration says what they are. Recipes, --help of a mistake, compare and the report follow.
"""

from __future__ import annotations

from proxstep.algorithms import SEQ_MEAN_TOKEN_MEAN, Aggregation, Algorithm, Key, register
from proxstep.algorithms.aggregate import LossAndMetrics, aggregate_sequences
from proxstep.logprobs.tokens import masked_sum
from proxstep.typing import Bool, Float, Tensor


def hinge(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    *,
    margin: float = 0.5,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_MEAN,
) -> LossAndMetrics:
    """Return L = mean_b -min(A_b Delta_b, |A_b| margin), and metrics of each sequence.

    Delta_b is the sum of a sequence's log-ratios, in nats.
    """
    log_ratio = masked_sum(log_probs - old_log_probs.detach(), response_mask)
    gain = advantages.detach() * log_ratio
    most = advantages.detach().abs() * margin
    loss = aggregate_sequences(-gain.minimum(most), response_mask, aggregation)
    return loss, {"beyond_margin": (gain > most).to(log_probs)}


register(
    Algorithm(
        "hinge",
        hinge,
        level="sequence",  # "token" where the tokens of a sequence have different gradients
        about="REINFORCE up to a margin in nats.",
        keys={"margin": Key("Nats after which a sequence is no longer pushed.", gt=0)},
    )
)

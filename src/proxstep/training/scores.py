"""What a policy gives to completions: log-probabilities and entropies, with or without all logits.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from proxstep.logprobs.logits import entropy, token_log_probs
from proxstep.training.output_layer import completion_log_probs_chunked
from proxstep.training.rollout import Completions, response_logits
from proxstep.typing import Float

Head = Literal["full", "chunked"]


@dataclass(frozen=True)
class Scores:
    """Of the tokens from the second position on; only the completions' count.

    Attributes:
        log_prob_BT: In nats, with their graph.
        entropy_BT: Of the policy at each position, in nats, without gradient; None if not asked.
        logits_BTV: Over the temperature; None with the chunked head.
    """

    log_prob_BT: Float[torch.Tensor, "batch last"]
    entropy_BT: Float[torch.Tensor, "batch last"] | None = None
    logits_BTV: Float[torch.Tensor, "batch last vocab"] | None = None


def score(
    model: nn.Module,
    completions: Completions,
    temperature: float,
    head: Head = "full",
    *,
    with_entropy: bool = False,
) -> Scores:
    """Return a policy's log-probabilities of completions.

    Args:
        model: The policy.
        completions: The completions, with their prompts.
        temperature: Divides the logits.
        head: "full" computes the logits of all positions at once. "chunked" computes those of
            completion positions, some at a time, and again in backward.
        with_entropy: Measure the entropies too.
    """
    token_BT = completions.token_BT
    if head == "chunked":
        masks = (completions.attention_BT, completions.response_BT)
        if not with_entropy:
            return Scores(completion_log_probs_chunked(model, token_BT, *masks, temperature))
        return Scores(
            *completion_log_probs_chunked(model, token_BT, *masks, temperature, with_entropy=True)
        )
    logits_BTV = response_logits(model, completions, temperature)
    entropy_BT = None
    if with_entropy:
        with torch.no_grad():
            entropy_BT = entropy(logits_BTV)
    return Scores(token_log_probs(logits_BTV, token_BT[:, 1:]), entropy_BT, logits_BTV)

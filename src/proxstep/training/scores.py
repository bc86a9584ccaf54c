"""What a policy, or the initial one, gives to completions: log-probabilities, entropies, logits.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from proxstep.logprobs.tokens import entropy, token_log_probs
from proxstep.training.output_layer import completion_log_probs_chunked
from proxstep.training.rollout import Completions, evaluating, response_logits
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
        return Scores(
            *completion_log_probs_chunked(
                model, token_BT, *masks, temperature, with_entropy=with_entropy
            )
        )
    logits_BTV = response_logits(model, completions, temperature)
    entropy_BT = None
    if with_entropy:
        with torch.no_grad():
            entropy_BT = entropy(logits_BTV)
    return Scores(token_log_probs(logits_BTV, token_BT[:, 1:]), entropy_BT, logits_BTV)


@torch.no_grad()
def completion_log_probs(
    model: nn.Module,
    completions: Completions,
    temperature: float,
    batch_size: int,
    head: Head = "full",
) -> Float[torch.Tensor, "batch tokens"]:
    """Return log pi of the tokens from the second position on, `batch_size` rows at a time."""
    with evaluating(model):
        parts = [
            score(model, completions.rows(rows), temperature, head).log_prob_BT
            for rows in torch.arange(len(completions)).split(batch_size)
        ]
    return torch.cat(parts)


@contextmanager
def initial_policy(model: nn.Module, initial: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the initial policy, without gradients: `initial`, or the model without its adapters."""
    with torch.no_grad():
        if initial is not None:
            yield initial
            return
        with evaluating(model), model.disable_adapter():  # type: ignore[operator]
            yield model

"""How the next token is chosen from a policy's logits.

Legend for shape suffixes: B sequences, N those still in the batch, V vocabulary, K blocks of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import widest_dtype
from proxstep.typing import Float, Int, Tensor

_BLOCK = 256
"""Tokens of the vocabulary that are added up before one of them is drawn."""


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from the logits; the fields are `sample`'s."""

    temperature: float
    top_p: float
    top_k: int
    greedy: bool
    with_log_probs: bool

    @cached_property
    def _warpers(self) -> list[Any]:
        return warpers(self.temperature, self.top_p, self.top_k)

    def noise(self, num_rows: int, limit: int, device: torch.device) -> Float[Tensor, "batch new"]:
        """Return a uniform number for every token to draw; of greedy sampling, nothing's worth.

        A row's tokens follow from its own numbers, whatever becomes of the other rows.
        """
        if self.greedy:
            return torch.zeros(num_rows, limit, device=device)
        return torch.rand(num_rows, limit, dtype=widest_dtype(device), device=device)

    def choose(
        self, logits_NV: Float[Tensor, "rows vocab"], uniform_N: Float[Tensor, " rows"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"] | None]:
        """Return a token for each row, and its log-probability if asked for.

        Raises:
            ProxstepError: If the probabilities are not finite.
        """
        if self.greedy:
            return logits_NV.argmax(-1), None
        for warper in self._warpers:
            logits_NV = warper(None, logits_NV)
        prob_NV = logits_NV.softmax(-1)
        if prob_NV[:, 0].isnan().any():  # one bad logit makes its whole row so
            raise ProxstepError(
                "the policy's probabilities are not finite, so it cannot be sampled: its weights "
                "have diverged. Lower optimizer.learning_rate, and begin again or from an older "
                "checkpoint"
            )
        token_N = categorical(prob_NV, uniform_N)
        if not self.with_log_probs:
            return token_N, None
        log_prob_NV = logits_NV.log_softmax(-1)
        return token_N, log_prob_NV.gather(1, token_N[:, None]).squeeze(1)


def warpers(temperature: float, top_p: float, top_k: int) -> list[Any]:
    """Return what transformers' generate itself would make of the options, in its order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made: list[Any] = []
    if temperature != 1.0:
        made.append(TemperatureLogitsWarper(temperature))
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))
    return made


def categorical(
    prob_NV: Float[Tensor, "rows vocab"], uniform_N: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """Return the token at which the cumulative probability exceeds a uniform number.

    In two steps, a block of the vocabulary and a token in it: cumulative sums of all tokens would
    be slow in float64, and lose rare tokens in float32. A token of probability 0 is never drawn.

    >>> probability = torch.tensor([[0.25, 0.0, 0.75], [0.25, 0.0, 0.75]])
    >>> categorical(probability, torch.tensor([0.2, 0.3])).tolist()
    [0, 2]

    Differs: torch.multinomial draws an exponential number for each row and token, which takes 25
    times longer where the vocabulary has 49,152 tokens.
    """
    row_N = torch.arange(len(prob_NV), device=prob_NV.device)
    if missing := -prob_NV.shape[1] % _BLOCK:
        prob_NV = nn.functional.pad(prob_NV, (0, missing))
    part_NKV = prob_NV.unflatten(1, (-1, _BLOCK))
    total_NK = part_NKV.sum(-1).to(uniform_N.dtype).cumsum(-1)
    target_N = uniform_N * total_NK[:, -1]
    block_N = _passes(total_NK, target_N)
    target_N = target_N - (total_NK[row_N, block_N] - part_NKV[row_N, block_N].sum(-1))
    inside_NV = part_NKV[row_N, block_N].to(uniform_N.dtype).cumsum(-1)
    return block_N * _BLOCK + _passes(inside_NV, target_N)


def _passes(total_NK: Tensor, target_N: Tensor) -> Tensor:
    """Return the first place at which a cumulative sum exceeds the target, or reaches its end."""
    end_N = total_NK[:, -1]
    target_N = target_N.clamp(max=torch.nextafter(end_N, torch.zeros_like(end_N)))
    return torch.searchsorted(total_NK, target_N[:, None], right=True).squeeze(1)

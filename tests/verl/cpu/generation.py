"""Batched generation with transformers' `generate`, where each request has noise of its own.

A request's completion depends on its seed and the weights, not on what it is batched with, up to
the rounding of the logits: which requests meet in a batch is a matter of timing.

Legend for shape suffixes: B requests, T token positions, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxstep.errors import ProxstepError
from proxstep.training.next_token import warpers


@dataclass(frozen=True)
class Sampling:
    """How to draw a completion.

    Attributes:
        max_new_tokens: Longest completion, in tokens.
        temperature: 0 for the most likely token.
        top_p: Nucleus; 1 for none.
        top_k: 0 for none.
        ignore_eos: Go on after an end token.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    ignore_eos: bool


@dataclass(frozen=True)
class Request:
    """A prompt, how to complete it, and the seed of its noise."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Completion:
    """A completion, end token included, and the log-probabilities it was drawn with, in nats.

    They are those after temperature, top_k and top_p, as verl's `processed_logprobs`.
    """

    token_ids: list[int]
    log_probs: list[float]


@torch.no_grad()
def complete(
    model: Any, requests: Sequence[Request], pad_token: int, end_tokens: Sequence[int]
) -> list[Completion]:
    """Complete every request, those that are sampled alike in one batch.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        requests: In any order, of any lengths.
        pad_token: Fills the prompts up on the left.
        end_tokens: Each ends a completion.

    Returns:
        The completions in the order of the requests.

    Raises:
        ProxstepError: If the policy's probabilities are not finite.
    """
    alike: dict[Sampling, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        alike[request.sampling].append(i)
    found: dict[int, Completion] = {}
    for sampling, indices in alike.items():
        batch = [requests[i] for i in indices]
        ends = [] if sampling.ignore_eos else list(end_tokens)
        found |= zip(indices, _complete_alike(model, batch, pad_token, ends), strict=True)
    return [found[i] for i in range(len(requests))]


def _complete_alike(
    model: Any, requests: Sequence[Request], pad_token: int, end_tokens: list[int]
) -> list[Completion]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(request.prompt_ids) for request in requests)
    token_BT = torch.full((len(requests), width), pad_token)
    attention_BT = torch.zeros_like(token_BT)
    for row, request in enumerate(requests):
        token_BT[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        attention_BT[row, width - len(request.prompt_ids) :] = 1
    sampling = requests[0].sampling
    drawer = _Drawer(sampling, [request.seed for request in requests])
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # the drawer draws, and leaves one token to take
        pad_token_id=pad_token,
        eos_token_id=end_tokens or None,
    )
    out_BT = model.generate(
        input_ids=token_BT,
        attention_mask=attention_BT,
        generation_config=config,
        logits_processor=LogitsProcessorList([drawer]),
    )
    log_prob_BT = torch.stack(drawer.log_probs, dim=1)
    return [
        _until_end(tokens, log_probs, end_tokens)
        for tokens, log_probs in zip(out_BT[:, width:].tolist(), log_prob_BT.tolist(), strict=True)
    ]


def _until_end(tokens: list[int], log_probs: list[float], end_tokens: list[int]) -> Completion:
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    length = ends[0] + 1 if ends else len(tokens)
    return Completion(tokens[:length], log_probs[:length])


class _Drawer:
    """The last logits processor: draws each row's token by the inverse of its distribution.

    Args:
        sampling: The rows' common options.
        seeds: One per row; a row's uniform numbers are drawn from it alone.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.log_probs: list[Tensor] = []
        self._greedy = sampling.temperature == 0
        options = (sampling.temperature, sampling.top_p, sampling.top_k)
        self._warpers = [] if self._greedy else warpers(*options)
        self._uniform_BT = torch.stack(
            [
                torch.rand(
                    sampling.max_new_tokens,
                    generator=torch.Generator().manual_seed(seed),
                    dtype=torch.float64,
                )
                for seed in seeds
            ]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave the drawn token alone."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        log_prob_BV = scores.double().log_softmax(-1)
        token_B1 = self._draw(log_prob_BV)
        self.log_probs.append(log_prob_BV.gather(1, token_B1).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)

    def _draw(self, log_prob_BV: Tensor) -> Tensor:
        if not log_prob_BV.logsumexp(-1).isfinite().all():
            raise ProxstepError(
                "the policy's probabilities are not finite, so it cannot be sampled: its weights "
                "have diverged. Lower actor_rollout_ref.actor.optim.lr"
            )
        if self._greedy:
            return log_prob_BV.argmax(-1, keepdim=True)
        below_BV = log_prob_BV.exp().cumsum(-1)
        column = len(self.log_probs)
        point_B1 = self._uniform_BT[:, column : column + 1] * below_BV[:, -1:]
        return torch.searchsorted(below_BV, point_B1, right=True)

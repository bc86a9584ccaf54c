"""A policy samples completions of prompts.

Legend for shape suffixes: B sequences, T token positions of prompt and completion together, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.training.rollout import Completions, evaluating
from proxstep.typing import Tensor


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    with_log_probs: bool = False,
) -> Completions:
    """Sample one completion for each prompt with transformers' generate.

    Args:
        model: The policy; it is put into evaluation mode, and left in the mode that it was in.
        tokenizer: For the padding and end tokens.
        prompts: Token ids of each prompt; repeat a prompt to get several completions.
        max_new_tokens: Longest completion, in tokens.
        temperature: Of the sampling.
        top_p: Nucleus; 1 for none.
        top_k: 0 for none.
        greedy: Take the most likely token instead of sampling.
        with_log_probs: Keep the log-probabilities with which the tokens were drawn, after
            temperature, top_k and top_p. For sampling; the samples are the same.

    Returns:
        The completions on the model's device, in the order of the prompts.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    device = next(model.parameters()).device
    pad, ends = tokenizer.pad_token_id, end_tokens(model, tokenizer)
    width = max(len(prompt) for prompt in prompts)
    token = torch.full((len(prompts), width), pad)
    attention = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        token[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    chosen: dict[str, Any] = {"do_sample": False}
    if not greedy:
        chosen = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    processors: list[Any] = []
    recorder = _Recorder()
    if with_log_probs:  # generate's own processors come after those that it is given
        processors = [*_warpers(temperature, top_p, top_k), recorder]
        chosen |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, **chosen
    )
    with evaluating(model), _own_defaults_off(model), _finite_probabilities():
        out = model.generate(  # type: ignore[operator]
            input_ids=token.to(device),
            attention_mask=attention.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    completions = _completions(out, attention.to(device).bool(), ends)
    if not with_log_probs:
        return completions
    return replace(completions, sampler_log_prob_BT=recorder.log_probs(completions))


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every token that ends a completion: the tokenizer's and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})


def _warpers(temperature: float, top_p: float, top_k: int) -> list[Any]:
    """Return what generate itself would make of the three options, in its order."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made: list[Any] = []
    if temperature != 1.0:
        made.append(TemperatureLogitsWarper(temperature))
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))
    return made


class _Recorder:
    """The last logits processor: keeps the log-probability of each token that is then drawn.

    It holds one step's scores at a time; generate's own output_scores holds those of all steps,
    completion tokens times vocabulary.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._column = 0
        self._log_probs: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take a step's scores, and look up what was drawn from those of the step before."""
        self._look_up(input_ids)
        self._scores, self._column = scores, input_ids.shape[1]
        return scores

    def log_probs(self, completions: Completions) -> Tensor:
        """Return them for the tokens from the second position on, 0 outside the completions."""
        token_BT, response_BT = completions.token_BT, completions.response_BT[:, 1:]
        self._look_up(token_BT)
        log_prob_BT = torch.zeros(response_BT.shape, device=token_BT.device)
        for column, log_prob_B in self._log_probs.items():
            log_prob_BT[:, column - 1] = log_prob_B
        return log_prob_BT.masked_fill(~response_BT, 0.0)

    def _look_up(self, token_BT: Tensor) -> None:
        column = self._column
        if self._scores is not None and column < token_BT.shape[1]:
            log_prob_BV = self._scores.log_softmax(-1)
            chosen_B1 = log_prob_BV.gather(1, token_BT[:, column : column + 1])
            self._log_probs[column] = chosen_B1.squeeze(1)


def _completions(out: Tensor, prompt_attention: Tensor, ends: list[int]) -> Completions:
    width = prompt_attention.shape[1]
    new = out[:, width:]
    is_end = torch.isin(new, torch.tensor(ends, device=new.device))
    ended_before = is_end.cumsum(dim=1) - is_end.long() > 0
    response = ~ended_before
    return Completions(
        out,
        torch.cat([prompt_attention, response], dim=1),
        torch.cat([torch.zeros_like(prompt_attention), response], dim=1),
        ~is_end.any(dim=1),
    )


@contextmanager
def _finite_probabilities() -> Iterator[None]:
    """Explain torch's error for probabilities that are not finite."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise ProxstepError(
            "the policy's probabilities are not finite, so it cannot be sampled: its weights have "
            "diverged. Lower optimizer.learning_rate, and begin again or from an older checkpoint"
        ) from None


@contextmanager
def _own_defaults_off(model: nn.Module) -> Iterator[None]:
    """Generate without a hub model's own defaults (top_k, penalties)."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own  # type: ignore[assignment]

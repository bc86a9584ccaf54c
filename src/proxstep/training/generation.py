"""A policy samples completions of prompts.

A prompt is read once for all of its completions, and rows that have ended leave the batch while
others go on. The caches are those of transformers.

Legend for shape suffixes: B sequences, P different prompts, N sequences still in the batch, T token
positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.logprobs.evaluating import evaluating
from proxstep.training.next_token import Choice
from proxstep.training.rollout import Completions
from proxstep.typing import Bool, Float, Int, Tensor

_log = logging.getLogger(__name__)

_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""The layers of transformers' caches whose rows can be repeated and selected."""

_COMPACT_SHARE = 8
"""Ended rows leave the batch when they are this share of it: that costs a copy of the cache."""


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
    stop: Sequence[str] = (),
) -> Completions:
    """Sample one completion for each prompt.

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
            temperature, top_k and top_p. For sampling; the samples are the same. A cache and a
            forward pass over whole sequences round differently, so the old policy's are computed,
            and not taken from here.
        stop: Texts that end a completion; the token that completes one is the last.

    Returns:
        The completions on the model's device, in the order of the prompts.

    Raises:
        ProxstepError: If the policy's probabilities are not finite.
    """
    device = next(model.parameters()).device
    unique = {
        tuple(prompt): number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))
    }
    source_B = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=device)
    token_PT, attention_PT = padded(list(unique), tokenizer.pad_token_id, device)
    choice = Choice(temperature, top_p, top_k, greedy, with_log_probs)
    ending = _Ending(tokenizer, end_tokens(model, tokenizer), tuple(stop), max_new_tokens)
    with evaluating(model):
        decoder = _Decoder(model)
        logits_PV = decoder.read(token_PT, attention_PT, max_new_tokens)
        if (reason := decoder.unrepeatable()) is None:
            drawn = _decode(decoder, logits_PV, source_B, choice, ending)
        else:
            _tell(model, reason)
            del decoder, logits_PV
            drawn = _generate(model, token_PT[source_B], attention_PT[source_B], choice, ending)
    return drawn.after(token_PT[source_B], attention_PT[source_B].bool())


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every token that ends a completion: the tokenizer's and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})


def padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompts and their attention mask, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    token = torch.full((len(prompts), width), pad)
    attention = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        token[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    return token.to(device), attention.to(device)


@dataclass(frozen=True)
class _Ending:
    """When a completion ends.

    Attributes:
        tokenizer: Makes text of tokens.
        tokens: Those that end a completion.
        stop: The texts that do.
        limit: Longest completion, in tokens.
    """

    tokenizer: Any
    tokens: list[int]
    stop: tuple[str, ...]
    limit: int

    def is_end(self, token: Tensor) -> Tensor:
        """Whether tokens are end tokens."""
        return torch.isin(token, torch.tensor(self.tokens, device=token.device))

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether the last of a completion's tokens completes a stop text.

        A text of so many bytes has at most as many tokens; some more make up for what decoders do
        to the first ones.
        """
        window = 4 + max(len(text.encode()) for text in self.stop)
        text = self.tokenizer.decode(tokens[-window:])
        return any(stop in text for stop in self.stop)

    def length(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Return how many of the tokens a completion has, and whether it ended there."""
        for count in range(1, len(tokens) + 1):
            if tokens[count - 1] in self.tokens or (self.stop and self.stops(tokens[:count])):
                return count, True
        return len(tokens), False


@dataclass(frozen=True)
class Drawn:
    """Completions without their prompts, padded on the right.

    Attributes:
        token_BT: The tokens.
        length_B: Each completion's length in tokens, end token included.
        ended_B: False where it was cut off.
        log_prob_BT: Log-probabilities with which the tokens were drawn; None if not asked for.
    """

    token_BT: Int[Tensor, "batch tokens"]
    length_B: Int[Tensor, " batch"]
    ended_B: Bool[Tensor, " batch"]
    log_prob_BT: Float[Tensor, "batch tokens"] | None

    def after(self, prompt_BT: Tensor, attention_BT: Tensor) -> Completions:
        """Return the completions with their prompts before them."""
        column_T = torch.arange(self.token_BT.shape[1], device=prompt_BT.device)
        response_BT = column_T < self.length_B[:, None]
        log_prob_BT = self.log_prob_BT
        if log_prob_BT is not None:
            log_prob_BT = log_prob_BT.masked_fill(~response_BT, 0.0)
            log_prob_BT = nn.functional.pad(log_prob_BT, (prompt_BT.shape[1] - 1, 0))
        return Completions(
            torch.cat([prompt_BT, self.token_BT], dim=1),
            torch.cat([attention_BT, response_BT], dim=1),
            torch.cat([torch.zeros_like(attention_BT), response_BT], dim=1),
            ~self.ended_B,
            log_prob_BT,
        )


class _Decoder:
    """A model that reads prompts, then one token after another of each row in its batch."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._cache_name = model, ""
        self._cache: Any = None
        base: Any = getattr(model, "get_base_model", lambda: model)()
        options = inspect.signature(base.forward).parameters
        kinds = {option.kind for option in options.values()}
        self._takes_position = "position_ids" in options or inspect.Parameter.VAR_KEYWORD in kinds
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in options else {}

    def read(self, token_PT: Tensor, attention_PT: Tensor, room: int) -> Tensor:
        """Read prompts; return the logits after them. `room` is for tokens to come."""
        position_PT = (attention_PT.cumsum(dim=1) - 1).clamp(min=0)
        self._width = token_PT.shape[1]
        self._attention = nn.functional.pad(attention_PT, (0, room), value=1)
        self._position = position_PT[:, -1:]
        return self._forward(token_PT, position_PT)

    def unrepeatable(self) -> str | None:
        """Return why the rows of the cache cannot be repeated and selected; None if they can."""
        if self._cache is None:
            return "it hands back no cache"
        for layer in getattr(self._cache, "layers", [self._cache]):
            kind = type(layer)
            if kind.__name__ not in _LAYERS or kind.__module__ != "transformers.cache_utils":
                return f"it keeps a {kind.__name__}"
        return None

    def select(self, index: Int[Tensor, " rows"]) -> None:
        """Go on with these rows, some left out or repeated."""
        self._cache.batch_select_indices(index)
        self._attention, self._position = self._attention[index], self._position[index]

    def step(self, token_N: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Read one more token of every row; return the logits after it."""
        self._width += 1
        self._position = self._position + 1
        return self._forward(token_N[:, None], self._position)

    def _forward(self, token: Tensor, position: Tensor) -> Tensor:
        given = {} if self._cache is None else {self._cache_name: self._cache}
        if self._takes_position:
            given["position_ids"] = position
        out = self._model(
            input_ids=token,
            attention_mask=self._attention[:, : self._width],
            use_cache=True,
            **given,
            **self._options,
        )
        # The argument has the field's name: past_key_values, and cache in later versions.
        self._cache_name = "cache" if "cache" in out else "past_key_values"
        self._cache = out.get(self._cache_name)
        return out.logits[:, -1].float()


def _decode(
    decoder: _Decoder, logits_NV: Tensor, source_B: Tensor, choice: Choice, ending: _Ending
) -> Drawn:
    """Draw completions of prompts that were read; `source_B` says which prompt is each one's."""
    if source_B.tolist() != list(range(len(logits_NV))):
        decoder.select(source_B)
        logits_NV = logits_NV[source_B]
    num_rows, device = len(source_B), source_B.device
    noise_BT = choice.noise(num_rows, ending.limit, device)
    token_BT = torch.full((num_rows, ending.limit), ending.tokenizer.pad_token_id, device=device)
    log_prob_BT = torch.zeros(token_BT.shape, device=device) if choice.with_log_probs else None
    length_B = torch.full((num_rows,), ending.limit, device=device)
    ended_B = torch.zeros(num_rows, dtype=torch.bool, device=device)
    row_N = torch.arange(num_rows, device=device)
    for column in range(ending.limit):
        token_N, drawn_N = choice.choose(logits_NV, noise_BT[row_N, column])
        going_N = ~ended_B[row_N]
        going = row_N[going_N]
        token_BT[going, column] = token_N[going_N]
        if log_prob_BT is not None and drawn_N is not None:
            log_prob_BT[going, column] = drawn_N[going_N]
        now_N = going_N & ending.is_end(token_N)
        if ending.stop:
            for place in (going_N & ~now_N).nonzero().squeeze(1).tolist():
                now_N[place] = ending.stops(token_BT[row_N[place], : column + 1].tolist())
        length_B[row_N[now_N]] = column + 1
        ended_B[row_N[now_N]] = True
        left_N = ~ended_B[row_N]
        left = int(left_N.sum())
        if left == 0 or column + 1 == ending.limit:
            break
        if (len(row_N) - left) * _COMPACT_SHARE >= len(row_N):
            place_N = left_N.nonzero().squeeze(1)
            decoder.select(place_N)
            row_N, token_N = row_N[place_N], token_N[place_N]
        logits_NV = decoder.step(token_N)
    width = int(length_B.max())
    return Drawn(
        token_BT[:, :width],
        length_B,
        ended_B,
        None if log_prob_BT is None else log_prob_BT[:, :width],
    )


def _generate(
    model: Any, prompt_BT: Tensor, attention_BT: Tensor, choice: Choice, ending: _Ending
) -> Drawn:
    """Draw completions with transformers' generate, every row to the last one's end."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    width, drawn_T = prompt_BT.shape[1], []
    noise_BT = choice.noise(len(prompt_BT), ending.limit, prompt_BT.device)

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores in which the token that we choose is the most likely one."""
        token_B, log_prob_B = choice.choose(scores, noise_BT[:, input_ids.shape[1] - width])
        drawn_T.append(log_prob_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)

    def stopped(input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        rows = input_ids[:, width:].tolist()
        return torch.tensor([ending.stops(row) for row in rows], device=input_ids.device)

    config = GenerationConfig(
        max_new_tokens=ending.limit,
        pad_token_id=ending.tokenizer.pad_token_id,
        eos_token_id=ending.tokens,
        do_sample=False,
    )
    with _own_defaults_off(model):
        out_BT = model.generate(
            input_ids=prompt_BT,
            attention_mask=attention_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList([choose]),  # type: ignore[list-item]
            stopping_criteria=StoppingCriteriaList([stopped] if ending.stop else []),
        )
    found = [ending.length(row) for row in out_BT[:, width:].tolist()]
    length_B, ended_B = (
        torch.tensor(each, device=out_BT.device) for each in zip(*found, strict=True)
    )
    log_prob_BT = torch.stack(drawn_T, dim=1) if choice.with_log_probs else None
    return Drawn(out_BT[:, width:], length_B, ended_B, log_prob_BT)


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


def _tell(model: nn.Module, reason: str) -> None:
    """Say once why a model is sampled by generate."""
    if reason not in _told:
        _told.add(reason)
        _log.warning(
            "%s is sampled with transformers' generate, which takes longer: %s",
            type(model).__name__,
            reason,
        )


_told: set[str] = set()

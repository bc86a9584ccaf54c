"""Prompts with their completions, and the log-probabilities that a policy gives them.

Legend for shape suffixes: B sequences, T token positions of prompt and completion together, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.logprobs.tokens import entropy, token_log_probs
from proxstep.training.output_layer import completion_log_probs_chunked
from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Completions:
    """Prompts and completions as one left- and right-padded grid.

    Attributes:
        token_BT: Prompt (padded on the left) and completion (padded on the right).
        attention_BT: True at prompt and completion positions.
        response_BT: True at completion positions, the end token included.
        truncated_B: True where the completion was cut off before an end token.
        sampler_log_prob_BT: Log-probabilities with which the completion tokens were drawn, of the
            tokens from the second position on and 0 elsewhere; None if not asked for.
    """

    token_BT: Int[Tensor, "batch tokens"]
    attention_BT: Bool[Tensor, "batch tokens"]
    response_BT: Bool[Tensor, "batch tokens"]
    truncated_B: Bool[Tensor, " batch"]
    sampler_log_prob_BT: Float[Tensor, "batch last"] | None = None

    def __len__(self) -> int:
        return self.token_BT.shape[0]

    def rows(self, index: Tensor) -> Completions:
        """Return the chosen rows."""
        sampler = self.sampler_log_prob_BT
        return Completions(
            self.token_BT[index],
            self.attention_BT[index],
            self.response_BT[index],
            self.truncated_B[index],
            None if sampler is None else sampler[index],
        )

    def columns(self, columns: slice) -> Completions:
        """Return the chosen columns of every row."""
        start, stop, _ = columns.indices(self.token_BT.shape[1])
        sampler = self.sampler_log_prob_BT
        return replace(
            self,
            token_BT=self.token_BT[:, columns],
            attention_BT=self.attention_BT[:, columns],
            response_BT=self.response_BT[:, columns],
            sampler_log_prob_BT=None if sampler is None else sampler[:, start : stop - 1],
        )

    def used_columns(self) -> slice:
        """Return the range of columns outside which every row is padding."""
        used = self.attention_BT.any(dim=0).nonzero().squeeze(1)
        return slice(int(used[0]), int(used[-1]) + 1)

    def sequence_ids(self) -> Int[Tensor, "batch tokens"]:
        """Return each position's row, -1 for padding."""
        row = torch.arange(len(self), device=self.token_BT.device)[:, None]
        return torch.where(self.attention_BT, row, -1)

    def lengths(self) -> Int[Tensor, " batch"]:
        """Return the completions' lengths in tokens, end token included."""
        return self.response_BT.sum(dim=1)

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the completions as text, without special tokens."""
        rows = [
            row[mask].tolist() for row, mask in zip(self.token_BT, self.response_BT, strict=True)
        ]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)


def response_logits(model: nn.Module, completions: Completions, temperature: float) -> Tensor:
    """Return the logits that predict each token from the second on, over the temperature."""
    attention = completions.attention_BT.long()
    position = (attention.cumsum(dim=1) - 1).clamp(min=0)
    out = model(
        input_ids=completions.token_BT,
        attention_mask=attention,
        position_ids=position,
        use_cache=False,
    )
    return out.logits[:, :-1] / temperature


def joined(parts: Sequence[Completions], pad_token: int) -> Completions:
    """Return completions of several batches as one grid, padded to the widest on either side."""
    starts = [int(part.response_BT.any(dim=0).nonzero()[0]) for part in parts]
    ends = [part.token_BT.shape[1] - start for part, start in zip(parts, starts, strict=True)]
    margins = [
        (max(starts) - start, max(ends) - end) for start, end in zip(starts, ends, strict=True)
    ]

    def grid(values: Sequence[Tensor], fill: float) -> Tensor:
        padded = [
            nn.functional.pad(value, margin, value=fill)
            for value, margin in zip(values, margins, strict=True)
        ]
        return torch.cat(padded)

    drawn = [part.sampler_log_prob_BT for part in parts]
    return Completions(
        grid([part.token_BT for part in parts], pad_token),
        grid([part.attention_BT for part in parts], False),
        grid([part.response_BT for part in parts], False),
        torch.cat([part.truncated_B for part in parts]),
        None if drawn[0] is None else grid([d for d in drawn if d is not None], 0.0),
    )


def autocast(recipe: Recipe, model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context in which a recipe's model computes; forward passes alone belong in it."""
    dtype = recipe.model.autocast
    if dtype is None:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, getattr(torch, dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, then each back into its own."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens among which a model of transformers chooses."""
    return model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]


Head = Literal["full", "chunked"]


@dataclass(frozen=True)
class Scores:
    """Of the tokens from the second position on; only the completions' count.

    Attributes:
        log_prob_BT: In nats, with their graph.
        entropy_BT: Of the policy at each position, in nats, without gradient; None if not asked.
        logits_BTV: Over the temperature; None with the chunked head.
    """

    log_prob_BT: Float[Tensor, "batch last"]
    entropy_BT: Float[Tensor, "batch last"] | None = None
    logits_BTV: Float[Tensor, "batch last vocab"] | None = None


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
) -> Float[Tensor, "batch tokens"]:
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

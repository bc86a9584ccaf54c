"""Prompts with their completions, and the log-probabilities that a policy gives them.

Legend for shape suffixes: B sequences, T token positions of prompt and completion together, V
vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.config.sections import UpdateSection
from proxstep.isopo.hooks import owner_of
from proxstep.logprobs.chunked import CHUNK_BYTES
from proxstep.logprobs.completions import sequence_ids
from proxstep.logprobs.evaluating import evaluating
from proxstep.logprobs.tokens import entropy, token_log_probs
from proxstep.training.output_layer import completion_log_probs_chunked, unwrapped
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
        return sequence_ids(self.attention_BT)

    def lengths(self) -> Int[Tensor, " batch"]:
        """Return the completions' lengths in tokens, end token included."""
        return self.response_BT.sum(dim=1)

    def first_column(self) -> int:
        """Return the first column with a completion token, at least 1; the width if none has."""
        used = self.response_BT[:, 1:].any(dim=0).nonzero()
        return int(used[0]) + 1 if len(used) else self.token_BT.shape[1]

    def trimmed(self) -> Completions:
        """Return the same without the columns that are padding in every row."""
        return self.columns(self.used_columns())

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the completions as text, without special tokens."""
        rows = [
            row[mask].tolist() for row, mask in zip(self.token_BT, self.response_BT, strict=True)
        ]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)


def response_logits(
    model: nn.Module, completions: Completions, temperature: float, first: int = 1
) -> Float[Tensor, "batch last vocab"]:
    """Return the logits that predict the tokens from column `first` on, over the temperature.

    The output layer computes no others where the model can leave them out (transformers'
    `logits_to_keep`) and no `Isopo` needs it whole.
    """
    attention, kept = completions.attention_BT.long(), {}
    position = (attention.cumsum(dim=1) - 1).clamp(min=0)
    width = completions.token_BT.shape[1]
    if 1 < first < width and _leaves_logits_out(model):
        kept["logits_to_keep"] = torch.arange(first - 1, width - 1, device=attention.device)
    logits_BTV = model(
        input_ids=completions.token_BT,
        attention_mask=attention,
        position_ids=position,
        use_cache=False,
        **kept,
    ).logits
    if not kept:
        logits_BTV = logits_BTV[:, first - 1 : -1]
    return logits_BTV if temperature == 1.0 else logits_BTV / temperature


def _leaves_logits_out(model: nn.Module) -> bool:
    """Whether a model's forward takes `logits_to_keep`, and no `Isopo` is at work on it."""
    core: Any = unwrapped(model)
    if "logits_to_keep" not in inspect.signature(core.forward).parameters:
        return False
    return all(owner_of(module, borrows=True) is None for module in core.modules())


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


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens among which a model of transformers chooses."""
    return model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]


Head = Literal["full", "chunked"]

SCORED_TOKENS = 4096
"""Positions, padding included, that are scored at a time where a recipe does not say how many."""


@dataclass(frozen=True)
class Cut:
    """How sequences are cut into microbatches; by number where both are given.

    Attributes:
        size: Sequences of a microbatch, in their order.
        tokens: Positions of a microbatch, its padding included, the longest sequences first; one
            that is longer is a microbatch of its own.
    """

    size: int | None = None
    tokens: int | None = SCORED_TOKENS

    @classmethod
    def of(cls, update: UpdateSection) -> Cut:
        """Return how a recipe's scoring is cut: as its update, or by a default of tokens."""
        return cls(update.microbatch_size, update.microbatch_tokens or SCORED_TOKENS)

    def rows(self, completions: Completions) -> list[Int[Tensor, " rows"]]:
        """Return the rows of each microbatch."""
        if self.size is not None:
            return list(torch.arange(len(completions)).split(self.size))
        assert self.tokens is not None
        return rows_by_tokens(completions, self.tokens)

    def parts(self, completions: Completions) -> Iterator[tuple[Tensor, Completions]]:
        """Yield each microbatch's rows and completions, without columns of padding."""
        for rows in self.rows(completions):
            on_device = rows.to(completions.token_BT.device)
            yield on_device, completions.rows(on_device).trimmed()


BY_TOKENS = Cut()
"""How scoring is cut where nobody says it."""


def rows_by_tokens(completions: Completions, tokens: int) -> list[Int[Tensor, " rows"]]:
    """Return rows in microbatches of at most `tokens` positions, the longest sequences first.

    Sequences of like length go together, and equal ones stay in their order. A microbatch is as
    wide as its longest prompt and its longest completion together.
    """
    completion = completions.lengths().tolist()
    whole = completions.attention_BT.sum(dim=1).tolist()
    order = sorted(range(len(whole)), key=lambda row: (-whole[row], -completion[row]))
    parts: list[list[int]] = [[]]
    longest = (0, 0)
    for row in order:
        own = (whole[row] - completion[row], completion[row])
        wider = (max(longest[0], own[0]), max(longest[1], own[1]))
        if parts[-1] and sum(wider) * (len(parts[-1]) + 1) > tokens:
            parts.append([])
            wider = own
        parts[-1].append(row)
        longest = wider
    return [torch.tensor(part) for part in parts]


@dataclass(frozen=True)
class Scores:
    """Of the tokens from the second position on; only the completions' count.

    Attributes:
        log_prob_BT: In nats, with their graph; 0 before the first completion.
        entropy_BT: Of the policy at each position, in nats, without gradient; None if not asked.
        logits_BTV: Over the temperature, of the last columns alone: from the first that has a
            completion token; None with the chunked head.
    """

    log_prob_BT: Float[Tensor, "batch last"]
    entropy_BT: Float[Tensor, "batch last"] | None = None
    logits_BTV: Float[Tensor, "batch kept vocab"] | None = None


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
        head: "full" computes the logits of the completions' columns at once. "chunked" computes
            those of completion positions, some at a time, and again in backward.
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
    first = completions.first_column()
    logits_BTV = response_logits(model, completions, temperature, first)
    entropy_BT = None
    if with_entropy:
        entropy_BT = from_column(by_chunks(entropy, logits_BTV), first)
    log_prob_BT = token_log_probs(logits_BTV, token_BT[:, first:])
    return Scores(from_column(log_prob_BT, first), entropy_BT, logits_BTV)


def from_column(value_BT: Float[Tensor, "batch kept"], first: int) -> Float[Tensor, "batch last"]:
    """Return values of the tokens from column `first` on as values from the second on."""
    return nn.functional.pad(value_BT, (first - 1, 0))


@torch.no_grad()
def by_chunks(
    function: Callable[..., Tensor], *logits_BTV: Float[Tensor, "batch kept vocab"]
) -> Float[Tensor, "batch kept"]:
    """Return a function of each position's logits, without gradient, a chunk at a time."""
    flat = [logits.flatten(0, 1)[None] for logits in logits_BTV]
    size = max(1, CHUNK_BYTES // (4 * flat[0].shape[2]))
    chunks = zip(*(logits.split(size, dim=1) for logits in flat), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks], dim=1).view(logits_BTV[0].shape[:2])


@torch.no_grad()
def completion_log_probs(
    model: nn.Module,
    completions: Completions,
    temperature: float,
    cut: Cut,
    head: Head = "full",
) -> Float[Tensor, "batch last"]:
    """Return log pi of the completions' tokens from the second position on, 0 elsewhere."""
    log_prob_BT, found = None, completions.response_BT[:, 1:]
    with evaluating(model):
        for rows, part in cut.parts(completions):
            part_BT = score(model, part, temperature, head).log_prob_BT
            if log_prob_BT is None:
                log_prob_BT = part_BT.new_zeros(found.shape)
            columns = completions.rows(rows).used_columns()
            log_prob_BT[rows, columns.start : columns.stop - 1] = part_BT
    assert log_prob_BT is not None
    return log_prob_BT.masked_fill(~found, 0.0)


@contextmanager
def initial_policy(model: nn.Module, initial: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the initial policy, without gradients: `initial`, or the model without its adapters."""
    with torch.no_grad():
        if initial is not None:
            yield initial
            return
        with evaluating(model), model.disable_adapter():  # type: ignore[operator]
            yield model

"""Sampling completions, and the tensors that the update needs of them.

Legend for shape suffixes: B sequences, T token positions of prompt and completion together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.types import Bool, Int, Tensor


@dataclass(frozen=True)
class Completions:
    """Prompts and completions as one left- and right-padded grid.

    Attributes:
        token_BT: Prompt (padded on the left) and completion (padded on the right).
        attention_BT: True at prompt and completion positions.
        response_BT: True at completion positions, the end token included.
        truncated_B: True where the completion was cut off before an end token.
    """

    token_BT: Int[Tensor, "batch tokens"]
    attention_BT: Bool[Tensor, "batch tokens"]
    response_BT: Bool[Tensor, "batch tokens"]
    truncated_B: Bool[Tensor, " batch"]

    def __len__(self) -> int:
        return self.token_BT.shape[0]

    def rows(self, index: Tensor) -> Completions:
        """Return the chosen rows."""
        return Completions(
            self.token_BT[index],
            self.attention_BT[index],
            self.response_BT[index],
            self.truncated_B[index],
        )

    def columns(self, columns: slice) -> Completions:
        """Return the chosen columns of every row."""
        return Completions(
            self.token_BT[:, columns],
            self.attention_BT[:, columns],
            self.response_BT[:, columns],
            self.truncated_B,
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

    Returns:
        The completions on the model's device, in the order of the prompts.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad, ends = tokenizer.pad_token_id, end_tokens(model, tokenizer)
    width = max(len(prompt) for prompt in prompts)
    token = torch.full((len(prompts), width), pad)
    attention = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        token[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    chosen = {"do_sample": False}
    if not greedy:
        chosen = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, **chosen
    )
    with _evaluating(model), _finite_probabilities():
        out = model.generate(  # type: ignore[operator]
            input_ids=token.to(device),
            attention_mask=attention.to(device),
            generation_config=config,
        )
    return _completions(out, attention.to(device).bool(), ends)


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every token that ends a completion: the tokenizer's and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *own) if token is not None})


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
    """Say what it means that torch cannot sample."""
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Generate in evaluation mode, without a hub model's own defaults (top_k, penalties)."""
    from transformers import GenerationConfig

    training, own = model.training, getattr(model, "generation_config", None)
    model.eval()
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = own  # type: ignore[assignment]


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

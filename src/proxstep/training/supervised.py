"""Next-token loss on reference solutions: what gives a model a partial skill before RL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from proxstep.tasks import Example
from proxstep.training.prompts import encode_prompt
from proxstep.typing import Float, Tensor


def solution_loss(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example]
) -> Float[Tensor, ""]:
    """Return the mean loss of the solutions' tokens, end token included, in nats.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Prompts with their reference solutions.
    """
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]
    solutions = [
        [
            *tokenizer(example.solution, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for example in examples
    ]
    width = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
    token = torch.full((len(examples), width), tokenizer.pad_token_id)
    attention = torch.zeros((len(examples), width), dtype=torch.long)
    label = torch.full((len(examples), width), -100)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        token[row, :end] = torch.tensor(prompt + solution)
        attention[row, :end] = 1
        label[row, len(prompt) : end] = torch.tensor(solution)
    logits = model(input_ids=token, attention_mask=attention).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), label[:, 1:].flatten())

"""Sequences arranged on a token grid, and one ISOPO backward over them."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Literal

import torch
from tests.oracle import Sequence
from torch import Tensor, nn

from proxstep.isopo import Isopo
from proxstep.isopo.sampling import CarriedSamples

Position = tuple[int, int]
"""A sequence, and a place in it."""
Layout = Literal["right", "left", "packed", "packed-rows"]


@dataclass(frozen=True)
class Grid:
    """A microbatch's sequences, padded or packed.

    Attributes:
        layout: How.
        token: (rows, columns); a token of the vocabulary at padding too.
        sequence_id: (rows, columns), -1 at padding.
        position: (rows, columns), each token's place in its sequence.
        completion: (rows, columns), where a sequence's completion is.
    """

    layout: Layout
    token: Tensor
    sequence_id: Tensor
    position: Tensor
    completion: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model of transformers is called with."""
        present = self.sequence_id >= 0
        if self.layout == "right":  # a row of positions for all rows, as generation's batches have
            return {"input_ids": self.token, "attention_mask": present.long()}
        if self.layout == "left":
            mask = present.long()
        else:
            same = self.sequence_id[:, :, None] == self.sequence_id[:, None, :]
            mask = same.tril()[:, None]
        return {"input_ids": self.token, "attention_mask": mask, "position_ids": self.position}


def make_grid(sequences: Sequences[Sequence], layout: Layout) -> Grid:
    """Arrange sequences: each in a row of its own, or several in a row."""
    rows = _rows(len(sequences), layout)
    lengths = [len(sequence.tokens) for sequence in sequences]
    width = max(sum(lengths[b] for b in row) for row in rows)
    token = torch.full((len(rows), width), 7)
    sequence_id, position = torch.full_like(token, -1), torch.zeros_like(token)
    completion = torch.zeros_like(token, dtype=torch.bool)
    for r, row in enumerate(rows):
        start = width - sum(lengths[b] for b in row) if layout == "left" else 0
        for b in row:
            columns = slice(start, start + lengths[b])
            token[r, columns] = torch.tensor(sequences[b].tokens)
            sequence_id[r, columns], position[r, columns] = b, torch.arange(lengths[b])
            completion[r, columns] = position[r, columns] >= sequences[b].num_prompt
            start += lengths[b]
    return Grid(layout, token, sequence_id, position, completion)


def _rows(num_sequences: int, layout: Layout) -> list[list[int]]:
    """Return which sequences share a row; packed rows hold them out of order."""
    numbers = list(range(num_sequences))
    if layout == "packed":
        return [numbers]
    if layout == "packed-rows":
        return [numbers[::2], numbers[1::2][::-1]]
    return [[b] for b in numbers]


def log_probs(model: nn.Module, grid: Grid) -> Tensor:
    """The log-probabilities of the completions' tokens, in float32 at least."""
    logits = model(**grid.inputs, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.log_softmax(-1).gather(-1, grid.token[:, 1:, None]).squeeze(-1)
    return chosen[grid.completion[:, 1:]]


def run(model: nn.Module, isopo: Isopo, grid: Grid, coefficients: list[float]) -> list[Position]:
    """One microbatch, forward and backward; return the positions that were sampled."""
    dtype = next(model.parameters()).dtype
    coefficient = torch.tensor(coefficients, dtype=torch.promote_types(dtype, torch.float32))
    with isopo.microbatch(grid.sequence_id, coefficient, grid.completion) as microbatch:
        microbatch.objective(log_probs(model, grid)).backward()
    if isinstance(microbatch.samples, CarriedSamples):  # each parameter has its own
        return []
    index, order = microbatch.samples.index_K, microbatch.layout.order_T
    index = index if order is None else order[index]
    chosen = zip(grid.sequence_id.flatten()[index], grid.position.flatten()[index], strict=True)
    return [(int(b), int(t)) for b, t in chosen]

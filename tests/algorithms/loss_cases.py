"""Random inputs of the objectives, and what every comparison with a slow oracle needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proxstep.algorithms import ALGORITHMS, Aggregation

SEEDS = (0, 1, 2)
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Case:
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    response_mask: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.log_probs, self.old_log_probs, self.advantages, self.response_mask

    def select(self, index: list[int]) -> Case:
        return Case(*(tensor[index] for tensor in self.tensors))

    def on_policy(self) -> Case:
        return replace(self, old_log_probs=self.log_probs.clone())


def make_case(
    seed: int, *, drift: float = 0.5, dtype: torch.dtype = torch.float64, with_empty: bool = True
) -> Case:
    """Six sequences of up to seven tokens, one of one token and one without any, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = 6, 7
    log_probs = -3 * torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
    noise = drift * torch.randn(batch, tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(batch, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    mask[:, 2] = True
    mask[1] = torch.arange(tokens) == 3
    if with_empty:
        mask[4] = False
    old_log_probs = (log_probs - noise).clamp(max=-0.01)
    return Case(log_probs.to(dtype), old_log_probs.to(dtype), advantages.to(dtype), mask)


def loop_aggregate(value: list[list[float]], mask: Tensor, mode: str, max_length: int) -> float:
    """The four modes, one token at a time."""
    rows = [
        [v for v, kept in zip(row, keep, strict=True) if kept]
        for row, keep in zip(value, mask.tolist(), strict=True)
    ]
    num_tokens = sum(len(row) for row in rows)
    num_sequences = sum(1 for row in rows if row)
    total = 0.0
    for row in rows:
        for v in row:
            if mode == "token-mean":
                total += v / num_tokens
            elif mode == "seq-mean-token-sum":
                total += v / num_sequences
            elif mode == "seq-mean-token-mean":
                total += v / len(row) / num_sequences
            else:
                total += v / max_length / num_sequences
    return total


def numerical_gradient(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-5):
    """Central differences, one entry at a time."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[index] = step
        shift = shift.view_as(at)
        gradient.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


def loss_and_gradient(name: str, case: Case, **hyper) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf = case.log_probs.clone().requires_grad_()
    loss, metrics = ALGORITHMS[name].loss(leaf, *case.tensors[1:], **hyper)
    assert loss.shape == (), f"{name}: aggregate its loss, of shape {tuple(loss.shape)}"
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


def counted(mode: str, mask: Tensor, max_length: int = 9) -> Aggregation:
    """The aggregation with the counts of the whole batch."""
    return Aggregation(
        mode,
        num_sequences=int(mask.any(dim=1).sum()),
        num_tokens=int(mask.sum()),
        max_length=max_length,
    )


def assert_close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-12):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)

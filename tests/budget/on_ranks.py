"""Steps of `KlBudget` on one rank or two, run by `tests.distributed`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tests.models import tiny_qwen3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from proxstep import KlBudget

TOKENS = torch.randint(2, 19, (4, 7), generator=torch.Generator().manual_seed(0))


def steps(wrapper: str, control: str) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Three steps on all four sequences: what they were, and the weights after them."""
    torch.manual_seed(0)
    model: Any = tiny_qwen3()
    many = dist.is_initialized()
    token = TOKENS[dist.get_rank() :: 2] if many else TOKENS
    if wrapper == "ddp":
        trained: Any = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        trained = fully_shard(model)
    else:
        trained = model
    inner = torch.optim.AdamW(trained.parameters(), lr=0.03, foreach=False)
    optimizer = KlBudget(inner, trained, nats=0.01, control=control)

    def score() -> tuple[Tensor, Tensor]:
        logits = trained(input_ids=token, use_cache=False).logits[:, :-1]
        log_prob = logits.log_softmax(-1).gather(-1, token[:, 1:, None]).squeeze(-1)
        return log_prob, torch.ones_like(log_prob, dtype=torch.bool)

    measured = []
    for step in range(3):
        optimizer.zero_grad()
        sign = 1 if step % 2 else -1
        (sign * score()[0].sum(dim=1).mean()).backward()
        optimizer.step(score)
        measured.append(optimizer.measured)
    return measured, [full(parameter) for parameter in trained.parameters()]


def full(parameter: nn.Parameter) -> Tensor:
    """The whole of a parameter that may be sharded."""
    value: Any = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()

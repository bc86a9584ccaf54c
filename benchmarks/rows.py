"""The contestants: each turns a model and a microbatch into a step, a forward and a backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.literal import ComputeGrad, PaperHooks, figure2, figure4, interacting
from benchmarks.workload import Batch, completion_log_probs, reinforce
from proxstep import Isopo
from proxstep.errors import ProxstepError
from proxstep.training.output_layer import completion_log_probs_chunked

Step = Callable[[], None]
"""One microbatch: afterwards `.grad` holds the contestant's gradient."""

Build = Callable[[nn.Module, Batch, int | None], Step]
"""A step from a model of the contestant's own, the microbatch and the number of positions K."""


@dataclass(frozen=True)
class Row:
    """One contestant.

    Attributes:
        build: Prepares it.
        kind: The class of rule that targets speak of ("p", "pqr", "natural", "euclidean"), for
            rows of proxstep's own.
        sampled: Whether it estimates Fisher norms, so that K matters.
        tied: Whether the head shares the embedding's weight.
    """

    build: Build
    kind: str | None = None
    sampled: bool = False
    tied: bool = True


def _plain(model: nn.Module, batch: Batch, num_samples: int | None) -> Step:
    del num_samples
    return lambda: reinforce(model, batch)


def _isopo(rule: str, **options: Any) -> Build:
    def build(model: nn.Module, batch: Batch, num_samples: int | None) -> Step:
        isopo = Isopo(model, rule, num_overlap_positions=num_samples, **options)
        sequence_BT = batch.sequence_BT

        def step() -> None:
            model.zero_grad()
            with isopo.microbatch(sequence_BT, batch.coefficient_B) as microbatch:
                microbatch.objective(
                    completion_log_probs(model, batch.token_BT, batch.num_prompt)
                ).backward()
            isopo.step()

        return step

    return build


def _chunked(rule: str | None) -> Build:
    """REINFORCE, or a rule of ISOPO, without the logits of all positions."""

    def build(model: nn.Module, batch: Batch, num_samples: int | None) -> Step:
        isopo = Isopo(model, rule, num_overlap_positions=num_samples) if rule else None
        attention_BT = torch.ones_like(batch.token_BT, dtype=torch.bool)
        response_BT = attention_BT.clone()
        response_BT[:, : batch.num_prompt] = False
        inputs = (batch.token_BT, attention_BT, response_BT, 1.0)

        def step() -> None:
            model.zero_grad()
            if isopo is None:
                log_prob_B = completion_log_probs_chunked(model, *inputs)[0].sum(dim=1)
                (-(batch.coefficient_B * log_prob_B).sum()).backward()
                return
            with isopo.microbatch(batch.sequence_BT, batch.coefficient_B) as microbatch:
                microbatch.objective(completion_log_probs_chunked(model, *inputs)[0]).backward()
            isopo.step()

        return step

    return build


def _literal(figure: Callable[[int | None], ComputeGrad]) -> Build:
    def build(model: nn.Module, batch: Batch, num_samples: int | None) -> Step:
        hooks = PaperHooks(model, figure(num_samples))
        position_T = torch.arange(batch.token_BT.numel(), device=batch.token_BT.device)
        indices_by_sequence = position_T.split(batch.token_BT.shape[1])

        def step() -> None:
            model.zero_grad()
            log_prob_B = completion_log_probs(model, batch.token_BT, batch.num_prompt)
            hooks.backward(log_prob_B.sum(), indices_by_sequence, batch.coefficient_B)

        return step

    return build


def _library(prepare: Callable[[Any, nn.Module], Callable[[Batch], None]]) -> Build:
    def build(model: nn.Module, batch: Batch, num_samples: int | None) -> Step:
        del num_samples
        run = prepare(_per_sample(), model)
        return lambda: run(batch)

    return build


def _per_sample() -> ModuleType:
    """Return the module `per_sample`, which needs Opacus."""
    try:
        from benchmarks import per_sample
    except ImportError as error:
        raise ProxstepError(
            f"{error.name} is not installed: pip install 'proxstep[bench]', or choose other --rows"
        ) from error
    return per_sample


ROWS: dict[str, Row] = {
    "reinforce": Row(_plain),
    "untied-reinforce": Row(_plain, tied=False),
    "isopo": Row(_isopo("isopo"), kind="p", sampled=True),
    "isopo-microbatch": Row(_isopo("isopo", overlap_source="microbatch"), sampled=True),
    "isopo-npg": Row(_isopo("isopo-npg"), kind="pqr", sampled=True),
    "isopo-figure4": Row(_isopo("isopo-figure4"), kind="pqr", sampled=True),
    "isopo-euclidean": Row(_isopo("isopo-euclidean"), kind="euclidean"),
    "isopo-natural": Row(_isopo("isopo-natural"), kind="natural"),
    "chunked-reinforce": Row(_chunked(None), kind="chunked"),
    "chunked-isopo": Row(_chunked("isopo"), kind="chunked", sampled=True),
    "paper": Row(_literal(figure2), sampled=True),
    "paper-figure4": Row(_literal(figure4), sampled=True),
    "paper-natural": Row(_literal(lambda _: interacting)),
    "untied-euclidean": Row(_isopo("isopo-euclidean"), tied=False),
    "untied-natural": Row(_isopo("isopo-natural"), tied=False),
    "opacus-euclidean": Row(
        _library(lambda lib, model: lib.OpacusGradients(model, lib.euclidean)), tied=False
    ),
    "opacus-natural": Row(
        _library(lambda lib, model: lib.OpacusGradients(model, lib.natural)), tied=False
    ),
    "opacus-ghost": Row(_library(lambda lib, model: lib.OpacusGhost(model)), tied=False),
    "vmap-euclidean": Row(
        _library(lambda lib, model: lib.VmapGradients(model, lib.euclidean)), tied=False
    ),
    "vmap-natural": Row(
        _library(lambda lib, model: lib.VmapGradients(model, lib.natural)), tied=False
    ),
}
"""The contestants by name: plain REINFORCE itself, for the noise; proxstep's presets; the paper's
pseudo-code with p = -1, with q = -1 and r = -2, and interacting; and the libraries, which need an
untied model and so have untied rows of REINFORCE and proxstep beside them.
"""

MAIN_ROWS = [
    name
    for name in ROWS
    if name not in ("untied-reinforce", "untied-natural", "opacus-natural", "vmap-natural")
]
"""What is run by default: the others differ little from a neighbor."""

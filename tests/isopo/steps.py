"""Random sequences as explicit gradients, and the records that a step would make of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.isopo.diagnostics.step import LayerDiagnostics, StepDiagnostics

SIZES = (5, 3)
"""Sequences of the two microbatches."""
DIMENSIONS = {"up": 8, "norm": 2, "head": 20}
"""Parameters of each use; "norm" has fewer than sequences, so that its kernel is singular."""


@dataclasses.dataclass
class Step:
    """Random sequences: explicit gradients per use and microbatch, and the records of them."""

    gradients: dict[str, list[Tensor]]
    coefficients: list[Tensor]
    groups: list[Tensor]
    records: dict[str, list[LayerRecord]]


def random_step(seed: int, sizes: tuple[int, ...] = SIZES) -> Step:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    coefficients = [normal(size) for size in sizes]
    coefficients[0][0] = 0.0
    groups = [torch.arange(size) // 2 + 10 * m for m, size in enumerate(sizes)]
    gradients = {
        name: [normal(size, dimension) * normal(size, 1).exp() for size in sizes]
        for name, dimension in DIMENSIONS.items()
    }
    records: dict[str, list[LayerRecord]] = {}
    for name, batches in gradients.items():
        records[name] = []
        for coefficient, group, g in zip(coefficients, groups, batches, strict=True):
            filled = torch.rand(len(g), generator=generator) < 0.2
            records[name].append(
                LayerRecord(
                    coefficient,
                    coefficient * normal(len(g)).exp(),
                    normal(len(g)).exp(),
                    filled,
                    g.square().sum(1),
                    g @ g.mT,
                    group,
                    length_B=torch.randint(1, 90, (len(g),), generator=generator),
                )
            )
    return Step(gradients, coefficients, groups, records)


def pooled(step: Step, name: str, field: str) -> list[float]:
    return [x for record in step.records[name] for x in getattr(record, field).tolist()]


def layer(diagnostics: StepDiagnostics, name: str) -> LayerDiagnostics:
    return next(found for found in diagnostics.layers if found.name == name)


def without(step: Step, *fields: str) -> dict[str, list[LayerRecord]]:
    missing = dict.fromkeys(fields)
    return {
        name: [dataclasses.replace(record, **missing) for record in row]
        for name, row in step.records.items()
    }

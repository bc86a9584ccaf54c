"""One optimizer step's records, padded to rectangles on the CPU, where its figures are computed.

A step has some hundred parameter uses times a few microbatches, each with small tensors on the
device of its layer. They cross over together, one transfer per field, device and precision, so that
no figure waits for the device by itself.

Legend for shape suffixes: U parameter uses, M microbatches, B sequences; M and B padded to the
largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.typing import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class StackedRecords:
    """The records of one step, in float64.

    Attributes:
        names: The parameter uses, in the order of the records.
        present_UMB: Where there is a sequence; the rest is padding.
        coefficient_UMB: The coefficients; 0 in the padding.
        weight_UMB: The rule's weights; 0 in the padding.
        fisher_sq_UMB: F_b^2; NaN where it was not estimated, or filled in.
        filled_UMB: 1 where the estimate was filled in, 0 where not, NaN where that is unknown.
        norm_sq_UMB: |G_b|^2, off the kernel's diagonal where it was not measured by itself; NaN
            where it is unknown.
        length_UMB: Each sequence's number of positions; NaN where it is unknown.
        group_UMB: Each sequence's group, numbered from 0; -1 where it is unknown.
        ntk_UMBB: The kernels; 0 in the padding and where they are unknown.
        has_ntk_UM: Which kernels are known: a kernel that is not finite is not.
    """

    names: tuple[str, ...]
    present_UMB: Bool[Tensor, "uses microbatches batch"]
    coefficient_UMB: Float[Tensor, "uses microbatches batch"]
    weight_UMB: Float[Tensor, "uses microbatches batch"]
    fisher_sq_UMB: Float[Tensor, "uses microbatches batch"]
    filled_UMB: Float[Tensor, "uses microbatches batch"]
    norm_sq_UMB: Float[Tensor, "uses microbatches batch"]
    length_UMB: Float[Tensor, "uses microbatches batch"]
    group_UMB: Int[Tensor, "uses microbatches batch"]
    ntk_UMBB: Float[Tensor, "uses microbatches batch batch"]
    has_ntk_UM: Bool[Tensor, "uses microbatches"]


def stack_records(records: Mapping[str, Sequence[LayerRecord]]) -> StackedRecords:
    """Return a step's records as padded tensors on the CPU.

    Args:
        records: For each parameter use one record per microbatch, in the microbatches' order. At
            least one record.
    """
    index = [(u, m) for u, row in enumerate(records.values()) for m in range(len(row))]
    flat = [record for row in records.values() for record in row]
    num_microbatches = max(len(row) for row in records.values())
    num_sequences = max(len(record.coefficient_B) for record in flat)
    shape = (len(records), num_microbatches, num_sequences)

    def padded(values: Sequence[Tensor | None], fill: float) -> Tensor:
        out = torch.full(shape, fill, dtype=torch.float64)
        for (u, m), value_B in zip(index, _to_host(values), strict=True):
            if value_B is not None:
                out[u, m, : len(value_B)] = value_B
        return out

    ntk_UMBB = torch.zeros(*shape, num_sequences, dtype=torch.float64)
    has_ntk_UM = torch.zeros(shape[:2], dtype=torch.bool)
    for (u, m), kernel_BB in zip(index, _to_host([r.ntk_BB for r in flat]), strict=True):
        if kernel_BB is not None and bool(kernel_BB.isfinite().all()):
            size = len(kernel_BB)
            ntk_UMBB[u, m, :size, :size], has_ntk_UM[u, m] = kernel_BB, True
    present_UMB = padded([torch.ones(len(r.coefficient_B)) for r in flat], 0.0) > 0
    diagonal_UMB = ntk_UMBB.diagonal(dim1=-2, dim2=-1)
    diagonal_UMB = diagonal_UMB.where(has_ntk_UM[..., None] & present_UMB, torch.nan)
    norm_sq_UMB = padded([r.norm_sq_B for r in flat], torch.nan)
    filled_UMB = padded([r.filled_B for r in flat], torch.nan)
    fisher_sq_UMB = padded([r.fisher_sq_B for r in flat], torch.nan)
    group_UMB = padded([r.group_B for r in flat], torch.nan)
    _, number_UMB = group_UMB.unique(return_inverse=True)
    return StackedRecords(
        names=tuple(records),
        present_UMB=present_UMB,
        coefficient_UMB=padded([r.coefficient_B for r in flat], 0.0),
        weight_UMB=padded([r.weight_B for r in flat], 0.0),
        fisher_sq_UMB=fisher_sq_UMB.where(filled_UMB != 1, torch.nan),
        filled_UMB=filled_UMB,
        norm_sq_UMB=norm_sq_UMB.where(norm_sq_UMB.isfinite(), diagonal_UMB).clamp(min=0),
        length_UMB=padded([r.length_B for r in flat], torch.nan),
        group_UMB=number_UMB.where(group_UMB.isfinite(), -1),
        ntk_UMBB=ntk_UMBB,
        has_ntk_UM=has_ntk_UM,
    )


def _to_host(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the tensors on the CPU, with one transfer per device and precision."""
    buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, value in enumerate(values):
        if value is not None:
            buckets.setdefault((value.device, value.dtype), []).append(i)
    host: list[Tensor | None] = [None] * len(values)
    for indices in buckets.values():
        tensors = [value for i in indices if (value := values[i]) is not None]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()
        parts = flat.split([tensor.numel() for tensor in tensors])
        for i, tensor, part in zip(indices, tensors, parts, strict=True):
            host[i] = part.view(tensor.shape)
    return host

"""Experts packed in three-dimensional parameters, as transformers builds mixtures of experts.

A position sends its state through a few experts, so that G_t has a block g_ts a_ts^T for each of
its slots s, in the rows of that slot's expert. Each packed parameter is one layer: inner products
are summed over the experts. Experts' rows are few, so all statistics are had expert by expert, as
those of a linear layer.

Legend for shape suffixes: T positions, S slots of a position, R rows (T x S, in order of experts),
B sequences, K sampled positions, E experts, O and I output and input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import (
    Owner,
    PositionGradients,
    SequenceGradients,
    covers,
    owner_of,
    parameter_gradient,
)
from proxstep.isopo.linear import OuterGradients, gram, product
from proxstep.isopo.plan import Layout
from proxstep.logprobs.tokens import wide
from proxstep.typing import Float, Int, Tensor

_LIMIT = 2**24
"""Numbers of a Gram matrix, or of the sequences' gradients by one expert, held at a time."""


# -- the forward -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Routing:
    """Which expert each row goes to.

    Attributes:
        expert_TS: Each slot's expert.
        order_R: Row r is slot order_R[r] of the flattened slots.
        ends_E: Where each expert's rows end.
        how: The name of transformers' implementation.
    """

    expert_TS: Tensor
    order_R: Tensor
    ends_E: Tensor
    how: str

    @classmethod
    def of(cls, expert_TS: Tensor, num_experts: int, how: str) -> _Routing:
        """Sort the slots by expert, and within an expert by slot and then by position."""
        num_positions, num_slots = expert_TS.shape
        by_slot = expert_TS.mT.reshape(-1).argsort(stable=True)
        order_R = (by_slot % num_positions) * num_slots + by_slot // num_positions
        counts_E = torch.nn.functional.one_hot(expert_TS.reshape(-1), num_experts).sum(0)
        return cls(expert_TS, order_R, counts_E.cumsum(0), how)

    def multiply(self, x_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        """Return each row times its expert's weight, by the same product as transformers."""
        if self.how == "batched_mm":
            expert_R = self.expert_TS.reshape(-1)[self.order_R]
            return torch.bmm(weight_EOI[expert_R], x_RI[..., None]).squeeze(-1)
        if self.how == "grouped_mm":
            from transformers.integrations import moe

            offsets = self.ends_E.to(torch.int32)
            return moe._grouped_linear(x_RI, weight_EOI, offsets)
        out_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[1])
        start = 0
        for expert, end in enumerate(self.ends_E.tolist()):
            if end > start:
                out_RO[start:end] = nn.functional.linear(x_RI[start:end], weight_EOI[expert])
            start = end
        return out_RO

    def by_position(self, value_RN: Tensor) -> Tensor:
        """Return (positions, slots x features)."""
        value = torch.empty_like(value_RN)
        value[self.order_R] = value_RN
        return value.view(len(self.expert_TS), -1)


class _Experts(torch.autograd.Function):
    """Each row times its expert's weight, whose gradient comes from the operator."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, routing: _Routing, place: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.routing, ctx.place = routing, place
        return routing.multiply(x_RI, weight_EOI)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.routing.multiply(grad_RO.contiguous(), weight_EOI.mT)
        if ctx.needs_input_grad[1]:
            grad_weight = _gradient(grad_RO, x_RI, list(weight_EOI.shape), ctx.routing, ctx.place)
        return grad_x, grad_weight, None, None


class _Biases(torch.autograd.Function):
    """Each row's expert's bias: a weight whose only input is 1."""

    @staticmethod
    def forward(ctx: Any, bias_EO: Tensor, routing: _Routing, place: tuple[Any, ...]) -> Tensor:
        ctx.shape, ctx.routing, ctx.place = (*bias_EO.shape, 1), routing, place
        return bias_EO[routing.expert_TS.reshape(-1)[routing.order_R]]

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        ones_R1 = grad_RO.new_ones(len(grad_RO), 1)
        grad = _gradient(grad_RO, ones_R1, list(ctx.shape), ctx.routing, ctx.place)
        return grad.squeeze(-1), None, None


def _gradient(
    grad_RO: Tensor, x_RI: Tensor, shape: list[int], routing: _Routing, place: tuple[Any, ...]
) -> Tensor:
    values = [routing.by_position(grad_RO), routing.by_position(x_RI), routing.expert_TS]
    numbers = [shape[0], routing.expert_TS.shape[1]]
    return parameter_gradient("ExpertGradients", values, numbers, shape, *place)


def _is_experts(module: nn.Module) -> bool:
    """Whether a module is of a class that `use_experts_implementation` decorates."""
    names = ("config", "has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")
    if not all(hasattr(module, name) for name in names):
        return False
    up = "gate_up_proj" if module.has_gate else "up_proj"
    known = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if module.has_bias else set())
    return {name for name, _ in module.named_parameters(recurse=False)} == known


@covers(_is_experts, matrices=("gate_up_proj", "up_proj", "down_proj"))
def _forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    found = owner_of(self)
    if found is None:
        return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
    owner, site = found
    how = getattr(self.config, "_experts_implementation", None) or "eager"
    if how not in ("eager", "grouped_mm", "batched_mm") or self._is_expert_parallel:
        raise ProxstepError(
            f"{site.name}: ISOPO covers packed experts on one device, multiplied by "
            'experts_implementation="eager", "grouped_mm" or "batched_mm": choose one of them, '
            "or freeze the experts"
        )
    routing = _Routing.of(top_k_index, self.num_experts, how)
    num_slots = top_k_index.shape[1]
    position_R = routing.order_R // num_slots

    def project(x_RI: Tensor, name: str) -> Tensor:
        weight_EOI = getattr(self, name)
        weight_EOI = weight_EOI.mT if self.is_transposed else weight_EOI
        if how == "grouped_mm":  # which autocast leaves alone
            x_RI = x_RI.to(weight_EOI.dtype)
        elif torch.is_autocast_enabled(x_RI.device.type):
            dtype = torch.get_autocast_dtype(x_RI.device.type)
            x_RI, weight_EOI = x_RI.to(dtype), weight_EOI.to(dtype)
        out_RO = _Experts.apply(x_RI, weight_EOI, routing, _place(owner, site.key(name)))
        if self.has_bias:
            bias_EO, place = getattr(self, f"{name}_bias"), _place(owner, site.key(f"{name}_bias"))
            out_RO = out_RO + _Biases.apply(bias_EO.to(out_RO.dtype), routing, place)
        return out_RO

    up_RI = project(hidden_states[position_R], "gate_up_proj" if self.has_gate else "up_proj")
    down_RO = project(self._apply_gate(up_RI) if self.has_gate else self.act_fn(up_RI), "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        down_RO = self.post_expert_norm(down_RO)
    weighted_RO = down_RO * top_k_weights.reshape(-1)[routing.order_R, None]
    if how == "eager":
        weighted_RO = weighted_RO.to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add(0, position_R, weighted_RO)
    rank_R = torch.empty_like(routing.order_R)
    rank_R[routing.order_R] = torch.arange(len(rank_R), device=rank_R.device)
    summed = weighted_RO[rank_R].view(len(hidden_states), num_slots, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _place(owner: Owner, key: str) -> tuple[Tensor, int, str]:
    return owner.microbatch_id, owner.number, key


# -- statistics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertGradients(PositionGradients):
    """A packed weight: G_t has g_ts a_ts^T in the block of each slot's expert.

    Attributes:
        grad_TN: Gradients of the outputs, slot after slot.
        input_TN: Inputs, slot after slot.
        expert_TS: Each slot's expert; a vector where a position has one slot.
        num_experts: E.
        num_slots: S.
    """

    is_matrix = True

    grad_TN: Float[Tensor, "positions slots*out"]
    input_TN: Float[Tensor, "positions slots*in"]
    expert_TS: Int[Tensor, "positions ..."]
    num_experts: int
    num_slots: int

    def at(self, index: Int[Tensor, " samples"]) -> ExpertGradients:
        """Return those of some positions."""
        parts = (self.grad_TN[index], self.input_TN[index], self.expert_TS[index])
        return type(self)(*parts, self.num_experts, self.num_slots)

    def squares(self) -> Float[Tensor, " positions"]:
        """Return |G_t|^2; two slots of one expert add up before they are squared."""
        grad_TSO, input_TSI = wide(self._by_slot(self.grad_TN)), wide(self._by_slot(self.input_TN))
        expert_TS = self.expert_TS.view(self.num_rows, self.num_slots)
        same_TSS = expert_TS[:, :, None] == expert_TS[:, None, :]
        pairs_TSS = (grad_TSO @ grad_TSO.mT) * (input_TSI @ input_TSI.mT)
        return (pairs_TSS * same_TSS).sum((1, 2))

    def contract(self, weight_T: Float[Tensor, " positions"]) -> Float[Tensor, "experts out in"]:
        """Return sum_t weight_t G_t."""
        total_EOI = self._zeros()
        for expert, position_R, outer in self.by_expert():
            total_EOI[expert] = outer.contract(weight_T[position_R])
        return total_EOI

    def factors(self, index_T: Int[Tensor, " kept"]) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield each expert that some position chose."""
        for expert, _, outer in self.at(index_T).by_expert():
            yield expert, outer.grad_TO, outer.input_TI

    def sums(self, layout: Layout) -> ExpertSums:
        """Return each sequence's gradient, which is left implicit."""
        parts = {
            expert: (outer, layout.only(position_R))
            for expert, position_R, outer in self.by_expert()
        }
        return ExpertSums(self, layout.num_sequences, parts)

    def by_expert(self) -> Iterator[tuple[int, Tensor, OuterGradients]]:
        """Yield each expert that some position chose, its rows' positions and their gradients."""
        grad_RO, input_RI = (
            self._by_slot(value).flatten(0, 1) for value in (self.grad_TN, self.input_TN)
        )
        expert_R = self.expert_TS.reshape(-1)
        order_R = expert_R.argsort(stable=True)
        counts = torch.bincount(expert_R, minlength=self.num_experts).tolist()
        for expert, row_R in enumerate(order_R.split(counts)):
            if len(row_R):
                outer = OuterGradients(grad_RO[row_R], input_RI[row_R])
                yield expert, row_R // self.num_slots, outer

    def _by_slot(self, value_TN: Tensor) -> Tensor:
        return value_TN.view(self.num_rows, self.num_slots, -1)

    def _zeros(self) -> Tensor:
        out, size = (value.shape[1] // self.num_slots for value in (self.grad_TN, self.input_TN))
        return self.grad_TN.new_zeros(self.num_experts, out, size)


@dataclass(frozen=True)
class ExpertSums(SequenceGradients):
    """The gradients G_b of a packed weight, as each expert's rows.

    Attributes:
        positions: All rows.
        num_sequences: B.
        parts: Each expert's rows, and which sequence each of them belongs to.
    """

    positions: ExpertGradients
    num_sequences: int
    parts: dict[int, tuple[OuterGradients, Layout]]

    def cross(self, sample: ExpertGradients) -> Float[Tensor, "samples batch"]:
        """Return <G_k, G_b> in ghost form."""
        cross_KB = wide(self.positions.grad_TN).new_zeros(sample.num_rows, self.num_sequences)
        for expert, position_R, sampled in sample.by_expert():
            if expert not in self.parts:
                continue
            outer, layout = self.parts[expert]
            for part in torch.arange(len(position_R)).split(max(1, _LIMIT // outer.num_rows)):
                pairs = product(sampled.grad_TO[part], outer.grad_TO.mT)
                pairs *= product(sampled.input_TI[part], outer.input_TI.mT)
                cross_KB.index_add_(0, position_R[part], layout.sum_by_sequence(pairs))
        return cross_KB

    def norm_squares(self) -> Float[Tensor, " batch"]:
        """Return |G_b|^2, each expert's share of it in the cheaper form."""
        total_B = wide(self.positions.grad_TN).new_zeros(self.num_sequences)
        for outer, layout in self.parts.values():
            for sequence, (start, end) in enumerate(layout.bounds):
                if end > start:
                    rows = (outer.grad_TO[start:end], outer.input_TI[start:end])
                    total_B[sequence] += _square(*rows)
        return total_B.clamp(min=0)

    def ntk(self) -> Float[Tensor, "batch batch"]:
        """Return <G_b, G_c>."""
        zeros_BB = self.positions.grad_TN.new_zeros(self.num_sequences, self.num_sequences)
        total_BB = wide(zeros_BB)
        for outer, layout in self.parts.values():
            area = outer.grad_TO.shape[1] * outer.input_TI.shape[1]
            width = outer.grad_TO.shape[1] + outer.input_TI.shape[1]
            too_large = self.num_sequences * area > _LIMIT
            if too_large or outer.num_rows * width <= 2 * area:
                total_BB += outer.ntk(layout)
            else:
                total_BB += gram(self._formed(outer, layout))
        return total_BB

    def contract(self, weight_B: Float[Tensor, " batch"]) -> Float[Tensor, "experts out in"]:
        """Return sum_b weight_b G_b."""
        total_EOI = self.positions._zeros()
        for expert, (outer, layout) in self.parts.items():
            total_EOI[expert] = outer.contract(weight_B, layout)
        return total_EOI

    def _formed(self, outer: OuterGradients, layout: Layout) -> Tensor:
        rows = [
            product(outer.grad_TO[start:end].mT, outer.input_TI[start:end]).flatten()
            for start, end in layout.bounds
        ]
        return torch.stack(rows)


def _square(grad_RO: Tensor, input_RI: Tensor) -> Tensor:
    """Return |sum_r g_r a_r^T|^2."""
    area, width = grad_RO.shape[1] * input_RI.shape[1], grad_RO.shape[1] + input_RI.shape[1]
    if len(grad_RO) * width <= area:
        return (product(grad_RO, grad_RO.mT) * product(input_RI, input_RI.mT)).sum()
    return product(grad_RO.mT, input_RI).square().sum()

"""The paper's pseudo-code, written out: full backward hooks on linear layers (figures 2, 3 and 6).

The hooks see the gradients that autograd has computed anyway, so the ordinary weight gradients are
paid for as well, and each sequence's gradient is a matrix in memory. As in the paper, what is not a
linear layer (normalizations, an embedding) keeps the gradient of the summed log-probabilities, and
a tied head's gradient replaces the embedding's.

Where the figures leave something open, the cheaper reading is taken: the norm that figure 3 writes
twice is computed once, figure 2's p = -1 does without it, and a layer's input is let go of after
use.

Legend for shape suffixes: B sequences, T token positions of the microbatch, K sampled positions, O
and I output and input features.

Source: arXiv 2512.23353, figures 2, 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from proxstep.typing import Float, Int, Tensor

GUARD = 1e-8

Positions = Sequence[Tensor]
"""indices_by_sequence: the flat token positions of each sequence."""

ComputeGrad = Callable[[Tensor, Tensor, Positions, Tensor], Tensor]
"""A layer's gradient from (act_in_TI, grad_out_TO, indices_by_sequence, advantage_B)."""

Rescaling = Callable[[Tensor, Tensor], Tensor]
"""A sequence's re-scaled gradient from (grad_OI, F_norm)."""


class PaperHooks:
    """The hooks of one figure on every linear layer of a model.

    Args:
        model: The model; it is hooked until `remove`.
        compute_grad: `non_interacting` or `interacting`, with its settings bound.
    """

    def __init__(self, model: nn.Module, compute_grad: ComputeGrad) -> None:
        self._compute_grad = compute_grad
        self._indices: Positions = []
        self._advantage_B = torch.empty(0)
        self._act_in: dict[nn.Module, Tensor] = {}
        self._grad: dict[nn.Module, Tensor] = {}
        self._handles = []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_hook(self._keep_input))
                self._handles.append(module.register_full_backward_hook(self._reduce))

    def backward(
        self, sum_log_prob: Tensor, indices_by_sequence: Positions, advantage_B: Tensor
    ) -> None:
        """Back-propagate the summed log-probabilities and leave ISOPO's gradient in `.grad`.

        Args:
            sum_log_prob: torch.sum(log_prob), without advantages.
            indices_by_sequence: Each sequence's positions in the flattened token grid.
            advantage_B: The advantages, with their normalization.
        """
        self._indices, self._advantage_B = indices_by_sequence, advantage_B
        sum_log_prob.backward()
        for module, grad_OI in self._grad.items():
            module.weight.grad = -grad_OI
        self._grad.clear()

    def remove(self) -> None:
        """Unhook the model."""
        for handle in self._handles:
            handle.remove()

    def _keep_input(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        del output
        self._act_in[module] = args[0].detach().flatten(0, -2)

    def _reduce(self, module: nn.Module, grad_in: Any, grad_out: Any) -> None:
        del grad_in
        act_in_TI, grad_out_TO = self._act_in.pop(module), grad_out[0].flatten(0, -2)
        self._grad[module] = self._compute_grad(
            act_in_TI, grad_out_TO, self._indices, self._advantage_B
        )


def draw_overlap_samples(
    num_positions: int, num_samples: int | None, device: torch.device
) -> Int[Tensor, " samples"]:
    """Return the positions that estimate Fisher norms; all of them for None."""
    return torch.randperm(num_positions, device=device)[:num_samples]


def non_interacting(
    act_in_TI: Float[Tensor, "positions in"],
    grad_out_TO: Float[Tensor, "positions out"],
    indices_by_sequence: Positions,
    advantage_B: Float[Tensor, " batch"],
    *,
    rescaling: Rescaling,
    num_samples: int | None,
) -> Float[Tensor, "out in"]:
    """Return a linear layer's gradient as figure 2 computes it, one sequence after the other."""
    sample_K = draw_overlap_samples(len(grad_out_TO), num_samples, grad_out_TO.device)
    a0_KI, g0_KO = act_in_TI[sample_K], grad_out_TO[sample_K]
    grad_OI = grad_out_TO.new_zeros(grad_out_TO.shape[1], act_in_TI.shape[1])
    for seq_id, seq_indices in enumerate(indices_by_sequence):
        seq_grad_OI = grad_out_TO[seq_indices].T @ act_in_TI[seq_indices]
        fisher_norm = torch.norm(torch.sum((g0_KO @ seq_grad_OI) * a0_KI, dim=1)) / torch.norm(
            torch.norm(g0_KO, dim=1) * torch.norm(a0_KI, dim=1)
        )
        grad_OI += advantage_B[seq_id] * rescaling(seq_grad_OI, fisher_norm)
    return grad_OI


def fisher_rescaling(grad_OI: Tensor, fisher_norm: Tensor) -> Tensor:
    """Return figure 2's re-scaling, p = -1."""
    return grad_OI / (fisher_norm**2 + GUARD).sqrt()


def general_rescaling(
    grad_OI: Tensor, fisher_norm: Tensor, *, p: float, q: float, r: float
) -> Tensor:
    """Return figure 3's re-scaling."""
    norm = grad_OI.norm()
    scaling = _reg2(fisher_norm) ** p * _reg2(norm) ** q * _reg2(fisher_norm / norm) ** r
    return scaling * grad_OI


def _reg2(value: Tensor) -> Tensor:
    return (value**2 + GUARD).sqrt()


def interacting(
    act_in_TI: Float[Tensor, "positions in"],
    grad_out_TO: Float[Tensor, "positions out"],
    indices_by_sequence: Positions,
    advantage_B: Float[Tensor, " batch"],
) -> Float[Tensor, "out in"]:
    """Return a linear layer's gradient as figure 6 computes it.

    The regularization is 1.0 times the mean eigenvalue (figure 7), of this microbatch instead of
    earlier ones: it costs the same.
    """
    seq_grads = []
    for seq_indices in indices_by_sequence:
        seq_grads.append(grad_out_TO[seq_indices].T @ act_in_TI[seq_indices])
    wide = torch.promote_types(grad_out_TO.dtype, torch.float32)  # eigh has no bfloat16
    num_sequences = len(seq_grads)
    ntk_BB = torch.empty(num_sequences, num_sequences, dtype=wide, device=grad_out_TO.device)
    for i in range(num_sequences):
        for j in range(i, num_sequences):
            ntk_BB[i, j] = torch.sum(seq_grads[i] * seq_grads[j])
            ntk_BB[j, i] = ntk_BB[i, j]
    eigenvalue_B, eigenvector_BB = torch.linalg.eigh(ntk_BB)
    preconditioner_B = 1.0 / (eigenvalue_B + eigenvalue_B.mean())
    preconditioned_B = eigenvector_BB @ (
        preconditioner_B * (eigenvector_BB.T @ advantage_B.to(wide))
    )
    return torch.stack(seq_grads, dim=-1) @ preconditioned_B.to(grad_out_TO.dtype)


def figure2(num_samples: int | None) -> ComputeGrad:
    """Return the non-interacting variant with p = -1."""
    return partial(non_interacting, rescaling=fisher_rescaling, num_samples=num_samples)


def figure4(num_samples: int | None) -> ComputeGrad:
    """Return the non-interacting variant with q = -1 and r = -2, the paper's validation curve."""
    rescaling = partial(general_rescaling, p=0.0, q=-1.0, r=-2.0)
    return partial(non_interacting, rescaling=rescaling, num_samples=num_samples)

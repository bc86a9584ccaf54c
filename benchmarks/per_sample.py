"""The same gradients from per-sequence gradients: Opacus's hooks and torch.func's vmap(grad).

Both materialize the gradient G_b of every sequence and parameter; the rules are then a few lines.
None of them has the paper's Fisher norm, which needs gradients per token position, so what is
compared is the Euclidean rule (q = -1, figure 5) and the natural rule (section 3).

What the libraries need, and what they cannot do:

- A tied weight has one gradient for both of its uses, and ghost clipping refuses it, where ISOPO
  treats each use by itself: in these comparisons the model is untied, for everybody.
- Opacus does not know the families' RMSNorm classes. It would fall back to vmap for each of them;
  here it is told the formula, which is faster.
- Opacus's hooks see ordinary gradients that autograd has computed anyway.
- Ghost clipping has per-sequence norms of each parameter without their gradients, but weights a
  sequence by one number for the whole model, in a second backward pass: not ISOPO, its nearest
  relative.
- vmap cannot batch attention's fused CPU kernel and loops over the sequences there.

Legend for shape suffixes: B sequences, T token positions, N entries of a parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
)
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from benchmarks.workload import Batch, completion_log_probs
from proxstep.typing import Float, Tensor

GUARD = 1e-8
NO_INPUT_GRADIENT = "Full backward hook is firing when gradients are computed"
"""What torch says of Opacus's hook on the embedding, whose input is tokens."""

Contract = Callable[[Tensor, Tensor], Tensor]
"""A parameter's gradient from (per-sequence gradients with B first, coefficient_B)."""


def euclidean(grad_sample: Tensor, coefficient_B: Float[Tensor, " batch"]) -> Tensor:
    """Return -sum_b coefficient_b / |G_b| G_b."""
    norm_sq_B = grad_sample.flatten(1).float().square().sum(dim=1)
    return _weighted_sum(grad_sample, coefficient_B * (norm_sq_B + GUARD).rsqrt())


def natural(grad_sample: Tensor, coefficient_B: Float[Tensor, " batch"]) -> Tensor:
    """Return -sum_b weight_b G_b with weight = (K + c I)^-1 coefficient, c the mean eigenvalue."""
    grad_BN = grad_sample.flatten(1).float()
    ntk_BB = grad_BN @ grad_BN.mT
    identity_BB = torch.eye(len(ntk_BB), device=ntk_BB.device)
    damped_BB = ntk_BB + ntk_BB.diagonal().mean() * identity_BB
    return _weighted_sum(grad_sample, torch.linalg.solve(damped_BB, coefficient_B))


def _weighted_sum(grad_sample: Tensor, weight_B: Float[Tensor, " batch"]) -> Tensor:
    return -torch.tensordot(weight_B.to(grad_sample.dtype), grad_sample, dims=1)


@contextmanager
def _quiet(message: str) -> Iterator[None]:
    """Ignore one warning of the libraries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


class VmapGradients:
    """Per-sequence gradients by torch.func: vmap over the sequences of grad.

    Args:
        model: An untied model.
        contract: `euclidean` or `natural`.
    """

    def __init__(self, model: nn.Module, contract: Contract) -> None:
        self._model, self._contract = model, contract

    def __call__(self, batch: Batch) -> None:
        """Run one microbatch and leave the gradient in `.grad`."""
        self._model.zero_grad()
        for name, grad_sample in per_sequence_gradients(self._model, batch).items():
            parameter = self._model.get_parameter(name)
            parameter.grad = self._contract(grad_sample, batch.coefficient_B)


def per_sequence_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return d log pi(y_b | x_b) of every parameter by name, with B in front of its shape."""

    def log_prob(parameters: dict[str, Tensor], token_T: Tensor) -> Tensor:
        def call(**keywords: Any) -> Any:
            return functional_call(model, parameters, kwargs=keywords)

        return completion_log_probs(call, token_T[None], batch.num_prompt).sum()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with _quiet("There is a performance drop because"):
        return vmap(grad(log_prob), in_dims=(None, 0))(parameters, batch.token_BT)


class OpacusGradients:
    """Per-sequence gradients by Opacus's hooks.

    Args:
        model: An untied model in training mode; it is hooked for good.
        contract: `euclidean` or `natural`.
    """

    def __init__(self, model: nn.Module, contract: Contract) -> None:
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._contract = contract

    def __call__(self, batch: Batch) -> None:
        """Run one microbatch and leave the gradient in `.grad`."""
        self._model.zero_grad(set_to_none=True)
        log_prob_B = completion_log_probs(self._model, batch.token_BT, batch.num_prompt)
        with _quiet(NO_INPUT_GRADIENT):
            log_prob_B.sum().backward()
        parameter: Any  # Opacus keeps its results in attributes of its own
        for parameter in self._model.parameters():
            parameter.grad = self._contract(parameter.grad_sample, batch.coefficient_B)
            parameter.grad_sample = None


class OpacusGhost:
    """Ghost clipping: per-sequence norms from one backward, one weight per sequence in a second.

    `.grad` is -sum_b coefficient_b / |G_b| G_b, where |G_b| is taken over all parameters.

    Args:
        model: An untied model in training mode; it is hooked for good.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = GradSampleModuleFastGradientClipping(model, loss_reduction="sum")

    def __call__(self, batch: Batch) -> None:
        """Run one microbatch and leave the gradient in `.grad`."""
        log_prob_B = completion_log_probs(self._model, batch.token_BT, batch.num_prompt)
        with _quiet(NO_INPUT_GRADIENT):
            log_prob_B.sum().backward(retain_graph=True)
        self._model.zero_grad(set_to_none=True)
        weight_B = batch.coefficient_B / self._model.get_norm_sample()
        self._model.disable_hooks()
        with _quiet(NO_INPUT_GRADIENT):
            (-(weight_B * log_prob_B).sum()).backward()
        self._model.enable_hooks()


@register_grad_sampler(Qwen3RMSNorm)
def _rms_norm_gradients(
    layer: Qwen3RMSNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the weight's per-sequence gradients, in the form that Opacus asks for."""
    wide = activations[0].float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    grad_sample = (normal.to(backprops.dtype) * backprops).flatten(1, -2).sum(dim=1)
    return {layer.weight: grad_sample}

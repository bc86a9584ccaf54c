"""The exact Fisher norm of a direction: the yardstick for ISOPO's estimates, on small models.

The policy is autoregressive and each token's score has mean zero given the tokens before it, so the
scores at different positions are uncorrelated under the policy, and equation 1 becomes

    v.F v = E_{y ~ pi} [ sum_t Var_{token ~ pi_t} (J_t v) ],

with pi_t the policy's distribution at position t of the completion y, over the whole vocabulary,
and J_t v the derivative of the logits at t in the direction v. The functions below evaluate the
bracket on given completions: **exact over the next token, conditional on the given prefixes**.
Averaged over completions that the policy sampled it is an unbiased estimate of the Fisher metric of
equation 1; on other text it is the metric on that text's prefixes. ISOPO works parameter by
parameter, so every direction moves one parameter alone: the diagonal blocks of F.

Cost: one forward, then for each direction of each parameter one pass back through the backward
graph of the layers above it, which takes about as long as a forward. That is D times the number of
parameters passes, and the graph stays in memory: for small models only.

Legend for shape suffixes: B sequences, one in each row; T token positions; N completion positions
of all sequences; V vocabulary; D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxstep.errors import ProxstepError
from proxstep.logprobs.logits import token_log_probs
from proxstep.typing import Bool, Float, Int, Tensor

Logits = Callable[[nn.Module], Tensor]
"""Runs the model and returns logits (batch, tokens, vocab): those at [b, t] predict the token at
[b, t] of the masks and tokens beside it (already shifted), over the sampling temperature."""


def exact_fisher_squares(
    model: nn.Module,
    logits_of: Logits,
    response_BT: Bool[Tensor, "batch tokens"],
    directions: Mapping[str, Float[Tensor, "directions ..."]],
) -> dict[str, Float[Tensor, " directions"]]:
    """Return v.F v of each direction, conditional on the prefixes of the given sequences.

    v.F v = (1/B) sum_b sum_{t in b} Var_{token ~ pi_t} (J_t v)

    Args:
        model: The policy, in evaluation mode: dropout would make J another one in every call.
        logits_of: As described at `Logits`.
        response_BT: True at the completion positions of each sequence.
        directions: Directions of some of the model's trainable parameters, by name, stacked along
            the first dimension. ISOPO's are each sequence's own gradient: `sequence_gradients`.

    Returns:
        For each name, one square per direction, in nats per unit of the direction squared: for
        small h the KL divergence that the step h v causes is h^2/2 times it.

    Raises:
        ProxstepError: As `exact_fisher_terms`.

    Source: arXiv 2512.23353, equation 1.

    Differs: exact given the prefixes, which equation 1 averages over. Where the directions are the
        gradients of the same sequences, the prefixes are not independent of them, in a small batch
        noticeably so; pass more, or other, sequences for a metric that is. A tied weight is one
        parameter with its total gradient, whereas ISOPO measures and scales each use by itself.
    """
    terms = exact_fisher_terms(model, logits_of, response_BT, directions)
    return {name: term_DB.mean(dim=1) for name, term_DB in terms.items()}


def exact_fisher_terms(
    model: nn.Module,
    logits_of: Logits,
    response_BT: Bool[Tensor, "batch tokens"],
    directions: Mapping[str, Float[Tensor, "directions ..."]],
) -> dict[str, Float[Tensor, "directions batch"]]:
    """Return each sequence's term of each direction's v.F v: `exact_fisher_squares` is their mean.

    J v is found without forward-mode differentiation: J^T u is linear in u, and its gradient with
    respect to u, against v, is J v. Attention runs in torch's plain math form meanwhile, since the
    fused kernels cannot be differentiated twice.

    Args:
        model: The policy. If an `Isopo` is installed on it, call this inside `isopo.off()`.
        logits_of: As described at `Logits`.
        response_BT: True at the completion positions of each sequence.
        directions: As for `exact_fisher_squares`.

    Returns:
        For each name, sum_{t in b} Var_{token ~ pi_t} (J_t v) by direction and sequence.

    Raises:
        ProxstepError: If a direction has no trainable parameter of its name and shape, or the
            logits do not fit the mask or have no graph.
    """
    parameters = _parameters_of(model, directions)
    logits_NV = _differentiable_logits(model, logits_of, response_BT)[response_BT]
    sequence_N = response_BT.nonzero()[:, 0]
    prob_NV = logits_NV.detach().to(_at_least_float32(logits_NV)).softmax(dim=-1)
    cotangent_NV = torch.zeros_like(logits_NV, requires_grad=True)
    pulled = torch.autograd.grad(
        logits_NV, list(parameters.values()), cotangent_NV, create_graph=True, allow_unused=True
    )
    terms = {}
    for name, pulled_back in zip(parameters, pulled, strict=True):
        rows = []
        for direction in directions[name]:
            tangent_NV = _push_forward(pulled_back, cotangent_NV, direction).to(prob_NV.dtype)
            zeros_B = prob_NV.new_zeros(response_BT.shape[0])
            rows.append(zeros_B.index_add_(0, sequence_N, _variance(tangent_NV, prob_NV)))
        terms[name] = torch.stack(rows)
    return terms


def sequence_gradients(
    model: nn.Module,
    logits_of: Logits,
    token_BT: Int[Tensor, "batch tokens"],
    response_BT: Bool[Tensor, "batch tokens"],
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Return G_b = d log pi(y_b) / d theta of every trainable parameter, by plain autograd.

    Args:
        model: The policy. If an `Isopo` is installed on it, call this inside `isopo.off()`.
        logits_of: As described at `Logits`.
        token_BT: The tokens that the logits predict.
        response_BT: True at the completion positions of each sequence.

    Returns:
        For each name the B gradients, stacked; zeros where no gradient reaches the parameter.

    Raises:
        ProxstepError: If the logits do not fit the mask or have no graph.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logits_BTV = _differentiable_logits(model, logits_of, response_BT)
    log_prob_BT = token_log_probs(logits_BTV, token_BT)
    rows = [
        torch.autograd.grad(
            log_prob_BT[b][response_BT[b]].sum(),
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for b in range(len(response_BT))
    ]
    columns = zip(*rows, strict=True)
    return {name: torch.stack(column) for name, column in zip(parameters, columns, strict=True)}


def _variance(value_NV: Tensor, prob_NV: Tensor) -> Tensor:
    """Return the variance over the vocabulary, x^T (diag(pi) - pi pi^T) x, at each position."""
    mean_N1 = (prob_NV * value_NV).sum(dim=-1, keepdim=True)
    return (prob_NV * (value_NV - mean_N1).square()).sum(dim=-1)


def _push_forward(pulled_back: Tensor | None, cotangent_NV: Tensor, direction: Tensor) -> Tensor:
    """Return J v from J^T u: None stands for a parameter that the logits do not depend on."""
    if pulled_back is None:
        return torch.zeros_like(cotangent_NV)
    (tangent_NV,) = torch.autograd.grad(pulled_back, cotangent_NV, direction, retain_graph=True)
    return tangent_NV


def _differentiable_logits(model: nn.Module, logits_of: Logits, response_BT: Tensor) -> Tensor:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits_BTV = logits_of(model)
    if logits_BTV.dim() != 3 or logits_BTV.shape[:2] != response_BT.shape:
        raise ProxstepError(
            f"logits_of returned shape {tuple(logits_BTV.shape)}, but response_BT has shape "
            f"{tuple(response_BT.shape)}: return (batch, tokens, vocab), and leave out the same "
            "position in both: the first token's in the mask, the last one's in the logits"
        )
    if not logits_BTV.requires_grad:
        raise ProxstepError(
            "logits_of returned logits without a graph: run the model without no_grad or detach, "
            "with parameters that require gradients"
        )
    return logits_BTV


def _parameters_of(model: nn.Module, directions: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, direction in directions.items():
        if name not in trainable:
            raise ProxstepError(
                f"directions names {name!r}, which is no trainable parameter of the model; a tied "
                "weight has the first of its names in model.named_parameters()"
            )
        if direction.shape[1:] != trainable[name].shape or direction.shape[0] == 0:
            raise ProxstepError(
                f"directions[{name!r}] has shape {tuple(direction.shape)}: stack one or more "
                f"directions of shape {tuple(trainable[name].shape)} along a new first dimension"
            )
    return {name: trainable[name] for name in directions}


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)

"""How far a step moves the policy, in nats, from the log-probabilities of a few sequences.

A step Delta changes the log-probability of token t of sequence b by x_bt = <grad log pi_bt, Delta>
to first order, and its sequence's by <G_b, Delta> = sum_t x_bt. For sequences that the policy
sampled, its KL divergence per sequence is to second order

    KL = 1/2 E_b <G_b, Delta>^2 = 1/2 E_b sum_t x_bt^2

since tokens' scores have mean 0 whatever came before, so that the cross terms x_bs x_bt vanish on
average. The second form is what is used: it has less noise, and not the cross terms' bias where the
step was made from these very sequences.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxstep.logprobs.tokens import widest_dtype
from proxstep.typing import Bool, Float, Tensor

LogProbs = Callable[[], tuple[Tensor, Tensor]]
"""Scores a few sequences under the model as it is: the log-probabilities of their tokens in nats,
(batch, tokens), and which of these count."""

_SHARE, _FEWEST = 16, 8


def judges(count: int, given: int | None) -> Tensor:
    """Return which sequences of a minibatch judge its step: some, evenly spread over its prompts.

    Args:
        count: Sequences of the minibatch.
        given: How many of them; None for a sixteenth, and 8 at least.

    >>> judges(64, None), judges(3, 8)
    (tensor([ 0,  9, 18, 27, 36, 45, 54, 63]), tensor([0, 1, 2]))
    """
    number = given or max(_FEWEST, count // _SHARE)
    return torch.linspace(0, count - 1, min(number, count)).round().long()


def quadratic_kl(
    slope_BT: Float[Tensor, "batch tokens"], response_BT: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return 1/2 sum_t x_bt^2 for each sequence, in nats.

    Args:
        slope_BT: x_bt, the derivative of each token's log-probability in the step's direction.
        response_BT: True at the tokens that count.
    """
    slope_BT = slope_BT.to(widest_dtype(slope_BT.device))
    return slope_BT.square().masked_fill(~response_BT, 0.0).sum(dim=1) / 2


def sampled_kl(
    log_prob_BT: Float[Tensor, "batch tokens"],
    other_log_prob_BT: Float[Tensor, "batch tokens"],
    response_BT: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, " batch"]:
    """Return an estimate of KL(policy || other) for each sequence, in nats: never negative.

    sum_t exp(d_t) - 1 - d_t with d = log other - log policy: without bias where the policy sampled
    the tokens, and to second order 1/2 d^2.

    Args:
        log_prob_BT: The policy's log-probabilities of the sampled tokens, in nats.
        other_log_prob_BT: The other policy's.
        response_BT: True at the tokens that count.

    Source: Schulman, "Approximating KL divergence" (2020), k3.
    """
    precise = widest_dtype(log_prob_BT.device)
    difference_BT = other_log_prob_BT.to(precise) - log_prob_BT.to(precise)
    difference_BT = difference_BT.masked_fill(~response_BT, 0.0)
    return (difference_BT.expm1() - difference_BT).sum(dim=1)


def slopes(
    model: nn.Module, log_probs: LogProbs, direction: Mapping[nn.Parameter, Tensor]
) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"], Tensor]:
    """Return log-probabilities, x_bt and which tokens count, exactly, by forward-mode derivatives.

    It costs about three forward passes and holds no graph. Attention falls back to plain matrix
    products, since fused kernels have no forward derivative.

    Args:
        model: The policy.
        log_probs: Scores the sequences; run once.
        direction: Delta, for each parameter that moves.
    """
    with (
        torch.no_grad(),
        _plain_attention(),
        forward_ad.dual_level(),
        _moving(model, direction),
    ):
        log_prob_BT, response_BT = log_probs()
        primal_BT, slope_BT = forward_ad.unpack_dual(log_prob_BT)
        # Copies: a dual tensor's parts do not outlive its level.
        slope_BT = torch.zeros_like(primal_BT) if slope_BT is None else slope_BT.clone()
        return primal_BT.clone(), slope_BT, response_BT


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Use no fused kernel for attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _moving(model: nn.Module, direction: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Put dual tensors in the parameters' places; a tied weight is one tensor in all of them."""
    duals = {id(p): forward_ad.make_dual(p.detach(), tangent) for p, tangent in direction.items()}
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in duals
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = duals[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter

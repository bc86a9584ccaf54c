"""From a sequence-level objective to one coefficient per sequence: the hand-over to ISOPO.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

from typing import Any

import torch

from proxstep.algorithms.base import ALGORITHMS, Algorithm
from proxstep.algorithms.checks import check_inputs
from proxstep.errors import ProxstepError
from proxstep.typing import Bool, Float, Tensor


def sequence_coefficients(
    algorithm: Algorithm,
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    **hyper: Any,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], dict[str, Float[Tensor, " batch"]]]:
    """Return the weight with which the objective pushes each sequence's log-probability up.

    coefficient_b = -dL / d log pi(y_b), so that -grad L = sum_b coefficient_b grad log pi(y_b).

    The coefficients carry the loss's scale: with the aggregation's counts given, those of the
    step's microbatches are the coefficients of the whole batch.

    Args:
        algorithm: A sequence-level one of `ALGORITHMS`, or one's own.
        log_probs: The policy's log-probabilities of the sampled tokens, in nats; only their values
            are used.
        old_log_probs: The second argument of the objective, in nats.
        advantages: The third argument of the objective.
        response_mask: True at the response's tokens.
        **hyper: The objective's hyper-parameters and `aggregation`.

    Returns:
        The coefficients (per nat; 0 for a sequence without response tokens), the loss and its
        metrics, all without gradient.

    Raises:
        ProxstepError: The objective is token-level, or its gradient differs between the tokens of a
            sequence.

    >>> log_probs, advantages = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([1.0, -3.0])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> coefficient_B, _, _ = sequence_coefficients(
    ...     ALGORITHMS["reinforce"], log_probs, log_probs, advantages, mask
    ... )
    >>> coefficient_B.tolist()
    [0.5, -1.5]
    """
    if algorithm.level != "sequence":
        names = ", ".join(name for name, known in ALGORITHMS.items() if known.level == "sequence")
        raise ProxstepError(
            f"{algorithm.name} is a token-level objective: its gradient differs from token to "
            "token, so a sequence has no single coefficient to hand to ISOPO. Objectives that have "
            f"one: {names}."
        )
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    with torch.enable_grad():
        leaf_BT = log_probs.detach().requires_grad_()
        loss, metrics = algorithm.loss(leaf_BT, old_log_probs, advantages, response_mask, **hyper)
        (grad_BT,) = torch.autograd.grad(loss, leaf_BT)
    grad_B = gradient_by_sequence(
        grad_BT,
        response_mask,
        f"{algorithm.name} is declared sequence-level, but its gradient differs between the tokens "
        'of a sequence: declare it with level="token".',
    )
    return -grad_B, loss.detach(), metrics


def gradient_by_sequence(
    grad_BT: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    otherwise: str,
) -> Float[Tensor, " batch"]:
    """Return the one number that a loss's gradient is at all response tokens of a sequence.

    Args:
        grad_BT: The gradient with respect to the tokens' log-probabilities.
        response_mask: True at the response's tokens.
        otherwise: What to say where there is no such number.

    Returns:
        The gradient with respect to log pi(y_b); 0 for a sequence without response tokens.

    Raises:
        ProxstepError: The gradient differs between the tokens of a sequence.
    """
    grad_BT = grad_BT.masked_fill(~response_mask, 0.0)
    first_token_B = response_mask.to(torch.uint8).argmax(dim=-1, keepdim=True)
    grad_B = grad_BT.gather(1, first_token_B).squeeze(1)
    unequal_BT = ~torch.isclose(grad_BT, grad_B[:, None], rtol=1e-4, atol=0.0) & response_mask
    if unequal_BT.any():
        raise ProxstepError(otherwise)
    return grad_B

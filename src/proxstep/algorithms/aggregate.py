"""From one value per token to the scalar loss, and to its gradient by sequence.

Shapes: B sequences, T token positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

import torch

from proxstep.errors import ProxstepError, did_you_mean
from proxstep.logprobs.tokens import masked_mean, masked_sum
from proxstep.typing import Bool, Float, Tensor


def check_inputs(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor
) -> None:
    """Raise ProxstepError unless the four tensors of an objective fit together."""
    given = {"log_probs": log_probs, "old_log_probs": old_log_probs, "advantages": advantages}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = getattr(value, "dtype", type(value).__name__)
            raise ProxstepError(f"{name} is {what}; it must be a tensor of floating-point numbers.")
    if not isinstance(response_mask, Tensor):
        raise ProxstepError(f"response_mask is {type(response_mask).__name__}; pass a tensor.")
    shape = tuple(log_probs.shape)
    if len(shape) != 2:
        raise ProxstepError(f"log_probs has shape {shape}; it must be (batch, tokens).")
    for name, tensor in (("old_log_probs", old_log_probs), ("response_mask", response_mask)):
        if tensor.shape != log_probs.shape:
            raise ProxstepError(
                f"{name} has shape {tuple(tensor.shape)}; it must have that of log_probs, {shape}."
            )
    if advantages.shape != shape[:1]:
        raise ProxstepError(
            f"advantages has shape {tuple(advantages.shape)}; it must be {shape[:1]}, one per "
            "sequence (from per-token advantages, pass one column)."
        )
    if response_mask.dtype != torch.bool:
        raise ProxstepError(f"response_mask is {response_mask.dtype}: pass response_mask.bool().")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ProxstepError, with the nearest choice, unless the value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        hint = did_you_mean(value, choices) or "."
        raise ProxstepError(f"{name} is {value!r}{hint} Choices: {', '.join(choices)}.")


def check_literal(name: str, value: object, literal: Any) -> None:
    """Raise ProxstepError unless the value is one of a literal's."""
    check_choice(name, value, get_args(literal))


def check_number(name: str, value: Any, low: float = 0.0, *, above: bool = False) -> None:
    """Raise ProxstepError unless a value is a finite number, of a least size."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ProxstepError(f"{name} is {value!r}, a {type(value).__name__}; it must be a number.")
    if not math.isfinite(value) or value < low or (above and value == low):
        limit = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
        raise ProxstepError(f"{name} is {value!r}; it must be a finite number{limit}.")


def as_tensor(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """Return an argument as a tensor on the device of another; lists and arrays keep their values.

    Args:
        name: Of the argument.
        value: A tensor, a NumPy array, or a list of numbers.
        like: Tensor on the wanted device.

    Raises:
        ProxstepError: If it is none of these.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(value) if hasattr(value, "dtype") else _from_lists(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ProxstepError(
                f"{name} must be a tensor, a NumPy array or a list of numbers: {error}"
            ) from None
    if value.is_complex() or value.is_meta or value.layout is not torch.strided:
        raise ProxstepError(f"{name} must be an ordinary tensor of real numbers")
    return value if like is None or value.device == like.device else value.to(like.device)


def _from_lists(value: Any) -> Tensor:
    """Return lists of numbers as a tensor, floats in float64, which keeps all digits."""
    found = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if found.is_floating_point() else found


def as_integers(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """Return an argument as a tensor of integers.

    Raises:
        ProxstepError: If it holds anything else.
    """
    found = as_tensor(name, value, like)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise ProxstepError(f"{name} must be integers, got {found.dtype}")
    return found


def as_mask(name: str, value: Any, like: Tensor) -> Tensor:
    """Return an argument as a mask in the shape of a tensor; 0 and 1 stand for False and True.

    Raises:
        ProxstepError: If its shape or its type is another.
    """
    found = as_tensor(name, value, like)
    if found.is_floating_point():
        raise ProxstepError(f"{name} is {found.dtype}: pass {name}.bool()")
    if found.shape != like.shape:
        raise ProxstepError(
            f"{name} has shape {tuple(found.shape)}; it must be {tuple(like.shape)}, as what it "
            "belongs to"
        )
    return found.bool()


def check_positive(name: str, value: float) -> None:
    """Raise ProxstepError unless the number is finite and above 0."""
    check_number(name, value, above=True)


def check_clip_range(clip_ratio_low: float, clip_ratio_high: float) -> None:
    """Raise ProxstepError unless both clip widths are 0 or more."""
    for name, value in (("clip_ratio_low", clip_ratio_low), ("clip_ratio_high", clip_ratio_high)):
        if not value >= 0:
            raise ProxstepError(
                f"{name} is {value}; it is a width, 0 or more: the ratio is clipped to "
                "[1 - clip_ratio_low, 1 + clip_ratio_high]."
            )


# What every objective returns: the scalar loss, and detached metrics of one entry per sequence.
LossAndMetrics = tuple[Float[Tensor, ""], dict[str, Float[Tensor, " batch"]]]

LOSS_AGG_MODES = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
"""How token values become one number, with verl's names."""


@dataclass(frozen=True)
class Aggregation:
    """How token values become one number, with the counts of the whole optimizer step.

    With the counts given, the losses of the step's microbatches add up exactly to the loss of the
    whole batch. A count that is None is taken from the tensors at hand: right only when they are
    the whole batch.

    Attributes:
        mode: One of `LOSS_AGG_MODES`; the names are verl's.
        num_sequences: Sequences of the step that have a response token; for the seq-mean modes.
        num_tokens: Response tokens of the step; for token-mean.
        max_length: Divisor of seq-mean-token-sum-norm, in tokens: a constant of the run, such as
            max_completion_length. None means the width of the tensors at hand, which varies with
            padding.
        sequence_weights: Multiplies each sequence's values, such as by how much likelier it was
            under another policy than under the one that sampled it (`importance_weights`); None for
            1. The counts stay as they are, and no gradient reaches the weights.

    Raises:
        ProxstepError: The mode is unknown or a count is below 1.
    """

    mode: str
    num_sequences: int | None = None
    num_tokens: int | None = None
    max_length: int | None = None
    sequence_weights: Float[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        check_choice("loss_agg_mode", self.mode, LOSS_AGG_MODES)
        for name in ("num_sequences", "num_tokens", "max_length"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ProxstepError(f"{name} is {count}; it must be 1 or more, or None.")


# The defaults of the objectives: whole batch at hand.
TOKEN_MEAN = Aggregation("token-mean")
"""The mean over all response tokens."""
SEQ_MEAN_TOKEN_SUM = Aggregation("seq-mean-token-sum")
"""The mean over sequences of their tokens' sum."""
SEQ_MEAN_TOKEN_MEAN = Aggregation("seq-mean-token-mean")
"""The mean over sequences of their tokens' mean."""
SEQ_MEAN_TOKEN_SUM_NORM = Aggregation("seq-mean-token-sum-norm")
"""The mean over sequences of their tokens' sum, over the longest completion allowed."""


def aggregate(
    value_BT: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    aggregation: Aggregation,
) -> Float[Tensor, ""]:
    """Return the scalar that one value per token adds up to.

    token-mean:              sum_bt x_bt / num_tokens
    seq-mean-token-sum:      sum_b sum_t x_bt / num_sequences
    seq-mean-token-mean:     sum_b (sum_t x_bt / length_b) / num_sequences
    seq-mean-token-sum-norm: sum_b (sum_t x_bt / max_length) / num_sequences

    With the aggregation's sequence weights, every x_bt is w_b x_bt.

    Args:
        value_BT: One value per token position; anything, NaN included, where the mask is false.
        response_mask: True at the response's tokens. A sequence without any is not counted.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The scalar; 0 when no position counts.

    Raises:
        ProxstepError: The aggregation's sequence weights are not one per sequence.

    Source: arXiv 2402.03300, equation 3 (seq-mean-token-mean); arXiv 2503.14476, section 3.3
    (token-mean); arXiv 2503.20783, section 3.2 (seq-mean-token-sum-norm). Names and counts: verl
    0.9.1.
    """
    mode = aggregation.mode
    length_B = response_mask.sum(dim=-1)
    if mode == "token-mean":
        num_tokens = aggregation.num_tokens or length_B.sum().clamp(min=1)
        return _weighted(masked_sum(value_BT, response_mask), aggregation).sum() / num_tokens
    reduce = masked_mean if mode == "seq-mean-token-mean" else masked_sum
    num_sequences = aggregation.num_sequences or (length_B > 0).sum().clamp(min=1)
    loss = _weighted(reduce(value_BT, response_mask), aggregation).sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        return loss / (aggregation.max_length or response_mask.shape[-1])
    return loss


def _weighted(value_B: Tensor, aggregation: Aggregation) -> Tensor:
    weight_B = aggregation.sequence_weights
    if weight_B is None:
        return value_B
    if weight_B.shape != value_B.shape:
        raise ProxstepError(
            f"sequence_weights has shape {tuple(weight_B.shape)}; it must be "
            f"{tuple(value_B.shape)}, one per sequence of the tensors at hand."
        )
    return weight_B.detach() * value_B


def aggregate_sequences(
    value_B: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    aggregation: Aggregation,
) -> Float[Tensor, ""]:
    """Return the scalar that one value per sequence adds up to, standing at each of its tokens.

    seq-mean-token-mean is the mean over sequences; token-mean weights a sequence by its length.

    Args:
        value_B: One value per sequence.
        response_mask: True at the response's tokens. A sequence without any is not counted.
        aggregation: The mode and the counts of the whole optimizer step.

    Returns:
        The scalar; 0 when no position counts.
    """
    return aggregate(value_B[:, None].expand(response_mask.shape), response_mask, aggregation)


def coefficients_of(
    loss: Callable[..., LossAndMetrics],
    name: str,
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    **hyper: Any,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], dict[str, Float[Tensor, " batch"]]]:
    """Return what `sequence_coefficients` does, of the loss of an algorithm of that name.

    Raises:
        ProxstepError: The loss's gradient differs between the tokens of a sequence.
    """
    check_inputs(log_probs, old_log_probs, advantages, response_mask)
    with torch.enable_grad():
        leaf_BT = log_probs.detach().requires_grad_()
        value, metrics = loss(leaf_BT, old_log_probs, advantages, response_mask, **hyper)
        (grad_BT,) = torch.autograd.grad(value, leaf_BT)
    grad_B = gradient_by_sequence(
        grad_BT,
        response_mask,
        f"{name} is declared sequence-level, but its gradient differs between the tokens "
        'of a sequence: declare it with level="token".',
    )
    return -grad_B, value.detach(), metrics


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

"""Log-probabilities of tokens straight from hidden states, a chunk of logits at a time.

The logits of N token positions over a vocabulary of V need N x V numbers, and their gradient as
many again. Here only those of a chunk of positions exist at a time: forward reduces each chunk to
its log-probabilities, backward computes its logits again.

Legend for shape suffixes: N token positions (rows), D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import wide_dtype
from proxstep.typing import Float, Int, Tensor

CHUNK_BYTES = 2**26
"""What the logits of one chunk may occupy where no chunk size is given."""


@overload
def chunked_log_probs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def chunked_log_probs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def chunked_log_probs(
    hidden_ND: Float[Tensor, "rows features"],
    weight_VD: Float[Tensor, "vocab features"],
    token_N: Int[Tensor, " rows"],
    *,
    bias_V: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> Float[Tensor, " rows"] | tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return log pi(token) at each position, with pi = softmax((hidden @ weight^T + bias) / T).

    Exact, with gradients for hidden states, weight and bias. Leave out the positions whose
    log-probabilities nobody needs (prompt, padding): each costs a row of logits.

    Args:
        hidden_ND: The output layer's inputs at the positions that predict the tokens.
        weight_VD: Its weight. Under autocast it is cast like a linear layer's.
        token_N: The tokens.
        bias_V: Its bias, if any.
        temperature: T, of the sampling.
        chunk_size: Positions whose logits exist at a time; by default as many as fit CHUNK_BYTES.
        with_entropy: Return the entropy over the vocabulary as well.

    Returns:
        Log-probabilities in nats, in float32 or better; with `with_entropy` also the entropies in
        nats, without gradient.

    Raises:
        ProxstepError: If temperature or chunk_size is not positive.
    """
    if not temperature > 0:
        raise ProxstepError(f"temperature must be positive, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ProxstepError(
            f"chunk_size must be a positive number of positions, or None to fit the chunk's logits "
            f"into {CHUNK_BYTES >> 20} MiB, got {chunk_size}"
        )
    hidden_ND, weight_VD, bias_V = autocast_head(hidden_ND, weight_VD, bias_V)
    size = chunk_size or default_chunk_size(weight_VD)
    log_prob_N, entropy_N = ChunkedLogProbs.apply(
        hidden_ND, weight_VD, bias_V, token_N, temperature, size, with_entropy
    )
    return (log_prob_N, entropy_N) if with_entropy else log_prob_N


def default_chunk_size(weight_VD: Float[Tensor, "vocab features"]) -> int:
    """Return how many positions' logits fit CHUNK_BYTES in float32 or better; at least one."""
    return max(1, CHUNK_BYTES // (weight_VD.shape[0] * wide_dtype(weight_VD.dtype).itemsize))


def logits_of(
    hidden_ND: Float[Tensor, "rows features"],
    weight_VD: Float[Tensor, "vocab features"],
    bias_V: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "rows vocab"]:
    """Return (hidden @ weight^T + bias) / temperature.

    The product is computed in the inputs' dtype, as the output layer does; the result is new
    memory in float32 or better.
    """
    logits_NV = nn.functional.linear(hidden_ND, weight_VD, bias_V)
    logits_NV = logits_NV.to(wide_dtype(logits_NV.dtype))
    return logits_NV if temperature == 1 else logits_NV.div_(temperature)


def log_probs_and_exponentials(
    logits_NV: Float[Tensor, "rows vocab"], token_N: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"], Float[Tensor, " rows"]]:
    """Return log pi(token), and pi's numerators and denominators.

    Each row is shifted by its largest logit first, which keeps the digits that `logit -
    logsumexp` would lose where logits are large.

    Args:
        logits_NV: Logits over the temperature; overwritten.
        token_N: The tokens.

    Returns:
        Log-probabilities in nats; exp(logit - largest logit), in the memory of the logits; its sum
        over each row.
    """
    logits_NV.sub_(logits_NV.amax(-1, keepdim=True))
    chosen_N = logits_NV.gather(1, token_N[:, None]).squeeze(1)
    exp_NV = logits_NV.exp_()
    sum_N = exp_NV.sum(-1)
    return chosen_N - sum_N.log(), exp_NV, sum_N


def logit_gradient(
    logits_NV: Float[Tensor, "rows vocab"],
    token_N: Int[Tensor, " rows"],
    upstream_N: Float[Tensor, " rows"],
    temperature: float = 1.0,
) -> Float[Tensor, "rows vocab"]:
    """Return the gradient of sum_n upstream_n log pi(token_n) in the output layer's outputs.

    It is (onehot(token) - pi) * upstream / temperature: the gradient before the division by the
    temperature, so that a linear layer's backward takes it as it is.

    Args:
        logits_NV: Logits over the temperature, as `logits_of` returns them; overwritten.
        token_N: The tokens.
        upstream_N: Gradient of the log-probabilities.
        temperature: Of the sampling.

    Returns:
        The gradient, in the memory of the logits.
    """
    _, exp_NV, sum_N = log_probs_and_exponentials(logits_NV, token_N)
    scale_N = upstream_N.to(exp_NV.dtype) / temperature
    grad_NV = exp_NV.mul_((-scale_N / sum_N)[:, None])
    return grad_NV.scatter_add_(1, token_N[:, None], scale_N[:, None])


class ChunkedLogProbs(torch.autograd.Function):
    """`chunked_log_probs`; keeps hidden states, weight and bias by reference, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        temperature: float,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities and, where they are wanted, entropies."""
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        log_prob_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide_dtype(hidden_ND.dtype))
        entropy_N = torch.empty_like(log_prob_N) if with_entropy else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in _chunks(len(hidden_ND), chunk_size):
                logits_NV = logits_of(hidden_ND[rows], weight_VD, bias_V, temperature)
                log_prob_N[rows], exp_NV, sum_N = log_probs_and_exponentials(
                    logits_NV, token_N[rows]
                )
                if entropy_N is not None:
                    prob_NV = exp_NV.div_(sum_N[:, None])
                    entropy_N[rows] = torch.special.entr(prob_NV, out=prob_NV).sum(-1)
                    del prob_NV
                del logits_NV, exp_NV  # before the next chunk's exist
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        return log_prob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute each chunk's logits again, and add up what follows from them."""
        hidden_ND, weight_VD, bias_V, token_N = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_rest = ctx.needs_input_grad
        grad_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_VD = _wide_zeros_like(weight_VD) if need_weight else None
        grad_V = _wide_zeros_like(bias_V) if need_bias else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in _chunks(len(hidden_ND), ctx.chunk_size):
                logits_NV = logits_of(hidden_ND[rows], weight_VD, bias_V, ctx.temperature)
                grad_NV = logit_gradient(
                    logits_NV, token_N[rows], upstream_N[rows], ctx.temperature
                )
                if grad_V is not None:
                    grad_V += grad_NV.sum(0)
                narrow_NV = grad_NV.to(weight_VD.dtype)
                if grad_ND is not None:
                    torch.mm(narrow_NV, weight_VD, out=grad_ND[rows])
                if grad_VD is not None:
                    _add_product(grad_VD, narrow_NV.mT, hidden_ND[rows])
                del logits_NV, grad_NV, narrow_NV  # before the next chunk's exist
        return (
            grad_ND,
            None if grad_VD is None else grad_VD.to(weight_VD.dtype),
            None if grad_V is None else grad_V.to(bias_V.dtype),
            *(None,) * 4,
        )


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _wide_zeros_like(value: Tensor) -> Tensor:
    return torch.zeros_like(value, dtype=wide_dtype(value.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def autocast_head(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would for a linear layer; the casts' own backward widens the gradients."""
    device = hidden_ND.device.type
    if not torch.is_autocast_enabled(device) or hidden_ND.dtype == torch.float64:
        return hidden_ND, weight_VD, bias_V
    dtype = torch.get_autocast_dtype(device)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    return hidden_ND.to(dtype), weight_VD.to(dtype), bias_V

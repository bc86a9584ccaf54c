"""What a policy gives to tokens, and what becomes of one number per token.

Legend for shape suffixes: B sequences, T token positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from proxstep.errors import ProxstepError
from proxstep.typing import Bool, Float, Int, Tensor


def masked_sum(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return each row's sum over the positions where the mask is true.

    Masked-out values may be anything, infinities and NaN included: they reach neither the sum nor
    its gradient.

    Args:
        values: One value per token position.
        mask: True where the position counts.

    Returns:
        One sum per row; 0 for a row without a true position.
    """
    return values.masked_fill(~mask, 0.0).sum(dim=-1)


def masked_mean(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Return each row's mean over the positions where the mask is true.

    Args:
        values: One value per token position.
        mask: True where the position counts.

    Returns:
        One mean per row; 0 for a row without a true position.
    """
    return masked_sum(values, mask) / mask.sum(dim=-1).clamp(min=1)


# exp(20) = 4.9e8 is far outside every clip range, and its square is finite in float32. verl's, too.
LOG_RATIO_BOUND = 20.0


def token_log_ratio(
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """Return log pi - log pi_old at the response's tokens and 0 elsewhere.

    The old log-probabilities carry no gradient, and what stands at masked positions (NaN,
    infinities) goes no further.

    Args:
        log_probs: The policy's log-probabilities of the sampled tokens, in nats.
        old_log_probs: The old policy's, in nats.
        response_mask: True at the response's tokens.

    Returns:
        The log-ratio of each token, in nats.
    """
    return (log_probs - old_log_probs.detach()).masked_fill(~response_mask, 0.0)


def bounded(log_ratio: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Return the log-ratio limited to `LOG_RATIO_BOUND` either way; its exponential stays finite.

    Beyond the bound the gradient is 0: without it, an infinite ratio turns the zero gradient of a
    clipped token into NaN.

    Args:
        log_ratio: In nats.
    """
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio_metrics(
    log_ratio_BT: Float[Tensor, "batch tokens"], response_mask: Bool[Tensor, "batch tokens"]
) -> dict[str, Float[Tensor, " batch"]]:
    """Return the metrics that every token-ratio objective reports, one entry per sequence.

    `ratio` is the mean ratio of the tokens; `kl_old_policy` the mean of log pi_old - log pi, an
    unbiased estimate of KL(old || policy) in nats per token when the old policy sampled the tokens.

    Args:
        log_ratio_BT: log pi - log pi_old of each token, in nats.
        response_mask: True at the response's tokens.
    """
    log_ratio_BT = log_ratio_BT.detach()
    return {
        "ratio": masked_mean(bounded(log_ratio_BT).exp(), response_mask),
        "kl_old_policy": -masked_mean(log_ratio_BT, response_mask),
    }


KlEstimator = Literal["k1", "k2", "k3"]


def token_log_probs(
    logits_BTV: Float[Tensor, "batch tokens vocab"], token_BT: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Return log pi(token) at each position, in nats.

    Args:
        logits_BTV: Logits that predict `token_BT`, already divided by the sampling temperature and
            already shifted.
        token_BT: The tokens.

    Returns:
        Log-probabilities in float32 or better.
    """
    wide_BTV = wide(logits_BTV)
    chosen_BT = wide_BTV.gather(-1, token_BT[..., None]).squeeze(-1)
    return chosen_BT - wide_BTV.logsumexp(-1)


def entropy(logits_BTV: Float[Tensor, "batch tokens vocab"]) -> Float[Tensor, "batch tokens"]:
    """Return the entropy of the distribution over the vocabulary at each position, in nats.

    Args:
        logits_BTV: Divided by the sampling temperature.
    """
    log_prob_BTV = wide(logits_BTV).log_softmax(-1)
    return -(log_prob_BTV.exp() * log_prob_BTV).sum(-1)


def kl_divergence(
    logits_BTV: Float[Tensor, "batch tokens vocab"],
    other_logits_BTV: Float[Tensor, "batch tokens vocab"],
) -> Float[Tensor, "batch tokens"]:
    """Return KL(p || q) over the vocabulary at each position, in nats.

    Args:
        logits_BTV: Those of p.
        other_logits_BTV: Those of q.
    """
    log_p_BTV = wide(logits_BTV).log_softmax(-1)
    log_q_BTV = wide(other_logits_BTV).log_softmax(-1)
    return (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1)


def kl_estimate(
    log_prob_BT: Float[Tensor, "batch tokens"],
    other_log_prob_BT: Float[Tensor, "batch tokens"],
    kind: str,
) -> Float[Tensor, "batch tokens"]:
    """Return an estimate of KL(p || q) at each token that p sampled, from that token alone.

    With x = log q - log p of the token:

        k1 = -x               unbiased, of either sign
        k2 = x^2 / 2          biased, never negative
        k3 = exp(x) - 1 - x   unbiased, never negative

    As a term of a loss, the gradient passes through log p but not through the choice of the token.
    Its expectation over tokens from p itself is then, exactly:

        k1: 0    k2: the gradient of KL(p || q)    k3: the gradient of KL(q || p)

    so that the estimator with the right value (k3, or k1) is not the one with the right gradient.

    Args:
        log_prob_BT: log p of the sampled tokens, in nats.
        other_log_prob_BT: log q of the same tokens.
        kind: Which estimator.

    Returns:
        One estimate per token, in nats.

    Raises:
        ProxstepError: If there is no such estimator.

    Source: J. Schulman, "Approximating KL divergence" (2020).

    Differs: k3's x is bounded at 20 nats from above, beyond which exp(x) would drown every other
        token before it overflows; there its gradient is 0.
    """
    log_ratio_BT = other_log_prob_BT - log_prob_BT
    if kind == "k1":
        return -log_ratio_BT
    if kind == "k2":
        return log_ratio_BT.square() / 2
    if kind == "k3":
        log_ratio_BT = log_ratio_BT.clamp(max=LOG_RATIO_BOUND)
        return log_ratio_BT.expm1() - log_ratio_BT
    raise ProxstepError(f"the KL estimator is {kind!r}; it must be k1, k2 or k3.")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums are kept in: float32, or the dtype itself where it has more digits."""
    return torch.promote_types(dtype, torch.float32)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the type with the most digits that a device has: float64, or float32 on mps."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(value: Tensor) -> Tensor:
    """Return the value in float32, or as it is where it has more digits."""
    return value.to(wide_dtype(value.dtype))


class SumOfLogProbs(Tensor):
    """The sum of a microbatch's log-probabilities: another loss is not added to it.

    In the same backward, the other loss's gradient would be taken for the log-probabilities'.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and refuse one that puts something else with a graph to the sum."""
        del types
        given = [*args, *(kwargs or {}).values()]
        if func in (Tensor.backward, torch.autograd.grad):
            with torch._C.DisableTorchFunctionSubclass():
                first = [x.as_subclass(Tensor) for x in _tensors(args[:1])]
                tracked = all(x.requires_grad for x in first)
            if not tracked:
                raise ProxstepError(
                    "microbatch.objective(...) has no graph: it was called under no_grad or "
                    "inference_mode, or detached"
                )
            args = (first if isinstance(args[0], (tuple, list)) else first[0], *args[1:])
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            others = [x for x in _tensors(given) if x.requires_grad and not isinstance(x, cls)]
        if others and torch.is_grad_enabled():
            raise ProxstepError(
                "another loss was added to microbatch.objective(...), or multiplied with it: its "
                "gradient would be taken for that of the log-probabilities. Give it a forward and "
                "a backward of its own inside isopo.off()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if type(result) is Tensor and result.requires_grad:
                return result.as_subclass(cls)
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)

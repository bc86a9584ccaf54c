"""The soft punishment of completions that come near the longest allowed length."""

from __future__ import annotations

from collections.abc import Iterable

from proxstep.errors import ProxstepError


def overlong_punishment(
    lengths: Iterable[int], *, max_length: int, buffer: int, penalty: float = 1.0
) -> list[float]:
    """Return what is added to the reward of each completion for its length.

        0                                             where length <= max_length - buffer
        -penalty (length - max_length + buffer) / buffer   from there to max_length
        -penalty                                      beyond

    A completion that was cut off has max_length tokens, and so the whole penalty.

    Args:
        lengths: Of the completions, in tokens, end token included.
        max_length: Longest allowed completion, in tokens.
        buffer: Tokens before max_length over which the punishment grows; 1 to max_length.
        penalty: The largest punishment, in reward units.

    Returns:
        One number for each completion, from -penalty to 0, in reward units.

    Raises:
        ProxstepError: If the buffer does not lie in 1 to max_length.

    Source: arXiv 2503.14476, equation 13 (L_cache is the buffer); verl's `overlong_buffer`.

    Differs: the equation's largest punishment is 1; verl's `penalty_factor` is `penalty`.

    >>> overlong_punishment([4, 6, 7, 8], max_length=8, buffer=4)
    [0.0, -0.5, -0.75, -1.0]
    """
    if not 1 <= buffer <= max_length:
        raise ProxstepError(
            f"the overlong buffer is {buffer} tokens; it must be 1 to {max_length}, the longest "
            "completion"
        )
    over = (min(max(length - max_length + buffer, 0), buffer) for length in lengths)
    return [-penalty * tokens / buffer if tokens else 0.0 for tokens in over]

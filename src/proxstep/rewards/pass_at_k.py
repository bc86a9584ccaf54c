"""How likely k sampled completions hold a right one, estimated from n of them without bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

from proxstep.errors import ProxstepError


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k completions is right.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Args:
        num_samples: n, completions of one prompt.
        num_right: c, how many of them are right.
        k: How many one may draw, at most n.

    Raises:
        ProxstepError: If not 0 <= c <= n or not 1 <= k <= n.

    Source: arXiv 2107.03374, equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    if not (0 <= num_right <= num_samples and 1 <= k <= num_samples):
        raise ProxstepError(f"pass@{k} of {num_right} right among {num_samples} is not defined")
    wrong = math.comb(num_samples - num_right, k)
    return 1.0 - wrong / math.comb(num_samples, k)


def sampled_scores(rewards: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Return avg@n, and pass@k for k = 1, 2, 4, ... and n, averaged over prompts.

    Args:
        rewards: P times n rewards. A completion is right where its reward is at least 1; None, the
            function does not apply, is not right, and does not count in avg@n.

    >>> sampled_scores([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    {'avg@3': 0.25, 'pass@1': 0.16666666666666669, 'pass@2': 0.33333333333333337, 'pass@3': 0.5}
    """
    n = len(rewards[0])
    right = [sum(reward is not None and reward >= 1 for reward in row) for row in rewards]
    given = [reward for row in rewards for reward in row if reward is not None]
    scores = {f"avg@{n}": sum(given) / len(given) if given else math.nan}
    for k in [*(2**i for i in range(n.bit_length()) if 2**i < n), n]:
        scores[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in right) / len(right)
    return scores

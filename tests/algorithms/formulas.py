"""What each paper says of its algorithm: the formula for one token in plain numbers, its values.

Nothing here is shared with the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tests.algorithms.loss_cases import Case, clip, loop_aggregate


@dataclass
class Sequence:
    """The response's tokens of one sequence.

    Attributes:
        new: The policy's log-probabilities.
        old: The old policy's.
        fixed: The policy's where its gradient is taken: what a stop-gradient sees.
        advantage: Of the sequence.
    """

    new: list[float]
    old: list[float]
    fixed: list[float]
    advantage: float

    @property
    def delta(self) -> float:
        """The sum of the log-ratios."""
        return sum(n - o for n, o in zip(self.new, self.old, strict=True))

    @property
    def mean_ratio(self) -> float:
        return math.exp(self.delta / len(self.new))

    def ratio(self, t: int) -> float:
        return math.exp(self.new[t] - self.old[t])

    def fixed_ratio(self, t: int) -> float:
        return math.exp(self.fixed[t] - self.old[t])


Formula = Callable[[Sequence, int, dict], float]


def reinforce(y: Sequence, t: int, hyper: dict) -> float:
    return -y.advantage * y.new[t]


def surrogate(ratio: float, advantage: float, hyper: dict) -> float:
    clipped = clip(ratio, 1 - hyper["clip_ratio_low"], 1 + hyper["clip_ratio_high"])
    return -min(ratio * advantage, clipped * advantage)


def grpo(y: Sequence, t: int, hyper: dict) -> float:
    return surrogate(y.ratio(t), y.advantage, hyper)


def gspo(y: Sequence, t: int, hyper: dict) -> float:
    return surrogate(y.mean_ratio, y.advantage, hyper)


def cispo(y: Sequence, t: int, hyper: dict) -> float:
    weight = clip(y.fixed_ratio(t), 1 - hyper["clip_ratio_low"], 1 + hyper["clip_ratio_high"])
    return -weight * y.advantage * y.new[t]


def dro(y: Sequence, t: int, hyper: dict) -> float:
    return -y.advantage * y.new[t] + hyper["beta"] / 2 * (y.new[t] - y.old[t]) ** 2


def opo(y: Sequence, t: int, hyper: dict) -> float:
    return -y.advantage * y.delta + hyper["mu"] / 2 * y.delta**2


def gopo(y: Sequence, t: int, hyper: dict) -> float:
    return hyper["mu"] / 2 * (math.exp(y.delta) - (1 + y.advantage)) ** 2


def dppo(divergence: Callable[[float, float], float]) -> Formula:
    def value(y: Sequence, t: int, hyper: dict) -> float:
        sampler, policy, ratio = math.exp(y.old[t]), math.exp(y.fixed[t]), y.fixed_ratio(t)
        leaves = divergence(sampler, policy) > hyper["divergence_threshold"]
        masked = leaves and ((y.advantage > 0 and ratio > 1) or (y.advantage < 0 and ratio < 1))
        return 0.0 if masked else -min(ratio, hyper["clip_ratio_c"]) * y.advantage * y.new[t]

    return value


def binary_kl(sampler: float, policy: float) -> float:
    rest = (1 - sampler) * math.log((1 - sampler) / (1 - policy))
    return sampler * math.log(sampler / policy) + rest


def sapo(y: Sequence, t: int, hyper: dict) -> float:
    tau = hyper["tau_pos"] if y.advantage > 0 else hyper["tau_neg"]
    return -4 / tau / (1 + math.exp(-tau * (y.ratio(t) - 1))) * y.advantage


def gmpo(y: Sequence, t: int, hyper: dict) -> float:
    sign, total = math.copysign(1, y.advantage), 0.0
    for new, old in zip(y.new, y.old, strict=True):
        clipped = clip(new - old, -hyper["clip_ratio_low"], hyper["clip_ratio_high"])
        total += sign * min(sign * (new - old), sign * clipped)
    return -y.advantage * math.exp(total / len(y.new))


def topr(y: Sequence, t: int, hyper: dict) -> float:
    ratio = math.exp(sum(f - o for f, o in zip(y.fixed, y.old, strict=True)))
    weight = min(ratio, 1) if y.advantage < 0 else 1
    return -weight * y.advantage * y.new[t]


@dataclass(frozen=True)
class Paper:
    """What an algorithm's paper says.

    Attributes:
        formula: The loss at one token.
        loss_agg_mode: How one number is made of the tokens' losses.
        defaults: The paper's value of each key of the loss.
        others: Values that are not the defaults, for the keys that are numbers.
        advantage: How rewards become advantages.
        like_reinforce: Whether the gradient is REINFORCE's where every ratio is 1.
    """

    formula: Formula
    loss_agg_mode: str
    defaults: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)
    advantage: str = "group-zscore"
    like_reinforce: bool = True


def bounds(low: float, high: float) -> dict:
    return {"clip_ratio_low": low, "clip_ratio_high": high}


PAPERS = {
    "reinforce": Paper(reinforce, "seq-mean-token-sum"),
    "grpo": Paper(grpo, "seq-mean-token-mean", bounds(0.2, 0.2), bounds(0.3, 0.4)),
    "dapo": Paper(grpo, "token-mean", bounds(0.2, 0.28), bounds(0.15, 0.6)),
    "gspo": Paper(
        gspo,
        "seq-mean-token-mean",
        bounds(3e-4, 4e-4),
        bounds(0.1, 0.2),
        like_reinforce=False,
    ),
    "cispo": Paper(cispo, "token-mean", bounds(1.0, 4.0), bounds(0.25, 0.35)),
    "dro": Paper(dro, "token-mean", {"beta": 1.0}, {"beta": 0.7}),
    "opo": Paper(
        opo,
        "seq-mean-token-mean",
        {"mu": 1.0, "surrogate": "log", "length_normalize": False},
        {"mu": 1.3},
        like_reinforce=False,
    ),
    "dr-grpo": Paper(
        grpo,
        "seq-mean-token-sum-norm",
        bounds(0.2, 0.2),
        bounds(0.05, 0.25),
        advantage="group-centered",
    ),
    "rloo": Paper(reinforce, "seq-mean-token-sum", advantage="leave-one-out"),
    "dppo-tv": Paper(
        dppo(lambda sampler, policy: abs(sampler - policy)),
        "seq-mean-token-sum-norm",
        {"divergence_threshold": 0.15, "clip_ratio_c": 20.0},
        {"divergence_threshold": 0.04, "clip_ratio_c": 1.4},
        advantage="group-centered",
    ),
    "dppo-kl": Paper(
        dppo(binary_kl),
        "seq-mean-token-sum-norm",
        {"divergence_threshold": 0.05, "clip_ratio_c": 20.0},
        {"divergence_threshold": 0.01, "clip_ratio_c": 1.4},
        advantage="group-centered",
    ),
    "sapo": Paper(
        sapo,
        "seq-mean-token-mean",
        {"tau_pos": 1.0, "tau_neg": 1.05},
        {"tau_pos": 1.3, "tau_neg": 2.1},
    ),
    "gmpo": Paper(
        gmpo,
        "seq-mean-token-mean",
        bounds(0.4, 0.4),
        bounds(0.3, 0.2),
        like_reinforce=False,
    ),
    "reinforce-plus-plus": Paper(
        grpo,
        "token-mean",
        bounds(0.2, 0.2),
        bounds(0.3, 0.4),
        advantage="batch-normalized",
    ),
    "reinforce-plus-plus-baseline": Paper(
        grpo,
        "token-mean",
        bounds(0.2, 0.2),
        bounds(0.1, 0.3),
        advantage="group-centered-batch-scaled",
    ),
    "maxrl": Paper(reinforce, "seq-mean-token-sum", advantage="maxrl"),
    "gopo": Paper(
        gopo,
        "seq-mean-token-mean",
        {"mu": 0.5, "length_normalize": False},
        {"mu": 0.8},
        advantage="group-centered",
        like_reinforce=False,
    ),
    "topr": Paper(topr, "seq-mean-token-sum", advantage="group-centered"),
}
"""Every algorithm of the package; a new one has its line here."""


def oracle(
    name: str, case: Case, log_probs: torch.Tensor, mode: str, hyper: dict, max_length: int = 9
) -> float:
    """The loss at other log-probabilities than the case's, with its constants at the case's."""
    rows = []
    for b, kept in enumerate(case.response_mask):
        y = Sequence(
            log_probs[b, kept].tolist(),
            case.old_log_probs[b, kept].tolist(),
            case.log_probs[b, kept].tolist(),
            case.advantages[b].item(),
        )
        values = iter([PAPERS[name].formula(y, t, hyper) for t in range(len(y.new))])
        rows.append([next(values) if m else math.nan for m in kept.tolist()])
    return loop_aggregate(rows, case.response_mask, mode, max_length)

"""Each paper's formula for one token, in plain numbers; nothing here is shared with the product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


FORMULAS: dict[str, Formula] = {
    "reinforce": reinforce,
    "grpo": grpo,
    "dapo": grpo,
    "gspo": gspo,
    "cispo": cispo,
    "dro": dro,
    "opo": opo,
    "dr-grpo": grpo,
    "rloo": reinforce,
    "dppo-tv": dppo(lambda sampler, policy: abs(sampler - policy)),
    "dppo-kl": dppo(binary_kl),
    "sapo": sapo,
    "gmpo": gmpo,
    "reinforce-plus-plus": grpo,
    "reinforce-plus-plus-baseline": grpo,
    "maxrl": reinforce,
    "gopo": gopo,
}


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
        values = iter([FORMULAS[name](y, t, hyper) for t in range(len(y.new))])
        rows.append([next(values) if m else math.nan for m in kept.tolist()])
    return loop_aggregate(rows, case.response_mask, mode, max_length)

"""The saturation toy: how hard each objective still pushes a policy that is already confident.

One binary choice with logit z: the sampled outcome has probability p = sigmoid(z), and 1/2 under
the anchor, the old policy and the reference alike. The objectives are the library's own, applied to
one sequence of one token and differentiated by autograd; SFT and DPO, which it does not have, are
written out here.

Legend for shape suffixes: B sequences (one, or the pair of outcomes), T tokens (one), N logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid

from proxstep.algorithms import (
    ALGORITHMS,
    centered_weights,
    escort_weights,
    sequence_coefficients,
)
from proxstep.isopo.plan import Statistics
from proxstep.isopo.rule import IsometricRule
from proxstep.isopo.settings import PRESETS
from proxstep.typing import Float, Tensor

Coordinate = Literal["z", "v"]
"""What the loss is differentiated by: the logit, or the deviation v = p / p_anchor - 1."""

ANCHOR_PROB = 0.5
ADVANTAGE = 1.0
DPO_BETAS = (0.1, 2.0)
"""What DPO is usually run with, and a value whose saturation fits into the figure."""


@dataclass(frozen=True)
class Curve:
    """One objective's gradient magnitude as a function of the logit.

    Attributes:
        name: What legends and tables call it.
        settings: Its hyper-parameters, in words.
        coordinate: What the loss is differentiated by.
        magnitude: From the logit z to |dL/dz| or |dL/dv|.
    """

    name: str
    settings: str
    coordinate: Coordinate
    magnitude: Callable[[float], float]


def sft_loss(z: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the likelihood objective of the sampled outcome.

    L = -log sigmoid(z), so that |dL/dz| = 1 - p.
    """
    return -logsigmoid(z)


def dpo_loss(z: Float[Tensor, ""], *, beta: float) -> Float[Tensor, ""]:
    """Return DPO's objective with the sampled outcome preferred to the other one.

    L = -log sigmoid(beta m), with m = z the difference of the two outcomes' log-ratios to the
    reference: |dL/dz| = beta sigmoid(-beta z).

    Source: arXiv 2305.18290, equation 7.
    """
    return -logsigmoid(beta * z)


def logit_magnitude(loss: Callable[[Tensor], Tensor], z: float) -> float:
    """Return |dL/dz| of a loss that is a function of the logit."""
    leaf = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    return grad.abs().item()


def objective_magnitude(
    objective: str,
    z: float,
    *,
    advantage: float = ADVANTAGE,
    coordinate: Coordinate = "z",
    **hyper: Any,
) -> float:
    """Return the gradient magnitude of one of the library's objectives on the sampled outcome.

    Args:
        objective: A name of `proxstep.algorithms.ALGORITHMS`.
        z: The logit, in nats.
        advantage: The objective's third argument: the advantage, for OPO the drive.
        coordinate: "z" for |dL/dz|; "v" for |dL/dv|, the gradient in ratio space, in which the
            policy is moved without the factor dv/dz = (1 + v)(1 - p) of the softmax.
        **hyper: Hyper-parameters of the objective.

    Returns:
        The absolute value of the derivative.
    """
    if coordinate == "z":
        leaf = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        log_prob = logsigmoid(leaf)
    else:
        deviation = torch.tensor(z, dtype=torch.float64).sigmoid() / ANCHOR_PROB - 1
        leaf = deviation.requires_grad_()
        log_prob = leaf.log1p() + math.log(ANCHOR_PROB)
    loss, _ = ALGORITHMS[objective].loss(*_one_token(log_prob, advantage), **hyper)
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad.abs().item()


def pair_magnitude(surrogate: str, z: float) -> float:
    """Return OPO's |dL/dz| in expectation over both outcomes, with the drives of `pair_drives`.

    The anchor gives each of them 1/2, so that the loss's mean over the pair is the expectation in
    equations 10 and 19. The logarithm of the other outcome's ratio is about -z: its square is what
    keeps pulling back where the policy is confident.
    """
    leaf = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    inputs = _one_token(logsigmoid(torch.stack([leaf, -leaf])), *pair_drives())
    loss, _ = ALGORITHMS["opo"].loss(*inputs, surrogate=surrogate)
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad.abs().item()


def isopo_magnitude(preset: str, z: float) -> float:
    """Return the magnitude of REINFORCE's gradient in z after an isometric rule of ISOPO.

    The geometry is exact: the sequence's gradient is G = d log p / dz = 1 - p, the Fisher
    information of z is p (1 - p), so F^2 = p (1 - p)^3.

    |weight * G| is without damping, but with the rule's numerical guard.
    """
    rule = PRESETS[preset]
    assert isinstance(rule, IsometricRule)
    rule = dataclasses.replace(rule, scale="paper")
    logit = torch.tensor(z, dtype=torch.float64)
    score = (-logit).sigmoid()
    norm_sq_B = score.square()[None]
    fisher_sq_B = logit.sigmoid() * score * norm_sq_B
    inputs = _one_token(logsigmoid(logit), ADVANTAGE)
    coefficient_B, _, _ = sequence_coefficients(ALGORITHMS["reinforce"], *inputs)
    weight_B, _, _ = rule.weigh(Statistics(coefficient_B, fisher_sq_B, norm_sq_B), {})
    return (weight_B * score).abs().item()


def pair_drives() -> tuple[float, float]:
    """Return OPO's centered drives of the two outcomes, with advantages 1 and -1 and its defaults.

    They form a group, so that omega has mean 1: the first outcome is favored, the second one not.
    """
    advantage_B = torch.tensor([ADVANTAGE, -ADVANTAGE], dtype=torch.float64)
    group_B = torch.zeros(2, dtype=torch.long)
    weight_B, _ = escort_weights(advantage_B, group_B)
    favored, disfavored = centered_weights(weight_B, group_B).tolist()
    return favored, disfavored


def make_curves() -> list[Curve]:
    """Return the toy's curves, those in the logit z first."""
    favored, disfavored = pair_drives()
    opo_settings = f"mu {_default('opo', 'mu'):g}, omega {1 + favored:.3f}"
    dpo = [
        Curve(
            f"dpo, beta {beta:g}",
            "",
            "z",
            partial(logit_magnitude, partial(dpo_loss, beta=beta)),
        )
        for beta in DPO_BETAS
    ]
    opo = [
        Curve(
            f"opo, {surrogate}",
            opo_settings,
            "z",
            partial(objective_magnitude, "opo", advantage=favored, surrogate=surrogate),
        )
        for surrogate in ("log", "ratio")
    ]
    in_ratio_space = partial(objective_magnitude, "opo", coordinate="v", surrogate="ratio")
    return [
        *(Curve(name, _exact(name), "z", partial(isopo_magnitude, name)) for name in _ISOMETRIC),
        *opo,
        Curve("opo, log, both", opo_settings, "z", partial(pair_magnitude, "log")),
        Curve("sft", "", "z", partial(logit_magnitude, sft_loss)),
        *dpo,
        *(
            Curve(name, _clip_settings(name), "z", partial(objective_magnitude, name))
            for name in _CLIPPED
        ),
        Curve("dro", f"beta {_default('dro', 'beta'):g}", "z", partial(objective_magnitude, "dro")),
        Curve("opo in v, favored", opo_settings, "v", partial(in_ratio_space, advantage=favored)),
        Curve(
            "opo in v, disfavored",
            f"mu {_default('opo', 'mu'):g}, omega {1 + disfavored:.3f}",
            "v",
            partial(in_ratio_space, advantage=disfavored),
        ),
    ]


_ISOMETRIC = ("isopo", "isopo-npg")
_CLIPPED = ("grpo", "dapo", "gspo", "cispo")


def trace(curves: Sequence[Curve], logit_N: Sequence[float]) -> dict[str, list[float]]:
    """Return z, p and each curve's magnitude at the given logits, by name."""
    columns = {"z": list(logit_N), "p": [1 / (1 + math.exp(-z)) for z in logit_N]}
    return columns | {curve.name: [curve.magnitude(z) for z in logit_N] for curve in curves}


def clip_edges() -> list[float]:
    """Return the logits at which a clip takes an objective's gradient away."""
    tops = [(1 + _default(name, "clip_ratio_high")) * ANCHOR_PROB for name in _CLIPPED]
    return [math.log(p / (1 - p)) for p in tops if p < 1]


def rate(curve: Curve, *, low: float = 8.0, high: float = 9.0) -> float | None:
    """Return d log|gradient| / dz in the confident regime: -1 falls like 1 - p, 0 stays O(1).

    It is the slope of the secant from logit `low` to `high`; None where the gradient is exactly 0.
    """
    first, last = curve.magnitude(low), curve.magnitude(high)
    if first == 0 or last == 0:
        return None
    return (math.log(last) - math.log(first)) / (high - low)


def _one_token(log_prob: Tensor, *advantages: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an objective's four arguments for sequences of one token, one for each advantage."""
    log_prob_BT = log_prob.reshape(-1, 1)
    return (
        log_prob_BT,
        torch.full_like(log_prob_BT, math.log(ANCHOR_PROB), requires_grad=False),
        torch.tensor(advantages, dtype=torch.float64),
        torch.ones_like(log_prob_BT, dtype=torch.bool),
    )


def _default(objective: str, key: str) -> Any:
    return ALGORITHMS[objective].defaults[key]


def _clip_settings(objective: str) -> str:
    low, high = (_default(objective, f"clip_ratio_{side}") for side in ("low", "high"))
    return f"clip {low:g}, {high:g}"


def _exact(preset: str) -> str:
    powers = {"isopo": "p = -1", "isopo-npg": "r = -2"}
    return f"{powers[preset]}, exact F"

"""Which metrics an algorithm writes, found by running it on a tiny rollout, and what they are."""

from __future__ import annotations

import inspect
import re

import torch
from torch import nn

from proxstep.algorithms import Aggregation, Algorithm, OldPolicy, SignalInputs
from proxstep.isopo import Isopo, Rule

EACH_UPDATE, EACH_ROLLOUT = "each update", "each rollout"
COMMON = {
    "ratio": "Mean ratio of the policy to the old one, over the tokens.",
    "kl_old_policy": "Estimate of KL(old || policy), in nats per token.",
    "alpha": "The value of `objective.alpha`.",
    "tau": "The temperature in effect; the mean where each sequence has its own.",
    "mu": "The curvature in effect.",
    "divergence": "The tokens' divergence from the sampler, mean over tokens.",
    "gate": "How far the gate is open, mean over tokens; 1 where the policy is the old one.",
    "effective_sample_size": "Effective number of a group's sequences under the escort weights, "
    "mean over groups.",
    "effective_sample_size_min": "The smallest of any group.",
    "weight_max": "The largest escort weight.",
    "frac_negative_target": "Share of targets v* below -1, before `target_min`.",
    "frac_over_positivity_bound": "Share of targets v* above 1.",
    "tv_bound": "Upper bound on the total variation, from `chi_square`.",
    "frac_target_at_bound": "Share of targets at -1.",
    "abs_delta": "Absolute log-ratio of the sequence, in nats.",
    "chi_square": "v^2, the squared deviation of the sequence's ratio from 1.",
    "delta_clamped": "1 where the log-ratio is beyond 20 nats.",
    "weight_spread": "Standard deviation over mean of the factors on the sequences' gradients, "
    "averaged over layers.",
    "frac_filled_fisher": "Share of Fisher estimates that were exactly 0 and were replaced.",
    "ntk_off_diagonal": "Off-diagonal share of the sum of the kernel's absolute values.",
}
"""Descriptions of metrics; others have theirs in brackets in the loss's docstring."""
OF_RATIO = {
    "gspo": "The ratio s_b of the sequence.",
    "gmpo": "The mean ratio R_b of the sequence.",
    "opo": "The ratio of the whole sequence.",
    "gopo": "The ratio of the whole sequence.",
}


def objective_metrics(algorithm: Algorithm) -> dict[str, tuple[str, str]]:
    """Return (when it is written, what it is) of each metric of an objective, by name."""
    old_BT = torch.tensor([[-1.0, -0.5], [-2.0, -1.0]])
    mask_BT = torch.ones_like(old_BT, dtype=torch.bool)
    inputs = SignalInputs(
        torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), OldPolicy(old_BT, mask_BT, 8)
    )
    signal = algorithm.signal(inputs, algorithm.defaults)
    options = algorithm.loss_options(algorithm.defaults) | signal.hyper
    aggregation = Aggregation(algorithm.default_loss_agg_mode, max_length=2)
    _, of_updates = algorithm.loss(
        old_BT, old_BT, signal.value_B, mask_BT, **options, aggregation=aggregation
    )
    names = dict.fromkeys(of_updates, EACH_UPDATE)
    if "chi_square" in names:
        names["tv_bound"] = EACH_ROLLOUT
    names |= dict.fromkeys(signal.metrics, EACH_ROLLOUT)
    doc = inspect.getdoc(getattr(algorithm.loss, "func", algorithm.loss)) or ""
    said = {name: COMMON.get(name) or _in_brackets(doc, name) for name in names}
    if algorithm.name in OF_RATIO:
        said["ratio"] = OF_RATIO[algorithm.name]
    return {name: (when, said[name]) for name, when in names.items()}


def _in_brackets(doc: str, name: str) -> str:
    """Return what a docstring says of a metric: `name` (this), as a sentence."""
    found = re.search(rf"`{name}`\s+\(([^()]*(?:\([^()]*\)[^()]*)*)\)", doc)
    text = " ".join(found.group(1).split()) if found else ""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def geometry_metrics(rule: Rule) -> dict[str, tuple[str, str]]:
    """Return (when it is written, what it is) of each metric of a rule, by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    token_BT, ids_BT = torch.randint(8, (2, 3)), torch.arange(2)[:, None].expand(2, 3)
    isopo = Isopo(model, rule, overlap_source="microbatch")
    with isopo.microbatch(ids_BT, torch.tensor([1.0, -1.0])) as microbatch:
        log_prob_BT = model(token_BT)[:, :-1].log_softmax(-1)[..., 0]
        microbatch.objective(log_prob_BT).backward()
    measured = isopo.step()
    isopo.remove()
    return {name: (EACH_UPDATE, COMMON.get(name, "")) for name in measured}

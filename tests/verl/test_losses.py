"""OPO as verl's policy loss, against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.verl.verl_case import Case, actor_config
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from proxstep.algorithms import ALGORITHMS
from proxstep.engines.verl import OpoPolicyLossConfig, register
from proxstep.engines.verl.seams import loss_mode
from proxstep.errors import ProxstepError

pytestmark = pytest.mark.verl

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KEYS: list[dict[str, Any]] = [
    {},
    {"surrogate": "ratio", "mu": 3.0},
    {"length_normalize": True, "mu": 0.5},
]


def actor(mode: str = "seq-mean-token-mean", **keys: Any) -> ActorConfig:
    """verl's actor configuration with OPO's keys."""
    policy_loss = {"loss_mode": "chi2_opo", **keys}
    return actor_config(Case("", geometry=None, policy_loss=policy_loss, loss_agg_mode=mode))


def inputs(seed: int) -> dict[str, Tensor]:
    """Padded rows, one of them without a token; what stands at padding is no part of anything."""
    torch.manual_seed(seed)
    shape = (7, 6)
    length_B = torch.tensor([6, 1, 3, 0, 5, 2, 4])
    mask_BT = (torch.arange(6) < length_B[:, None]).long()
    mask_BT[4, 1] = 0  # a tool's token
    drive_B = torch.randn(7, dtype=torch.float64)
    return {
        "old_log_prob": -1 - torch.rand(shape, dtype=torch.float64),
        "log_prob": -1 - torch.rand(shape, dtype=torch.float64),
        "advantages": drive_B[:, None] * mask_BT,
        "response_mask": mask_BT,
    }


def slow_loss(
    tensors: dict[str, Tensor],
    mode: str,
    keys: dict[str, Any],
    info: dict[str, Any],
    weights: list[float],
) -> float:
    """The definition, row by row."""
    mu, total, num_tokens, num_rows = keys.get("mu", 1.0), 0.0, 0, 0
    for row, mask_T in enumerate(tensors["response_mask"].tolist()):
        places = [t for t, counts in enumerate(mask_T) if counts]
        if not places:
            continue
        log_ratios = [
            float(tensors["log_prob"][row, t] - tensors["old_log_prob"][row, t]) for t in places
        ]
        delta = sum(log_ratios) / (len(places) if keys.get("length_normalize") else 1)
        u = math.exp(delta) - 1 if keys.get("surrogate") == "ratio" else delta
        drive = float(tensors["advantages"][row, places[0]])
        value = -drive * u + mu / 2 * u**2
        times = 1 if mode == "seq-mean-token-mean" else len(places)
        total += weights[row] * times * value
        num_tokens, num_rows = num_tokens + len(places), num_rows + 1
    dp_size = info.get("dp_size", 1)
    if mode == "token-sum":
        return total * dp_size
    if mode == "token-mean":
        return total / (info.get("batch_num_tokens") or num_tokens) * dp_size
    total = total / (info.get("global_batch_size") or num_rows) * dp_size
    scale = info.get("loss_scale_factor") or tensors["response_mask"].shape[1]
    return total / scale if mode == "seq-mean-token-sum-norm" else total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss(mode: str, keys: dict[str, Any], seed: int) -> None:
    """All of verl's aggregations, with and without its counts, with and without weights."""
    loss, torch_seed = get_policy_loss_fn("chi2_opo"), seed
    tensors = inputs(torch_seed)
    step = {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16, "loss_scale_factor": 9}
    for info in ({}, step):
        config = actor(mode, **keys)
        config.global_batch_info.update(info)
        weight_B = 0.5 + torch.rand(7, dtype=torch.float64)
        for weights_B in (None, weight_B):
            given = None if weights_B is None else weights_B[:, None] * tensors["response_mask"]
            found, _ = loss(**tensors, loss_agg_mode=mode, config=config, rollout_is_weights=given)
            weights = [1.0] * 7 if weights_B is None else weights_B.tolist()
            expected = slow_loss(tensors, mode, keys, info, weights)
            assert found.item() == pytest.approx(expected, rel=1e-6)


VERLS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpg": ("reinforce", {}),
    "vanilla": ("grpo", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}),
    "gspo": ("gspo", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}),
    "cispo": ("cispo", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}),
    "dro": ("dro", {"beta": 0.7}),
}
"""verl's own losses, and which of ours has the same gradient."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("theirs", list(VERLS))
def test_verls_own_losses_have_the_same_gradient(theirs: str, mode: str) -> None:
    ours, keys = VERLS[theirs]
    tensors, weight_B = inputs(6), 0.5 + torch.rand(7, dtype=torch.float64)
    leaf_BT = tensors["log_prob"].requires_grad_()
    counts = {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16, "loss_scale_factor": 9}
    clips = {name: value for name, value in keys.items() if name.startswith("clip")}
    of_loss = {"dro_beta": keys["beta"]} if theirs == "dro" else {}
    found = []
    for name, of_actor, policy_loss in (
        (theirs, {**clips, "clip_ratio_c": 1e9}, of_loss),
        (loss_mode(ALGORITHMS[ours]), {}, keys),
    ):
        case = Case("", None, {"loss_mode": name, **policy_loss}, mode, actor=of_actor)
        config = actor_config(case)
        config.global_batch_info.update(counts)
        weights_BT = weight_B[:, None] * tensors["response_mask"]
        options = {"loss_agg_mode": mode, "config": config, "rollout_is_weights": weights_BT}
        value, _ = get_policy_loss_fn(name)(**tensors, **options)
        found.append(torch.autograd.grad(value, leaf_BT)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up(mode: str) -> None:
    """Of two ranks' two micro-batches each, averaged over ranks, to the whole's gradient."""
    loss, tensors = get_policy_loss_fn("chi2_opo"), inputs(2)
    leaf_BT = tensors["log_prob"].requires_grad_()
    counts = {"batch_num_tokens": 20, "global_batch_size": 6, "loss_scale_factor": 6}

    def gradient(rows: slice, dp_size: int) -> Tensor:
        config = actor(mode)
        config.global_batch_info.update(counts | {"dp_size": dp_size})
        part = {name: value[rows] for name, value in tensors.items()}
        value, _ = loss(**part, loss_agg_mode=mode, config=config, rollout_is_weights=None)
        return torch.autograd.grad(value, leaf_BT)[0]

    slices = (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7))
    parts = torch.stack([gradient(rows, 2) for rows in slices]).sum(dim=0) / 2
    torch.testing.assert_close(parts, gradient(slice(None), 1), rtol=1e-6, atol=1e-12)


def test_metrics() -> None:
    """verl's divergence by its name, and OPO's own; the same names where nothing counts."""
    loss, tensors = get_policy_loss_fn("chi2_opo"), inputs(3)
    config = actor(mu=0.4)
    _, metrics = loss(**tensors, loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
    mask_BT = tensors["response_mask"].bool()
    delta_BT = (tensors["log_prob"] - tensors["old_log_prob"]).masked_fill(~mask_BT, 0.0)
    delta_B = delta_BT.sum(dim=1)[mask_BT.any(dim=1)]
    drive_B = tensors["advantages"][:, 0][mask_BT.any(dim=1)]
    mean = -delta_BT.sum().item() / int(mask_BT.sum())
    assert metrics["actor/ppo_kl"] == pytest.approx(mean)
    assert metrics["actor/objective_abs_delta"] == pytest.approx(delta_B.abs().mean().item())
    share = (drive_B / 0.4 < -1).double().mean().item()
    assert 0 < share < 1
    assert metrics["actor/objective_frac_negative_target"] == pytest.approx(share)
    nothing = {name: value[3:4] for name, value in tensors.items()}
    value, same = loss(**nothing, loss_agg_mode="token-sum", config=config, rollout_is_weights=None)
    assert value.item() == 0
    assert set(same) == set(metrics)
    assert all(math.isfinite(number) for number in same.values())


def test_what_differs_within_a_sequence_is_refused() -> None:
    loss, tensors = get_policy_loss_fn("chi2_opo"), inputs(4)
    options = {"loss_agg_mode": "token-mean", "config": actor()}
    varied = {**tensors, "advantages": tensors["advantages"] + torch.rand(7, 6)}
    with pytest.raises(ProxstepError, match=r"algorithm\.adv_estimator=chi2_opo"):
        loss(**varied, **options, rollout_is_weights=None)
    with pytest.raises(ProxstepError, match=r"rollout_correction\.rollout_is=sequence"):
        loss(**tensors, **options, rollout_is_weights=torch.rand(7, 6))


def test_another_configuration_class_is_refused() -> None:
    loss, config = get_policy_loss_fn("chi2_opo"), actor()
    object.__setattr__(config, "policy_loss", PolicyLossConfig(loss_mode="chi2_opo"))
    with pytest.raises(ProxstepError, match=r"policy_loss._target_=proxstep.engines.verl.Opo"):
        loss(**inputs(5), loss_agg_mode="token-mean", config=config, rollout_is_weights=None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss_mode": "vanilla"}, "policy_loss.loss_mode=chi2_opo"),
        ({"mu": "auto"}, "policy_loss.mu is auto"),
        ({"mu": 0.0}, "policy_loss.mu"),
        ({"adaptive_tau": True}, "policy_loss.adaptive_tau is True: the preparation reads"),
        ({"anchor_correction": "length"}, "anchor_correction is length: .* use absorbed"),
        (
            {"adaptive_tau": True, "anchor_correction": "length"},
            "policy_loss.adaptive_tau is True: the preparation reads",
        ),
        ({"tau_min": 0.4}, "policy_loss.tau_min"),
        ({"target_min": -0.5, "drive": "none"}, "policy_loss.target_min bounds"),
        ({"alpha": 1.5}, "policy_loss.alpha is 1.5"),
        ({"drive": "centre"}, "policy_loss.drive is 'centre'"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ProxstepError, match=message) as caught:
        OpoPolicyLossConfig(**keys)
    assert "\n" not in str(caught.value)


def test_nothing_of_another_library_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    register()  # again, as a second import would

    def other() -> None: ...

    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "chi2_opo", other)
    with pytest.raises(ProxstepError, match=r"policy loss 'chi2_opo' is .*other already"):
        register()

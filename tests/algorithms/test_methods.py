"""DPPO, SAPO, GMPO, MaxRL, REINFORCE++ and TOPR: special cases, and what each of them is for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.loss_cases import (
    SEEDS,
    Case,
    assert_close,
    counted,
    loss_and_gradient,
    make_case,
)

from proxstep.algorithms import ADVANTAGES, ALGORITHMS, Aggregation
from proxstep.algorithms.dppo import binary_kl, binary_tv
from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError

DPPO = ("dppo-tv", "dppo-kl")
INFINITE = float("inf")


def one_token(policy: float, old: float, advantage: float) -> Case:
    """A sequence of one token with these probabilities."""
    return Case(
        torch.tensor([[policy]], dtype=torch.float64).log(),
        torch.tensor([[old]], dtype=torch.float64).log(),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.bool),
    )


# DPPO


@pytest.mark.parametrize("name", DPPO)
@pytest.mark.parametrize("seed", SEEDS)
def test_dppo_without_a_region_is_cispo_without_a_lower_bound(name, seed):
    case = make_case(seed, drift=2.0)
    aggregation = counted("seq-mean-token-sum-norm", case.response_mask)
    for cap in (3.0, 20.0):
        free = loss_and_gradient(
            name, case, divergence_threshold=INFINITE, clip_ratio_c=cap, aggregation=aggregation
        )
        clipped = loss_and_gradient("cispo", case, clip_ratio_high=cap - 1, aggregation=aggregation)
        assert_close(free[0], clipped[0])
        assert_close(free[1], clipped[1])
        assert (free[2]["clip_ratio"] == 0).all()


@pytest.mark.parametrize("name", DPPO)
def test_dppo_without_any_limit_has_the_gradient_of_the_ratio(name):
    case = make_case(0)
    aggregation = counted("seq-mean-token-sum", case.response_mask)
    _, gradient, _ = loss_and_gradient(
        name, case, divergence_threshold=INFINITE, clip_ratio_c=INFINITE, aggregation=aggregation
    )
    rho = (case.log_probs - case.old_log_probs).exp()
    expected = -rho * case.advantages[:, None] * case.response_mask / aggregation.num_sequences
    assert_close(gradient, expected)


@pytest.mark.parametrize("name", DPPO)
@pytest.mark.parametrize(
    ("policy", "old", "advantage", "kept"),
    [
        (0.9, 0.1, 1.0, False),  # far out and further
        (0.9, 0.1, -1.0, True),  # far out and back
        (0.1, 0.9, -1.0, False),
        (0.1, 0.9, 1.0, True),
        (0.5, 0.5, 1.0, True),
        (0.9, 0.1, 0.0, True),
    ],
)
def test_dppo_takes_only_the_way_out(name, policy, old, advantage, kept):
    _, gradient, metrics = loss_and_gradient(name, one_token(policy, old, advantage))
    assert metrics["clip_ratio"].item() == (not kept)
    if advantage:
        assert (gradient.item() != 0) == kept


def test_dppo_asks_for_probability_where_ppo_asks_for_the_ratio():
    """A rare token may triple; a likely one may not lose a fifth, though its ratio is above 0.8."""
    for case, masked_by_dppo, clipped_by_ppo in (
        (one_token(3e-4, 1e-4, 1.0), 0.0, 1.0),
        (one_token(0.8, 0.99, -1.0), 1.0, 0.0),
    ):
        assert loss_and_gradient("dppo-tv", case)[2]["clip_ratio"].item() == masked_by_dppo
        assert loss_and_gradient("dppo-kl", case)[2]["clip_ratio"].item() == masked_by_dppo
        assert loss_and_gradient("grpo", case)[2]["clip_ratio"].item() == clipped_by_ppo


@pytest.mark.parametrize(("name", "function"), [("dppo-tv", binary_tv), ("dppo-kl", binary_kl)])
def test_dppo_masks_above_the_threshold_and_not_at_it(name, function):
    case = one_token(0.6, 0.25, 1.0)
    distance = function(case.log_probs, case.old_log_probs).item()
    for threshold, masked in ((distance, 0.0), (distance * (1 - 1e-12), 1.0)):
        _, _, metrics = loss_and_gradient(name, case, divergence_threshold=threshold)
        assert metrics["clip_ratio"].item() == masked
        assert metrics["divergence"].item() == distance


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_binary_divergences_are_at_most_those_of_all_tokens(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    draws = scale * torch.randn(2, 9, generator=generator, dtype=torch.float64)
    log_policy_V, log_sampler_V = draws.log_softmax(1)
    tv_V = binary_tv(log_policy_V[None], log_sampler_V[None])[0]
    kl_V = binary_kl(log_policy_V[None], log_sampler_V[None])[0]
    sampler_V = log_sampler_V.exp()
    whole_tv = (log_policy_V.exp() - sampler_V).abs().sum() / 2
    whole_kl = (sampler_V * (log_sampler_V - log_policy_V)).sum()
    assert (tv_V <= whole_tv + 1e-12).all()
    assert (kl_V <= whole_kl + 1e-12).all()
    assert (kl_V >= 2 * tv_V.square() - 1e-12).all()  # Pinsker


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_kl_near_certainty(dtype):
    log_probs = torch.tensor([[0.0, 0.0, -1e-9, -200.0, -1e-3]], dtype=dtype)
    sampler = torch.tensor([[0.0, -1e-3, 0.0, 0.0, -1e-3]], dtype=dtype)
    certain, lost, nearly, fled, same = binary_kl(log_probs, sampler)[0].tolist()
    assert certain == same == 0
    assert 0 < lost < INFINITE
    assert nearly == pytest.approx(1e-9)
    assert fled == pytest.approx(200.0)


@pytest.mark.parametrize("name", DPPO)
@pytest.mark.parametrize("key", ["divergence_threshold", "clip_ratio_c"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_dppo_refuses_limits_that_are_not_above_zero(name, key, value):
    with pytest.raises(ProxstepError, match=f"{key} is"):
        ALGORITHMS[name].loss(*make_case(0).tensors, **{key: value})


# SAPO


@pytest.mark.parametrize("tau", [0.01, 1.0, 9.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_sapo_at_ratio_one_has_the_gradient_of_the_advantage_for_every_tau(seed, tau):
    case = make_case(seed).on_policy()
    aggregation = counted("seq-mean-token-sum", case.response_mask)
    _, gradient, metrics = loss_and_gradient(
        "sapo", case, tau_pos=tau, tau_neg=2 * tau, aggregation=aggregation
    )
    expected = -case.advantages[:, None] * case.response_mask / aggregation.num_sequences
    assert_close(gradient, expected)
    assert (metrics["gate"][case.response_mask.any(dim=1)] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_sapo_weights_a_token_with_its_gate(seed):
    """The derivative in the paper's own form: 4 p (1 - p) rho A."""
    case = make_case(seed)
    aggregation = counted("seq-mean-token-sum", case.response_mask)
    _, gradient, metrics = loss_and_gradient("sapo", case, aggregation=aggregation)
    for b, row in enumerate(case.response_mask.tolist()):
        advantage, gates = case.advantages[b].item(), []
        tau = 1.0 if advantage > 0 else 1.05
        for t in [t for t, kept in enumerate(row) if kept]:
            rho = math.exp(case.log_probs[b, t] - case.old_log_probs[b, t])
            p = 1 / (1 + math.exp(-tau * (rho - 1)))
            gates.append(4 * p * (1 - p))
            assert_close(gradient[b, t], -gates[-1] * rho * advantage / aggregation.num_sequences)
        if gates:
            assert_close(metrics["gate"][b], sum(gates) / len(gates))


def test_sapo_with_its_gate_held_open_is_the_free_ratio():
    case = make_case(0)
    aggregation = counted("seq-mean-token-sum", case.response_mask)
    options = {"tau_pos": 1e-5, "tau_neg": 1e-5, "aggregation": aggregation}
    _, gradient, _ = loss_and_gradient("sapo", case, **options)
    wide = {"clip_ratio_low": INFINITE, "clip_ratio_high": INFINITE, "aggregation": aggregation}
    assert_close(gradient, loss_and_gradient("grpo", case, **wide)[1], tolerance=1e-8)


@pytest.mark.parametrize("key", ["tau_pos", "tau_neg"])
def test_sapo_refuses_a_temperature_that_is_not_above_zero(key):
    with pytest.raises(ProxstepError, match=f"{key} is 0"):
        ALGORITHMS["sapo"].loss(*make_case(0).tensors, **{key: 0.0})


# GMPO


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_gmpo_without_clipping_is_gspo_without_clipping(seed, mode):
    case = make_case(seed)
    wide = {"clip_ratio_low": INFINITE, "clip_ratio_high": INFINITE}
    wide["aggregation"] = counted(mode, case.response_mask)
    free, gspo = (loss_and_gradient(name, case, **wide) for name in ("gmpo", "gspo"))
    assert_close(free[0], gspo[0])
    assert_close(free[1], gspo[1])
    assert_close(free[2]["ratio"], gspo[2]["ratio"])


@pytest.mark.parametrize("seed", SEEDS)
def test_gmpo_of_one_token_is_ppos_clip_in_log_space(seed):
    case = make_case(seed)
    case = Case(*case.tensors[:3], torch.arange(7).expand(6, 7) == 2)
    gmpo = loss_and_gradient("gmpo", case, clip_ratio_low=0.2, clip_ratio_high=0.3)
    bounds = {"clip_ratio_low": 1 - math.exp(-0.2), "clip_ratio_high": math.exp(0.3) - 1}
    grpo = loss_and_gradient("grpo", case, **bounds)
    assert_close(gmpo[0], grpo[0])
    assert_close(gmpo[1], grpo[1])
    assert_close(gmpo[2]["clip_ratio"], grpo[2]["clip_ratio"])


@pytest.mark.parametrize("seed", SEEDS)
def test_gmpo_takes_the_gradient_of_clipped_tokens_alone(seed):
    case = make_case(seed, drift=1.0, with_empty=False)
    _, gradient, metrics = loss_and_gradient("gmpo", case)
    share_B = (gradient == 0).logical_and(case.response_mask).sum(dim=1)
    assert_close(metrics["clip_ratio"], share_B.double() / case.response_mask.sum(dim=1))
    assert (share_B > 0).any()
    length_B = case.response_mask.sum(dim=1)
    expected_B = -case.advantages * metrics["ratio"] / length_B / 6
    moved = gradient != 0
    assert_close(gradient[moved], expected_B[:, None].expand_as(gradient)[moved])


# MaxRL


def test_maxrl_is_the_reward_over_the_mean():
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    advantage, _ = ADVANTAGES["maxrl"](reward, group)
    assert advantage.tolist() == [3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert_close(ADVANTAGES["maxrl"](1e-9 * reward, group)[0], advantage)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("n", [2, 4])
def test_maxrl_estimates_the_gradient_of_truncated_maximum_likelihood(p, n):
    """Every group of n draws of a coin with logit z, with its probability.

    The control variate of groups without a success is dropped, which costs p (1 - p)^n.
    """
    total = 0.0
    for draws in itertools.product((0.0, 1.0), repeat=n):
        reward = torch.tensor(draws, dtype=torch.float64)
        advantage, _ = ADVANTAGES["maxrl"](reward, torch.zeros(n, dtype=torch.int64))
        score = reward - p  # d log P(draw) / dz
        probability = math.prod(p if draw else 1 - p for draw in draws)
        total += probability * (advantage * score).mean().item()
    gradient = p * (1 - p) * sum((1 - p) ** (k - 1) for k in range(1, n + 1))
    assert total == pytest.approx(gradient - p * (1 - p) ** n)


def test_maxrl_refuses_rewards_below_zero():
    with pytest.raises(ProxstepError, match=r"reward_B\[1\] is -0.5"):
        ADVANTAGES["maxrl"](torch.tensor([1.0, -0.5]), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"overlong_buffer": 2}},
        {"regularizer": {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"}},
    ],
)
def test_maxrl_refuses_a_punishment_before_the_run(changes):
    with pytest.raises(ProxstepError, match=r"objective\.advantage maxrl takes no reward below 0"):
        resolve({"algorithm": "maxrl", **changes}, {}, "test")


def test_maxrl_and_the_plus_plus_variants_share_their_losses():
    assert ALGORITHMS["maxrl"].loss is ALGORITHMS["reinforce"].loss
    plus, baseline = (ALGORITHMS[f"reinforce-plus-plus{kind}"].loss for kind in ("", "-baseline"))
    assert plus is baseline
    case = make_case(0)
    token_mean = Aggregation("token-mean")
    assert torch.equal(
        plus(*case.tensors)[0], ALGORITHMS["grpo"].loss(*case.tensors, aggregation=token_mean)[0]
    )


# REINFORCE++


@pytest.mark.parametrize("seed", SEEDS)
def test_with_one_prompt_the_baseline_variant_is_batch_normalized(seed):
    reward = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    group = torch.zeros(8, dtype=torch.int64)
    scaled, _ = ADVANTAGES["group-centered-batch-scaled"](reward, group)
    assert_close(scaled, ADVANTAGES["batch-normalized"](reward, group)[0])


def test_the_baseline_variant_takes_each_prompts_level_away_and_one_spread_for_all():
    reward = torch.tensor([0.0, 1.0, 100.0, 103.0], dtype=torch.float64)
    advantage, _ = ADVANTAGES["group-centered-batch-scaled"](reward, torch.tensor([0, 0, 1, 1]))
    spread = (2 * (0.25 + 2.25) / 3) ** 0.5
    assert_close(advantage, [level / (spread + 1e-6) for level in (-0.5, 0.5, -1.5, 1.5)])


# TOPR


@pytest.mark.parametrize("seed", SEEDS)
def test_topr_is_reinforce_but_for_bad_completions_that_became_rarer(seed):
    case = make_case(seed, drift=1.0, with_empty=False)
    _, gradient, _ = loss_and_gradient("topr", case)
    _, plain, _ = loss_and_gradient("reinforce", case)
    log_ratio = ((case.log_probs - case.old_log_probs) * case.response_mask).sum(dim=1)
    rarer = (case.advantages < 0) & (log_ratio < 0)
    assert rarer.any()
    assert not rarer.all()
    assert torch.equal(gradient[~rarer], plain[~rarer])
    assert_close(gradient[rarer], log_ratio[rarer].exp()[:, None] * plain[rarer])

"""What an objective's options make of a rollout, and that the local engine passes it on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import Silent, collected, made_trainer, spread_reward, tiny_recipe

from proxstep.algorithms import (
    ALGORITHMS,
    OldPolicy,
    Signal,
    centered_weights,
    escort_weights,
)
from proxstep.algorithms.safeguards import auto_mu, regression_target
from proxstep.algorithms.temperature import adaptive_tau
from proxstep.config.loading import resolve
from proxstep.errors import ProxstepError
from proxstep.training import lifecycle
from proxstep.training.objective import Objective

GROUP = torch.tensor([3, 0, 3, 0, 3, 0, 3, 0])
VOCABULARY = 50


def objective(name: str = "opo", rollout: dict[str, Any] | None = None, **own: Any) -> Objective:
    data = {"algorithm": name, "objective": own, "rollout": rollout or {}}
    return Objective(resolve(data, {}, "test"))


def advantages(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(8, generator=torch.Generator().manual_seed(seed))


def old_policy(seed: int = 0) -> OldPolicy:
    generator = torch.Generator().manual_seed(seed)
    log_prob_BT = -2 * torch.rand(8, 5, generator=generator)
    response_BT = torch.rand(8, 5, generator=generator) < 0.7
    response_BT[:, 1] = True
    response_BT[6] = False  # no token at all
    sampler_BT = log_prob_BT + 0.3 * torch.randn(8, 5, generator=generator)
    return OldPolicy(log_prob_BT, response_BT, VOCABULARY, sampler_BT)


def signal_of(own: dict[str, Any], seed: int = 0, **rollout: Any) -> Signal:
    return objective(rollout=rollout, **own).signal(advantages(seed), GROUP, old_policy(seed))


# The signal


def test_without_a_preparation_the_advantages_are_taken_as_they_are() -> None:
    for name in [name for name, found in ALGORITHMS.items() if found.prepare is None]:
        signal = objective(name).signal(advantages(), GROUP, None)
        assert torch.equal(signal.value_B, advantages())
        assert signal.importance_B is None
        assert signal.hyper == signal.metrics == {}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_adaptive_temperature_is_each_sequences_own(seed: int) -> None:
    given, expected = old_policy(seed), []
    for b in range(8):
        mask, advantage = given.response_BT[b], advantages(seed)[b].item()
        surprise = -given.log_prob_BT[b][mask].mean().item() if mask.any() else 0.0
        entropy = min(max(surprise / math.log(VOCABULARY), 0.0), 1.0)
        reward = min(max(advantage, -1.0), 1.0)
        tau = 1.1 * (1 + 0.3 * entropy - 0.6 * (1 - entropy) * reward)
        expected.append(min(max(tau, 0.5), 1.4))
    own = {"tau": 1.1, "tau_entropy_coef": 0.3, "tau_confidence_coef": 0.6}
    own |= {"tau_min": 0.5, "tau_max": 1.4, "adaptive_tau": True}
    signal = signal_of(own, seed)
    weight_B, _ = escort_weights(advantages(seed), GROUP, tau=torch.tensor(expected))
    assert torch.allclose(signal.value_B, centered_weights(weight_B, GROUP), atol=1e-5)
    assert signal.metrics["tau"] == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert len(set(expected)) > 3


def test_the_defaults_of_the_adaptive_temperature_are_the_functions() -> None:
    entropy_B = (
        -torch.tensor(
            [
                row[mask].mean().item() if mask.any() else 0.0
                for row, mask in zip(
                    old_policy().log_prob_BT, old_policy().response_BT, strict=True
                )
            ]
        )
        / math.log(VOCABULARY)
    ).clamp(0, 1)
    tau_B = adaptive_tau(1.0, entropy_B, 1 - entropy_B, advantages().clamp(-1, 1))
    weight_B, _ = escort_weights(advantages(), GROUP, tau=tau_B)
    value_B = signal_of({"adaptive_tau": True}).value_B
    assert torch.allclose(value_B, centered_weights(weight_B, GROUP), atol=1e-5)


@pytest.mark.parametrize("drive_kind", ["center", "zscore", "none"])
def test_auto_mu_is_one_number_for_the_rollout(drive_kind: str) -> None:
    signal = signal_of({"mu": "auto", "alpha": 0.0, "drive": drive_kind})
    assert signal.hyper == {"mu": auto_mu(signal.value_B)}
    assert signal.hyper["mu"] == signal.metrics["mu"] > 1
    assert signal.metrics["frac_negative_target"] == 0
    assert signal.metrics["frac_over_positivity_bound"] == 0


def test_the_positivity_shares_are_of_the_targets_before_they_are_clipped() -> None:
    free = signal_of({"mu": 0.3})
    clipped = signal_of({"mu": 0.3, "target_min": -0.9})
    target_B = regression_target(free.value_B, mu=0.3)
    assert free.metrics["frac_negative_target"] == (target_B < -1).double().mean().item() > 0
    assert free.metrics["frac_over_positivity_bound"] == (target_B > 1).double().mean().item() > 0
    for name in ("frac_negative_target", "frac_over_positivity_bound"):
        assert clipped.metrics[name] == free.metrics[name]
    assert torch.equal(regression_target(clipped.value_B, mu=0.3), target_B.clamp(min=-0.9))


def test_what_is_in_effect_is_measured() -> None:
    metrics = signal_of({"alpha": 0.3, "tau": 0.8, "mu": 2.0}).metrics
    assert {name: metrics[name] for name in ("alpha", "tau", "mu")} == {
        "alpha": 0.3,
        "tau": 0.8,
        "mu": 2.0,
    }
    assert metrics["effective_sample_size_min"] <= metrics["effective_sample_size"] <= 4


CHANGES: dict[str, Any] = {
    "alpha": 0.7,
    "tau": 0.6,
    "adaptive_tau": True,
    "mu": 0.5,
    "target_min": -0.2,
    "drive": "zscore",
    "normalize": "batch",
    "anchor_correction": "length",
}


@pytest.mark.parametrize("key", CHANGES)
def test_every_option_of_the_signal_is_read(key: str) -> None:
    plain, changed = signal_of({}), signal_of({key: CHANGES[key]})
    same = torch.allclose(plain.value_B, changed.value_B, atol=1e-3)
    assert same == (key == "mu")
    assert (plain.hyper == changed.hyper) == (key != "mu")


def test_the_weights_of_another_sampler_reach_signal_and_metrics() -> None:
    plain, corrected = signal_of({}), signal_of({}, importance_cap=1.2)
    given = old_policy()
    assert given.sampler_log_prob_BT is not None
    ratio = (given.log_prob_BT - given.sampler_log_prob_BT) * given.response_BT
    expected = ratio.sum(1).exp().clamp(max=1.2)
    assert plain.importance_B is None
    assert corrected.importance_B is not None
    assert torch.allclose(corrected.importance_B, expected, atol=1e-5)
    assert corrected.metrics["importance_max"] == pytest.approx(1.2)
    weight_B = corrected.value_B + 1
    for label in (0, 3):
        member = label == GROUP
        mean = (expected * weight_B)[member].sum() / expected[member].sum()
        assert mean.item() == pytest.approx(1, abs=1e-5)
    other = objective("grpo", {"importance_cap": 1.2}).signal(advantages(), GROUP, given)
    assert torch.equal(other.value_B, advantages())
    assert other.importance_B is not None
    assert torch.allclose(other.importance_B, expected, atol=1e-5)


@pytest.mark.parametrize("normalize", ["group", "batch"])
def test_weights_and_drive_are_normalized_in_the_same_place(normalize: str) -> None:
    signal = signal_of({"drive": "zscore", "normalize": normalize}, importance_cap=1.2)
    options = {"normalize": normalize, "importance": signal.importance_B}
    weight_B, _ = escort_weights(advantages(), GROUP, **options)
    assert torch.equal(signal.value_B, centered_weights(weight_B, GROUP, kind="zscore", **options))


def test_what_reads_the_old_policy_says_so() -> None:
    assert not objective().reads_old_policy
    assert not objective("grpo").reads_old_policy
    assert objective(anchor_correction="length").reads_old_policy
    assert objective(adaptive_tau=True).reads_old_policy
    assert objective("reinforce", {"importance_cap": 2.0}).reads_old_policy


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ({"tau_min": 0.3}, "objective.tau_min is of the adaptive temperature"),
        ({"tau_confidence_coef": 0.1}, "objective.tau_confidence_coef is of the adaptive"),
        ({"adaptive_tau": True, "tau": 2.0}, "objective.tau 2.0 is not between"),
        ({"adaptive_tau": True, "tau_min": 1.4, "tau_max": 0.4}, "is not between"),
        ({"target_min": -0.5, "drive": "none"}, "objective.target_min bounds the target"),
        ({"target_min": -1.5}, "objective.target_min: input should be greater"),
        ({"target_min": 0.0}, "objective.target_min: input should be less"),
        ({"mu": 0.0}, "objective.mu: input should be greater than 0"),
        ({"mu": "large"}, "objective.mu: "),
        ({"normalize": "prompt"}, "objective.normalize: input should be 'group' or 'batch'"),
        ({"anchor_correction": "sequence"}, "objective.anchor_correction: input should be"),
    ],
)
def test_options_that_do_not_go_together_are_refused(own: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ProxstepError) as caught:
        objective(**own)
    assert complaint in str(caught.value)


def test_a_cap_must_be_above_zero() -> None:
    with pytest.raises(ProxstepError, match=r"rollout\.importance_cap: input should be greater"):
        objective("grpo", {"importance_cap": 0.0})


def test_opo_over_the_batch_needs_no_groups() -> None:
    own = {"advantage": "batch-normalized", "normalize": "batch"}
    made = objective(rollout={"num_generations": 1}, **own)
    value_B = made.signal(advantages(), torch.arange(8), None).value_B
    assert value_B.mean().item() == pytest.approx(0, abs=1e-6)
    assert value_B.abs().min() > 0
    with pytest.raises(ProxstepError, match=r"use at least 2, or objective\.normalize batch"):
        objective(rollout={"num_generations": 1}, advantage="batch-normalized")


@pytest.mark.parametrize("name", ["dr-grpo", "rloo"])
def test_special_cases_have_their_papers_defaults(name: str) -> None:
    section = resolve({"algorithm": name}, {}, "test").objective
    advantage, mode = {
        "dr-grpo": ("group-centered", "seq-mean-token-sum-norm"),
        "rloo": ("leave-one-out", "seq-mean-token-sum"),
    }[name]
    assert (section.advantage, section.loss_agg_mode) == (advantage, mode)  # type: ignore[union-attr]


# The local engine


def run(folder: Path, name: str, **changes: Any) -> tuple[list[dict[str, Any]], list[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    watcher = Silent()
    recipe = tiny_recipe(folder / "run", name, task=spread_reward(folder), **changes)
    assert lifecycle.train(recipe, watcher) == "finished"
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], watcher.notes


def watch_backward(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what every microbatch's backward is given, from now on."""
    calls: list[dict[str, Any]] = []
    backward = Objective.backward

    def watched(self: Objective, *inputs: torch.Tensor, **options: Any) -> Any:
        log_prob_BT, old_log_prob_BT, _, response_BT = inputs
        calls.append(
            {
                "keys": options["sequence_keys"].tolist(),
                "policy": [r[m].tolist() for r, m in zip(log_prob_BT, response_BT, strict=True)],
                "anchor": [
                    r[m].tolist() for r, m in zip(old_log_prob_BT, response_BT, strict=True)
                ],
                "hyper": dict(options["hyper"]),
                "importance": options["importance_B"],
            }
        )
        return backward(self, *inputs, **options)

    monkeypatch.setattr(Objective, "backward", watched)
    return calls


def test_minibatches_and_iterations_share_the_anchor_and_the_curvature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_backward(monkeypatch)
    run(
        tmp_path,
        "opo",
        steps=2,
        objective={"mu": "auto", "alpha": 0.0},
        update={"num_minibatches": 2, "num_iterations": 3, "microbatch_size": 4},
        optimizer={"name": "sgd", "learning_rate": 0.5},
    )
    assert len(calls) == 2 * 3 * 4  # steps, iterations, microbatches
    for step in (calls[:12], calls[12:]):
        first: dict[int, list[float]] = {}
        moved = 0
        for call in step:
            for key, policy, shared in zip(
                call["keys"], call["policy"], call["anchor"], strict=True
            ):
                assert first.setdefault(key, shared) == shared
                moved += policy != pytest.approx(shared, abs=1e-6)
        assert len(first) == 16
        assert moved > 16  # the policy leaves the anchor, the anchor does not follow
        for call in step[:2]:  # before the step's first update they are one
            for policy, shared in zip(call["policy"], call["anchor"], strict=True):
                assert policy == pytest.approx(shared, abs=1e-4)
        assert len({call["hyper"]["mu"] for call in step}) == 1
    assert calls[0]["hyper"]["mu"] != calls[12]["hyper"]["mu"]


def test_opo_measures_what_its_bounds_are_about(tmp_path: Path) -> None:
    lines, notes = run(
        tmp_path,
        "opo",
        steps=2,
        objective={"adaptive_tau": True, "mu": 0.5, "target_min": -0.9},
        update={"num_minibatches": 2, "num_iterations": 2},
    )
    assert all("were cut off" in note for note in notes)
    for line in lines[1:]:
        assert line["objective/tv_bound"] == pytest.approx(
            math.sqrt(line["objective/chi_square"]) / 2
        )
        assert line["objective/tv_bound"] > 0
        assert line["objective/mu"] == 0.5
        assert line["objective/alpha"] == 0.4
        assert 0.2 <= line["objective/tau"] <= 1.5
        assert line["objective/tau"] != 1.0
        assert 0 <= line["objective/frac_negative_target"] <= 1
        assert 0 <= line["objective/frac_over_positivity_bound"] <= 1
        assert 1 <= line["objective/effective_sample_size_min"] <= 4
        assert line["objective/abs_delta"] > 0
    assert "objective/tv_bound" not in lines[0]


def test_a_loss_that_importance_weights_shrink_is_named() -> None:
    text = objective().warning({"objective/importance_mean": 0.05})
    assert text is not None
    assert text.startswith("rollout.importance_cap: the mean importance weight is 0.05")
    assert objective().warning({"objective/importance_mean": 0.1}) is None


@pytest.mark.parametrize("name", ["reinforce", "rloo", "dr-grpo", "opo", "isopo+opo"])
def test_a_truncated_sampler_is_corrected(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_backward(monkeypatch)
    rollout = {"num_prompts": 4, "num_generations": 4, "max_completion_length": 3, "top_k": 4}
    changes: dict[str, Any] = {"steps": 1, "update": {"num_minibatches": 2}}
    plain, _ = run(tmp_path / "plain", name, rollout=rollout, **changes)
    corrected, _ = run(
        tmp_path / "corrected", name, rollout={**rollout, "importance_cap": 0.4}, **changes
    )
    assert all(call["importance"] is None for call in calls[:2])
    weight_B = torch.cat([call["importance"] for call in calls[2:]])
    assert ((weight_B > 0) & (weight_B <= 0.4)).all()  # the anchor gives what was kept less
    assert weight_B.min() < 0.4
    assert plain[1]["reward"] == corrected[1]["reward"]  # the same samples
    assert plain[1]["grad_norm"] != pytest.approx(corrected[1]["grad_norm"], rel=1e-2)
    assert corrected[1]["objective/importance_mean"] == pytest.approx(weight_B.mean().item())
    assert corrected[1]["objective/importance_max"] == pytest.approx(weight_B.max().item())
    assert 1 <= corrected[1]["objective/importance_sample_size"] <= 16
    assert "objective/importance_mean" not in plain[1]


def test_a_sampler_that_is_the_anchor_needs_no_correction(tmp_path: Path) -> None:
    rollout = {"num_prompts": 4, "num_generations": 4, "max_completion_length": 3}
    plain, _ = run(tmp_path / "plain", "opo", steps=1, rollout=rollout)
    corrected, _ = run(
        tmp_path / "corrected", "opo", steps=1, rollout={**rollout, "importance_cap": 2.0}
    )
    assert corrected[1]["objective/importance_mean"] == pytest.approx(1, abs=1e-4)
    assert corrected[1]["objective/importance_truncated"] == 0
    assert corrected[1]["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=1e-3)


# Ratios to the sampler


@pytest.mark.parametrize("name", ["dppo-tv", "dppo-kl"])
@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_dppo_takes_its_ratios_to_the_sampler(
    tmp_path: Path, name: str, num_minibatches: int
) -> None:
    """Below top_p 1 the sampler is not the policy; the trust region is around the sampler."""
    task, update = spread_reward(tmp_path), {"num_minibatches": num_minibatches}
    made = made_trainer(tmp_path / "run", name, task=task, update=update, rollout={"top_p": 0.7})
    batch, _ = collected(made)
    assert batch is not None
    assert batch.old_log_prob_BT is not None
    completions = batch.completions
    assert batch.old_log_prob_BT is completions.sampler_log_prob_BT
    with torch.no_grad():
        policy_BT = made._score(completions).log_prob_BT
    kept_BT = completions.response_BT[:, 1:]
    excess = (batch.old_log_prob_BT - policy_BT)[kept_BT]
    assert excess.min() > -1e-4  # what the cut keeps gets the rest's probability
    assert 0.05 < excess.mean() <= -math.log(0.7) + 1e-4
    _, metrics = made.objective.algorithm.loss(
        policy_BT, batch.old_log_prob_BT, batch.signal_B, kept_BT
    )
    assert (metrics["ratio"] < 1).all()


@pytest.mark.parametrize("name", ["dppo-tv", "dppo-kl"])
def test_a_sampler_that_is_the_policy_makes_no_difference(tmp_path: Path, name: str) -> None:
    """At top_p 1 the two agree up to rounding, and nothing is masked in the first update."""
    task = spread_reward(tmp_path)
    made = made_trainer(tmp_path / "run", name, task=task)
    batch, _ = collected(made)
    assert batch is not None
    assert batch.old_log_prob_BT is not None
    with torch.no_grad():
        policy_BT = made._score(batch.completions).log_prob_BT
    kept_BT = batch.completions.response_BT[:, 1:]
    torch.testing.assert_close(
        policy_BT[kept_BT], batch.old_log_prob_BT[kept_BT], rtol=0, atol=1e-4
    )
    _, metrics = made.objective.algorithm.loss(
        policy_BT, batch.old_log_prob_BT, batch.signal_B, kept_BT
    )
    assert (metrics["clip_ratio"] == 0).all()


def test_other_algorithms_take_theirs_to_the_old_policy(tmp_path: Path) -> None:
    made = made_trainer(tmp_path, "grpo", rollout={"top_p": 0.7}, update={"num_minibatches": 2})
    batch, _ = collected(made)
    assert batch is not None
    assert batch.completions.sampler_log_prob_BT is None
    assert batch.old_log_prob_BT is not None


def test_a_second_correction_for_the_sampler_is_refused() -> None:
    with pytest.raises(ProxstepError, match=r"rollout\.importance_cap corrects for the sampler"):
        objective("dppo-tv", {"importance_cap": 2.0})

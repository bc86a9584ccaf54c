"""Importance weights, and that with them another sampler gives the anchor's own loss."""

from __future__ import annotations

import math

import pytest
import torch
from tests.algorithms.loss_cases import (
    MODES,
    SEEDS,
    assert_close,
    counted,
    loop_aggregate,
    make_case,
)

from proxstep.algorithms import (
    ALGORITHMS,
    Aggregation,
    centered_weights,
    escort_weights,
    importance_weights,
    opo,
    sequence_coefficients,
)
from proxstep.algorithms.aggregate import aggregate
from proxstep.errors import ProxstepError


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cap", [0.5, 1.3, 1e6])
def test_equals_the_formula(seed, cap):
    case = make_case(seed)
    weight_B, metrics = importance_weights(
        case.log_probs, case.old_log_probs, case.response_mask, cap=cap
    )
    ratios = []
    for b in range(6):
        mask = case.response_mask[b]
        ratios.append(math.exp((case.log_probs[b] - case.old_log_probs[b])[mask].sum()))
    expected = torch.tensor([min(ratio, cap) for ratio in ratios], dtype=torch.float64)
    assert_close(weight_B, expected)
    assert ratios[4] == 1  # no token
    assert metrics == pytest.approx(
        {
            "importance_mean": expected.mean().item(),
            "importance_max": expected.max().item(),
            "importance_truncated": sum(ratio > cap for ratio in ratios) / 6,
            "importance_sample_size": (expected.sum() ** 2 / (expected**2).sum()).item(),
        }
    )


def test_the_sampler_itself_has_weight_one_and_masked_positions_count_nowhere():
    case = make_case(0)
    poisoned = case.log_probs.masked_fill(~case.response_mask, float("nan"))
    weight_B, metrics = importance_weights(poisoned, case.log_probs, case.response_mask, cap=1.0)
    assert (weight_B == 1).all()
    assert metrics["importance_truncated"] == 0
    assert metrics["importance_sample_size"] == pytest.approx(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_apart_policies_have_finite_weights_above_zero(dtype):
    log_ratio = torch.tensor([[1e4], [-1e4]], dtype=dtype).requires_grad_()
    mask = torch.ones(2, 1, dtype=torch.bool)
    weight_B, _ = importance_weights(log_ratio, torch.zeros(2, 1, dtype=dtype), mask, cap=1e30)
    assert weight_B.isfinite().all()
    assert (weight_B > 0).all()
    assert not weight_B.requires_grad


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_that_is_not_positive_is_refused(cap):
    case = make_case(0)
    with pytest.raises(ProxstepError, match="cap is"):
        importance_weights(case.log_probs, case.old_log_probs, case.response_mask, cap=cap)


# The aggregation's sequence weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_sequence_weights_multiply_the_values_and_leave_the_counts(mode, seed):
    case = make_case(seed)
    weight_B = case.advantages.exp().requires_grad_()
    value = case.log_probs.clone().requires_grad_()
    aggregation = Aggregation(mode, max_length=9, sequence_weights=weight_B)
    loss = aggregate(value, case.response_mask, aggregation)
    weighted = (case.log_probs * weight_B.detach()[:, None]).tolist()
    assert_close(loss.detach(), loop_aggregate(weighted, case.response_mask, mode, 9))
    loss.backward()
    assert weight_B.grad is None
    assert value.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_another_batch_are_refused(mode):
    case = make_case(0)
    aggregation = Aggregation(mode, sequence_weights=torch.ones(5))
    with pytest.raises(ProxstepError, match=r"sequence_weights has shape \(5,\).*\(6,\)"):
        aggregate(case.log_probs, case.response_mask, aggregation)


@pytest.mark.parametrize("name", [n for n, o in ALGORITHMS.items() if o.level == "sequence"])
def test_the_coefficients_handed_to_isopo_carry_the_weights(name):
    case = make_case(2)
    weight_B = case.advantages.exp()
    counts = counted("seq-mean-token-mean", case.response_mask)
    weighted = Aggregation(counts.mode, counts.num_sequences, sequence_weights=weight_B)
    plain_B, _, _ = sequence_coefficients(ALGORITHMS[name], *case.tensors, aggregation=counts)
    coefficient_B, _, _ = sequence_coefficients(
        ALGORITHMS[name], *case.tensors, aggregation=weighted
    )
    assert_close(coefficient_B, weight_B * plain_B)


# Another sampler, every sample enumerated

NUM_FIRST, NUM_SECOND = 2, 3


class Tree:
    """A policy over sequences of two tokens, and batches that hold each of them n times."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.anchor_counts = torch.randint(1, 5, (6,), generator=generator)
        order = torch.tensor([3, 0, 4, 5, 1, 2])
        self.sampler_counts = self.anchor_counts[order]
        self.anchor_counts[0] += 2  # so that the two differ, whatever was drawn
        self.sampler_counts[2] += 2
        self.advantages = random(6)
        self.theta = random(6).requires_grad_()

    @staticmethod
    def token_log_probs(outcome_log_prob: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of both tokens of each of the six sequences."""
        grid = outcome_log_prob.view(NUM_FIRST, NUM_SECOND)
        first = grid.logsumexp(1, keepdim=True)
        return torch.stack([first.expand_as(grid), grid - first], dim=-1).view(6, 2)

    def loss(self, counts: torch.Tensor, *, corrected: bool, surrogate: str, **choices):
        """OPO's loss over a batch that holds each sequence as often as counts says."""
        row = torch.arange(6).repeat_interleave(counts)
        anchor, sampler = (
            self.token_log_probs((n.double() / n.sum()).log())[row]
            for n in (self.anchor_counts, self.sampler_counts)
        )
        mask = torch.ones(len(row), 2, dtype=torch.bool)
        importance = importance_weights(anchor, sampler, mask, cap=1e9)[0] if corrected else None
        group = torch.zeros_like(row)
        weight_B, _ = escort_weights(
            self.advantages[row],
            group,
            correction={
                "absorbed": None,
                "length": anchor.mean(1),
                "sequence": anchor.sum(1),
            }[choices["correction"]],
            importance=importance,
        )
        drive_B = centered_weights(weight_B, group, kind=choices["kind"], importance=importance)
        log_probs = self.token_log_probs(self.theta.log_softmax(0))[row]
        aggregation = Aggregation("seq-mean-token-mean", sequence_weights=importance)
        return opo(
            log_probs, anchor, drive_B, mask, mu=0.8, surrogate=surrogate, aggregation=aggregation
        )[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("surrogate", ["log", "ratio"])
@pytest.mark.parametrize("kind", ["center", "zscore", "none"])
@pytest.mark.parametrize("correction", ["absorbed", "length", "sequence"])
def test_another_sampler_gives_the_anchors_loss_and_gradient(seed, surrogate, kind, correction):
    tree = Tree(seed)
    choices = {"surrogate": surrogate, "kind": kind, "correction": correction}
    of_anchor, corrected, uncorrected = (
        tree.loss(counts, corrected=is_corrected, **choices)
        for counts, is_corrected in (
            (tree.anchor_counts, False),
            (tree.sampler_counts, True),
            (tree.sampler_counts, False),
        )
    )
    expected, actual, wrong = (
        torch.autograd.grad(loss, tree.theta)[0] for loss in (of_anchor, corrected, uncorrected)
    )
    assert_close(corrected.detach(), of_anchor.detach(), tolerance=1e-10)
    assert_close(actual, expected, tolerance=1e-10)
    assert (wrong - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("normalize", ["group", "batch"])
def test_the_weighted_mean_of_the_escort_weights_is_one(normalize):
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    importance = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    group = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    weight_B, metrics = escort_weights(
        advantages, group, normalize=normalize, importance=importance
    )
    zscore_B = centered_weights(
        weight_B, group, kind="zscore", normalize=normalize, importance=importance
    )
    sizes = []
    for member in [group == 0, group == 1] if normalize == "group" else [group >= 0]:
        w, omega, z = importance[member], weight_B[member], zscore_B[member]
        assert_close((w * omega).sum() / w.sum(), 1.0)
        assert_close((w * z).sum(), 0.0)
        n = int(member.sum())
        assert_close((w * z**2).sum() / w.sum() * n / (n - 1), 1.0, tolerance=1e-4)
        sizes.append(((w * omega).sum() ** 2 / ((w * omega) ** 2).sum()).item())
    assert metrics["effective_sample_size"] == pytest.approx(sum(sizes) / len(sizes))
    assert metrics["effective_sample_size_min"] == pytest.approx(min(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["center", "zscore"])
def test_equal_advantages_give_exactly_no_drive_under_any_sampler(dtype, kind):
    group = torch.arange(14) % 2
    importance = torch.rand(14, generator=torch.Generator().manual_seed(0)).to(dtype) + 1e-6
    advantages = torch.full((14,), 1 / 3, dtype=dtype)
    weight_B, _ = escort_weights(advantages, group, importance=importance)
    assert (weight_B == 1).all()
    assert (centered_weights(weight_B, group, kind=kind, importance=importance) == 0).all()


@pytest.mark.parametrize("importance", [[1.0, 0.0], [1.0, -1.0], [1.0, float("inf")]])
def test_an_importance_weight_that_is_not_positive_is_refused(importance):
    for function in (escort_weights, centered_weights):
        with pytest.raises(ProxstepError, match="importance"):
            function(torch.ones(2), torch.tensor([0, 0]), importance=torch.tensor(importance))

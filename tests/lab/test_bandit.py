import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from proxstep.isopo.means import TrailingMeans
from proxstep.isopo.rule import GUARD
from proxstep.lab import bandit as toy
from proxstep.lab import toy_report
from proxstep.lab.bandit import (
    METHODS,
    Rollout,
    Trace,
    direction,
    draw,
    kl_per_gain,
    make_bandit,
    quartiles,
    reward_at_kl,
    run_method,
    step_size,
)
from proxstep.lab.categorical import cosines, natural_gradient, scores
from tests.theory.maths.categorical import chi_square, kl
from tests.theory.maths.fisher import fisher_matrix, policy_gradient

SEEDS = (0, 1, 2)


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def small(request):
    """A bandit of 6 outcomes, and parameters off the start."""
    bandit = make_bandit(request.param, num_outcomes=6, num_features=3)
    generator = torch.Generator().manual_seed(100 + request.param)
    step_D = torch.randn(3, generator=generator, dtype=torch.float64)
    return bandit, bandit.start_D + 0.5 * step_D / (bandit.feature_VD @ step_D).std()


@pytest.fixture
def batch():
    return torch.rand(64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def exact(bandit, theta_D):
    """The policy, its scores, Fisher matrix and natural gradient."""
    log_prob_V = bandit.log_policy(theta_D)
    score_VD = scores(log_prob_V, bandit.feature_VD)
    natural_D = natural_gradient(score_VD, log_prob_V.exp(), bandit.reward_V)
    return log_prob_V, score_VD, fisher_matrix(score_VD, log_prob_V.exp()), natural_D


def update(name, bandit, theta_D, rollout):
    return direction(METHODS[name], bandit, theta_D, rollout, TrailingMeans(decay=0.9))


def gain(bandit, theta_D, direction_D, budget):
    """The reward gained by a step that spends a KL divergence."""
    before_V = bandit.log_policy(theta_D)
    size = step_size(before_V, bandit.feature_VD @ direction_D, budget)
    after_V = bandit.log_policy(theta_D + size * direction_D)
    return ((after_V.exp() - before_V.exp()) @ bandit.reward_V).item()


# What is exact


def test_exact_quantities_agree_with_brute_force(small):
    bandit, theta_D = small
    log_prob_V, score_VD, fisher_DD, natural_D = exact(bandit, theta_D)
    weights = [math.exp((x_D * theta_D).sum().item()) for x_D in bandit.feature_VD]
    probs = [weight / sum(weights) for weight in weights]
    assert log_prob_V.exp().tolist() == pytest.approx(probs)

    oracle_DD = torch.zeros(3, 3, dtype=torch.float64)
    for y, prob in enumerate(probs):
        leaf_D = theta_D.clone().requires_grad_()
        bandit.log_policy(leaf_D)[y].backward()
        torch.testing.assert_close(score_VD[y], leaf_D.grad)
        oracle_DD += prob * torch.outer(leaf_D.grad, leaf_D.grad)
    torch.testing.assert_close(fisher_DD, oracle_DD)

    leaf_D = theta_D.clone().requires_grad_()
    (bandit.log_policy(leaf_D).exp() * bandit.reward_V).sum().backward()
    torch.testing.assert_close(
        policy_gradient(score_VD, log_prob_V.exp(), bandit.reward_V), leaf_D.grad
    )
    torch.testing.assert_close(natural_D, torch.linalg.solve(oracle_DD, leaf_D.grad))

    others = bandit.log_policy(bandit.start_D).exp().tolist()
    divergence = sum(p * math.log(p / q) for p, q in zip(probs, others, strict=True))
    chi = sum(q * (p / q - 1) ** 2 for p, q in zip(probs, others, strict=True))
    initial_V = bandit.log_policy(bandit.start_D)
    assert kl(log_prob_V.exp(), initial_V.exp()).item() == pytest.approx(divergence)
    assert chi_square(log_prob_V.exp(), initial_V.exp()).item() == pytest.approx(chi)


def test_the_natural_gradient_gains_most_for_its_kl(small):
    """Among steps of equal length in the Fisher metric, at first order; so also for small KL."""
    bandit, theta_D = small
    log_prob_V, score_VD, fisher_DD, natural_D = exact(bandit, theta_D)
    gradient_D = policy_gradient(score_VD, log_prob_V.exp(), bandit.reward_V)
    best = gradient_D @ natural_D / (natural_D @ fisher_DD @ natural_D).sqrt()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other_D = torch.randn(3, generator=generator, dtype=torch.float64)
        unit_D = other_D / (other_D @ fisher_DD @ other_D).sqrt()
        assert gradient_D @ unit_D < best
        fisher, _ = cosines(other_D, natural_D, fisher_DD)
        assert (gradient_D @ unit_D / best).item() == pytest.approx(fisher)
        best_gain = gain(bandit, theta_D, natural_D, 1e-8)
        assert gain(bandit, theta_D, other_D, 1e-8) < best_gain
        if fisher > 0.01:
            ratio = gain(bandit, theta_D, other_D, 1e-8) / best_gain
            assert ratio == pytest.approx(fisher, rel=0.05)


def test_cosines_are_those_of_the_two_inner_products():
    fisher_DD = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    first_D, second_D = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    fisher, euclidean = cosines(first_D, second_D, fisher_DD)
    assert fisher == pytest.approx(4 / math.sqrt(5 * 4))
    assert euclidean == pytest.approx(1 / math.sqrt(2))
    assert cosines(torch.zeros_like(first_D), second_D, fisher_DD) == (None, None)


@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.1])
def test_a_step_spends_its_kl(small, budget):
    bandit, theta_D = small
    log_prob_V = bandit.log_policy(theta_D)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-6, 1.0, 1e4):
        step_D = scale * torch.randn(3, generator=generator, dtype=torch.float64)
        size = step_size(log_prob_V, bandit.feature_VD @ step_D, budget)
        moved_V = bandit.log_policy(theta_D + size * step_D)
        assert size > 0
        assert kl(moved_V.exp(), log_prob_V.exp()).item() == pytest.approx(budget, rel=1e-6)


def test_a_kl_out_of_reach_is_no_step():
    log_prob_V = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64).log()
    tilt_V = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    limit = -math.log(0.9)
    assert step_size(log_prob_V, tilt_V, limit * 0.501) == 0.0
    assert step_size(log_prob_V, torch.zeros_like(tilt_V), 1e-3) == 0.0
    size = step_size(log_prob_V, tilt_V, limit * 0.499)
    moved_V = (log_prob_V + size * tilt_V).log_softmax(dim=0)
    assert kl(moved_V.exp(), log_prob_V.exp()).item() == pytest.approx(limit * 0.499, rel=1e-6)


# What the methods do


def test_drawing_follows_the_policy():
    log_prob_V = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    reward_V = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    uniform_B = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    rollout = draw(log_prob_V, reward_V, uniform_B)
    assert rollout.outcome_B.bincount().tolist() == [500, 200, 300]
    assert rollout.advantage_B.mean().abs() < 1e-12
    assert rollout.drive_B.mean().abs() < 1e-12
    torch.testing.assert_close(rollout.old_log_prob_BT[:, 0], log_prob_V[rollout.outcome_B])


def test_reinforce_in_expectation_is_the_policy_gradient(small):
    """An infinite batch: every outcome once, its advantage weighted by its probability."""
    bandit, theta_D = small
    log_prob_V, score_VD, _, _ = exact(bandit, theta_D)
    every_V = torch.arange(6)
    weighted_V = 6 * log_prob_V.exp() * bandit.reward_V
    rollout = Rollout(every_V, log_prob_V[:, None], weighted_V, weighted_V)
    torch.testing.assert_close(
        update("reinforce", bandit, theta_D, rollout),
        policy_gradient(score_VD, log_prob_V.exp(), bandit.reward_V),
    )


def test_reinforce_is_unbiased_over_all_batches(small):
    """Every batch of two, with the reward above the other's as the advantage."""
    bandit, theta_D = small
    log_prob_V, score_VD, _, _ = exact(bandit, theta_D)
    mean_D = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(6), repeat=2):
        outcome_B = torch.tensor(pair)
        reward_B = bandit.reward_V[outcome_B]
        old_BT = log_prob_V[outcome_B][:, None]
        rollout = Rollout(outcome_B, old_BT, reward_B - reward_B.flip(0), reward_B)
        step_D = update("reinforce", bandit, theta_D, rollout)
        mean_D += log_prob_V[outcome_B].sum().exp() * step_D
    torch.testing.assert_close(mean_D, policy_gradient(score_VD, log_prob_V.exp(), bandit.reward_V))


@pytest.mark.parametrize("seed", SEEDS)
def test_objectives_agree_at_the_start_of_a_rollout_and_part_later(seed, batch):
    bandit = make_bandit(seed)
    theta_D = bandit.start_D
    rollout = draw(bandit.log_policy(theta_D), bandit.reward_V, batch)
    reinforce_D = update("reinforce", bandit, theta_D, rollout)
    assert reinforce_D.norm() > 0.01
    same = ("grpo", "dapo", "gspo", "cispo", "dro")
    for name in same:
        torch.testing.assert_close(update(name, bandit, theta_D, rollout), reinforce_D)
    size = step_size(bandit.log_policy(theta_D), bandit.feature_VD @ reinforce_D, 0.02)
    later_D = theta_D + size * reinforce_D
    later = {name: update(name, bandit, later_D, rollout) for name in ("reinforce", *same)}
    for one, other in itertools.combinations(later, 2):
        if {one, other} != {"grpo", "dapo"}:
            assert not torch.allclose(later[one], later[other], rtol=1e-3), (one, other)


def test_opo_pushes_by_its_drive(small, batch):
    bandit, theta_D = small
    log_prob_V, score_VD, _, _ = exact(bandit, theta_D)
    rollout = draw(log_prob_V, bandit.reward_V, batch)
    expected_D = rollout.drive_B @ score_VD[rollout.outcome_B] / 64
    torch.testing.assert_close(update("opo", bandit, theta_D, rollout), expected_D)


def test_isopo_weighs_by_exact_lengths(small, batch):
    bandit, theta_D = small
    log_prob_V, score_VD, fisher_DD, _ = exact(bandit, theta_D)
    rollout = draw(log_prob_V, bandit.reward_V, batch)
    lengths, npg = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for outcome, advantage in zip(rollout.outcome_B, rollout.advantage_B, strict=True):
        score_D = score_VD[outcome]
        square = score_D @ fisher_DD @ score_D
        lengths += advantage / 64 * score_D / (square + GUARD).sqrt()
        npg += advantage / 64 * score_D / (square / score_D.square().sum() + GUARD)
    torch.testing.assert_close(update("isopo", bandit, theta_D, rollout), lengths)
    torch.testing.assert_close(update("isopo-npg", bandit, theta_D, rollout), npg)


def test_isopo_natural_is_the_damped_natural_gradient_of_the_batch(small, batch):
    """(J^T J + c I)^-1 J^T A, with c the kernel's mean eigenvalue in the first update."""
    bandit, theta_D = small
    log_prob_V, score_VD, _, _ = exact(bandit, theta_D)
    rollout = draw(log_prob_V, bandit.reward_V, batch)
    score_BD = score_VD[rollout.outcome_B]
    damping = score_BD.square().sum() / 64 * torch.eye(3, dtype=torch.float64)
    expected_D = torch.linalg.solve(
        score_BD.mT @ score_BD + damping, score_BD.mT @ rollout.advantage_B / 64
    )
    torch.testing.assert_close(update("isopo-natural", bandit, theta_D, rollout), expected_D)


def test_isopo_natural_damps_by_its_past(small, batch):
    bandit, theta_D = small
    rollout = draw(bandit.log_policy(theta_D), bandit.reward_V, batch)
    trailing = TrailingMeans(decay=0.9)
    directions = []
    for theta in (theta_D, 3 * theta_D):
        directions.append(direction(METHODS["isopo-natural"], bandit, theta, rollout, trailing))
        trailing.fold()
    fresh_D = update("isopo-natural", bandit, 3 * theta_D, rollout)
    assert not torch.allclose(directions[1], fresh_D, rtol=1e-6)


def test_a_batch_is_drawn_from_the_current_policy_every_few_updates(monkeypatch):
    drawn = []

    def count(log_prob_V, *arguments):
        drawn.append(log_prob_V)
        return draw(log_prob_V, *arguments)

    monkeypatch.setattr(toy, "draw", count)
    steps = 2 * toy.UPDATES_PER_ROLLOUT + 1
    run_method(make_bandit(0), METHODS["opo"], seed=0, steps=steps)
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_trailing_means_are_folded_after_each_update(monkeypatch):
    folded = []

    class Counting(TrailingMeans):
        def fold(self, group=None):
            folded.append(self.has_pending)
            super().fold(group)

    monkeypatch.setattr(toy, "TrailingMeans", Counting)
    run_method(make_bandit(0), METHODS["isopo-natural"], seed=0, steps=3)
    assert folded == [True] * 3


def test_equal_rewards_push_nowhere(small, batch):
    bandit, theta_D = small
    rollout = draw(bandit.log_policy(theta_D), torch.ones_like(bandit.reward_V), batch)
    for name, method in METHODS.items():
        if method.objective is not None:
            assert update(name, bandit, theta_D, rollout).abs().max() < 1e-15, name


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_finite_spends_the_same_and_repeats(name):
    bandit = make_bandit(5, num_outcomes=8, num_features=3)
    trace = run_method(bandit, METHODS[name], seed=5, steps=12)
    again = run_method(bandit, METHODS[name], seed=5, steps=12)
    assert trace == again
    for column in (trace.reward, trace.kl_policy_initial, trace.kl_initial_policy):
        assert len(column) == 13
    numbers = [x for column in vars(trace).values() for x in column if x is not None]
    assert all(math.isfinite(number) for number in numbers)
    for spent, cosine in zip(trace.kl_spent, trace.cosine_fisher, strict=True):
        if cosine is None:
            assert spent == 0
        else:
            assert spent == pytest.approx(toy.KL_PER_UPDATE, rel=1e-6)
            assert -1 - 1e-9 <= cosine <= 1 + 1e-9
    assert trace.reward[0] == pytest.approx(
        (bandit.log_policy(bandit.start_D).exp() @ bandit.reward_V).item()
    )
    assert trace.chi_square[0] == trace.kl_policy_initial[0] == 0
    if name == "natural gradient":
        assert trace.cosine_fisher == pytest.approx([1.0] * 12)
        assert trace.reward[-1] > trace.reward[0] + 0.05


def test_a_trace_records_what_the_update_did():
    bandit = make_bandit(3)
    trace = run_method(bandit, METHODS["natural gradient"], seed=3, steps=1)
    before_V, _, _, natural_D = exact(bandit, bandit.start_D)
    size = step_size(before_V, bandit.feature_VD @ natural_D, toy.KL_PER_UPDATE)
    after_V = bandit.log_policy(bandit.start_D + size * natural_D)
    before_V, after_V = before_V.exp(), after_V.exp()
    assert trace.reward[1] == pytest.approx((after_V @ bandit.reward_V).item())
    forth, back = kl(after_V, before_V).item(), kl(before_V, after_V).item()
    assert abs(forth / back - 1) > 1e-4
    assert trace.kl_policy_initial[1] == pytest.approx(forth, rel=1e-6)
    assert trace.kl_initial_policy[1] == pytest.approx(back, rel=1e-6)
    assert trace.chi_square[1] == pytest.approx(chi_square(after_V, before_V).item())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_narrow_clip_loses_the_direction_within_a_rollout(seed):
    bandit = make_bandit(seed)
    gspo, reinforce = (
        run_method(bandit, METHODS[name], seed=seed, steps=8).cosine_fisher
        for name in ("gspo", "reinforce")
    )
    assert gspo[0] == pytest.approx(reinforce[0])
    assert sum(gspo[1:]) < 0.5 * sum(reinforce[1:])


def test_scores_differ_in_length():
    spreads = []
    for seed in range(10):
        bandit = make_bandit(seed)
        score_VD = scores(bandit.log_policy(bandit.start_D), bandit.feature_VD)
        spreads.append(score_VD.norm(dim=1).log().std().item())
    assert sum(spreads) / 10 > 0.5


def test_a_converged_policy_is_left_alone():
    bandit = make_bandit(1, num_outcomes=4, num_features=3)
    trace = run_method(bandit, METHODS["natural gradient"], seed=1, steps=120)
    assert trace.reward[-1] > 0.999
    assert trace.kl_spent[-1] == 0
    assert all(math.isfinite(kl) for kl in trace.kl_initial_policy)


# What is reported


def test_kl_per_gain_needs_a_gain():
    trace = Trace(reward=[0.5, 0.7, 0.4], kl_policy_initial=[0.0, 0.1, 0.2])
    assert kl_per_gain(trace) == [pytest.approx(0.5), None]


def test_reward_at_kl_is_that_of_the_first_crossing():
    trace = Trace(reward=[0.5, 0.7, 0.4, 0.9], kl_policy_initial=[0.0, 0.2, 0.1, 0.3])
    rewards = [reward_at_kl(trace, kl) for kl in (0.0, 0.1, 0.2, 0.25, 0.4)]
    assert rewards == [0.5, pytest.approx(0.6), pytest.approx(0.7), pytest.approx(0.775), None]


def test_quartiles_are_of_what_is_there():
    assert quartiles([4.0, None, 1.0, 2.0, 3.0, 0.0]) == (1.0, 2.0, 3.0)
    assert quartiles([None, None]) is None


def test_summary_of_two_seeds():
    first = Trace(
        reward=[0.5, 0.6, 0.8],
        kl_policy_initial=[0.0, 0.4, 0.9],
        kl_initial_policy=[0.0, 0.3, 0.7],
        chi_square=[0.0, 1.0, 2.0],
        cosine_fisher=[0.5, None],
        cosine_euclidean=[0.25, None],
        kl_spent=[0.001, 0.0],
    )
    second = Trace(
        reward=[0.5, 0.5, 0.4],
        kl_policy_initial=[0.0, 0.1, 0.1],
        kl_initial_policy=[0.0, 0.1, 0.3],
        chi_square=[0.0, 1.0, 4.0],
        cosine_fisher=[None, None],
        cosine_euclidean=[None, None],
        kl_spent=[0.0, 0.0],
    )
    summary = toy_report.summarize_bandit({"one": [first, second], "two": [second]})
    one, two = summary["one"], summary["two"]
    assert one["frac_no_update"] == 0.75
    assert (one["frac_reached_level"], two["frac_reached_level"]) == (0.5, 0.0)
    assert one["reward"] == pytest.approx((0.5, 0.6, 0.7))
    assert one["reward_at_level"] == pytest.approx((0.64, 0.64, 0.64))
    assert one["gain"][1] == pytest.approx(0.1)
    assert one["kl_policy_initial"][1] == pytest.approx(0.5)
    assert one["kl_initial_policy"][1] == pytest.approx(0.5)
    assert one["chi_square"][1] == pytest.approx(3.0)
    assert one["kl_per_gain"][1] == pytest.approx(3.0)
    assert one["distance_fisher"][1] == pytest.approx(0.5)
    assert one["distance_euclidean"][1] == pytest.approx(0.75)
    assert two["distance_fisher"] is two["kl_per_gain"] is two["reward_at_level"] is None
    assert toy_report.bandit_table(summary, 2, 2).row_count == 2


def test_report_writes_figure_updates_and_table(tmp_path, capsys):
    toy_report.report_bandit(tmp_path, Console(width=100), num_seeds=2, steps=9)
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines())
    for name in METHODS:
        assert name in printed
    assert (tmp_path / "bandit.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "bandit.svg").read_text()
    content = json.loads((tmp_path / "bandit.json").read_text())
    assert content["settings"]["num_seeds"] == 2
    assert list(content["summary"]) == list(METHODS)
    with (tmp_path / "bandit.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * 2 * 10
    last = [float(row["reward"]) for row in rows if row["step"] == "9" and row["method"] == "opo"]
    assert content["summary"]["opo"]["reward"][1] == pytest.approx(sum(last) / 2, rel=1e-4)
    assert [row["kl_spent"] for row in rows if row["step"] == "0"] == [""] * len(METHODS) * 2


def test_the_page_shows_the_committed_table():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "toy.md").read_text()
    content = json.loads((root / "experiments" / "toy" / "bandit.json").read_text())
    assert list(content["summary"]) == list(METHODS)
    assert content["settings"]["kl_per_update"] == toy.KL_PER_UPDATE
    for name, row in content["summary"].items():
        cells = [name]
        for field, (_, form) in toy_report.BANDIT_COLUMNS.items():
            cells.append("-" if row[field] is None else format(row[field][1], form))
        cells.append(f"{row['frac_no_update']:.0%}")
        assert f"| {' | '.join(cells)} |" in page

"""The split of the gradient's noise against policies whose noise is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proxstep.isopo.diagnostics.noise_split import NoiseSplit, noise_split, pooled

DIM, ACTIONS, PROMPTS = 5, 4, 3
SPLIT = NoiseSplit(8, 16, 0.1, 0.5, 1.0, 3.0)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Policy:
    """Every prompt has a policy over few actions, with a reward and a score for each."""

    def __init__(self, seed: int) -> None:
        settings = {"generator": draw(seed), "dtype": torch.float64}
        self.prob_PA = torch.randn(PROMPTS, ACTIONS, **settings).softmax(dim=1)
        self.reward_PA = torch.randn(PROMPTS, ACTIONS, **settings)
        score_PAD = torch.randn(PROMPTS, ACTIONS, DIM, **settings) + 0.5
        mean_PD = torch.einsum("pa,pad->pd", self.prob_PA, score_PAD)
        self.score_PAD = score_PAD - mean_PD[:, None]
        self.gamma_PD = torch.einsum("pa,pa,pad->pd", self.prob_PA, self.reward_PA, self.score_PAD)

    def group(self, prompt: int, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Centered rewards and scores of sampled actions, (..., n) and (..., n, dim)."""
        reward = self.reward_PA[prompt, actions]
        return reward - reward.mean(dim=-1, keepdim=True), self.score_PAD[prompt, actions]

    def noise(self, prompt: int, n: int) -> float:
        """The variance of sum_i a_i G_i / (n - 1), by summing over every group of n actions."""
        every = torch.tensor(list(itertools.product(range(ACTIONS), repeat=n)))
        chance = self.prob_PA[prompt, every].prod(dim=1)
        a, score = self.group(prompt, every)
        gradient = torch.einsum("xn,xnd->xd", a, score) / (n - 1)
        assert torch.allclose(chance @ gradient, self.gamma_PD[prompt])
        return float(chance @ (gradient - self.gamma_PD[prompt]).square().sum(dim=1))


def sampled(policy: Policy, num_prompts: int, n: int, seed: int) -> NoiseSplit:
    """The split of one batch: prompts and actions drawn at random."""
    generator = draw(seed)
    prompts = torch.randint(PROMPTS, (num_prompts,), generator=generator)
    parts = []
    for prompt in prompts.tolist():
        actions = torch.multinomial(policy.prob_PA[prompt], n, True, generator=generator)
        parts.append(policy.group(prompt, actions))
    a, score = (torch.cat(part) for part in zip(*parts, strict=True))
    group = torch.arange(num_prompts).repeat_interleave(n)
    found = noise_split(a[None], (score @ score.mT)[None], group[None])
    assert found is not None
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_it_predicts_the_noise_of_other_groups(seed: int) -> None:
    """From batches of 6 x 5: the truth of 2, 3 and 6 generations, each within its error."""
    policy = Policy(seed)
    splits = [sampled(policy, 6, 5, seed) for seed in range(1_000)]
    mean = pooled(splits)
    assert mean is not None
    gamma = policy.gamma_PD.mean(dim=0)
    between = float((policy.gamma_PD - gamma).square().sum(dim=1).mean())
    truths = {"squared_gradient": float(gamma @ gamma), "between": between}
    for name, truth in truths.items():
        values = torch.tensor([getattr(split, name) for split in splits])
        assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5, name
    for n in (2, 3, 6):
        within = sum(policy.noise(prompt, n) for prompt in range(PROMPTS)) / PROMPTS
        assert mean.within(n) == pytest.approx(within, rel=0.1)
        assert mean.variance(7, n) == pytest.approx((between + within) / 7, rel=0.15)


def test_products_of_pairs_by_hand() -> None:
    """Every pair of pairs of five completions, written out."""
    a = torch.randn(5, generator=draw(0), dtype=torch.float64)
    a = a - a.mean()
    score = torch.randn(10, 3, generator=draw(1), dtype=torch.float64)
    pairs = list(itertools.combinations(range(5), 2))
    h = {(i, j): (a[i] - a[j]) * (score[i] - score[j]) / 2 for i, j in pairs}
    mean = {}
    for common in (0, 1, 2):
        products = [
            float(h[left] @ h[right])
            for left, right in itertools.product(pairs, repeat=2)
            if len({*left} & {*right}) == common
        ]
        mean[common] = sum(products) / len(products)
    twice, group = torch.cat([a, 0 * a]), torch.arange(2).repeat_interleave(5)
    found = noise_split(twice[None], (score @ score.mT)[None], group[None])
    assert found is not None
    assert found.squared_gradient == 0  # the other prompt's rewards are equal
    assert found.between == pytest.approx(mean[0] / 2)
    assert found.single == pytest.approx((mean[1] - mean[0]) / 2)
    assert found.pair == pytest.approx((mean[2] - mean[0]) / 2)


def test_microbatches_and_padding() -> None:
    """Two microbatches of two groups, the second one padded."""
    score = torch.randn(2, 10, 3, generator=draw(0), dtype=torch.float64)
    a = torch.randn(2, 2, 5, generator=draw(1), dtype=torch.float64)
    a = (a - a.mean(dim=2, keepdim=True)).flatten(1)
    group = torch.arange(4).repeat_interleave(5).view(2, 10)
    parts = [noise_split(a[[m]], (score[m] @ score[m].mT)[None], group[[m]]) for m in range(2)]
    padded_a = torch.cat([a, 9 * torch.ones(2, 3)], dim=1)
    padded = torch.nn.functional.pad(score @ score.mT, (0, 3, 0, 3))
    both = noise_split(padded_a, padded, torch.nn.functional.pad(group, (0, 3), value=-1))
    mean = pooled([part for part in parts if part is not None])
    assert both is not None
    assert mean is not None
    assert both.num_prompts == 4
    for name in ("squared_gradient", "between", "single", "pair", "num_generations"):
        assert getattr(both, name) == pytest.approx(getattr(mean, name))


@pytest.mark.parametrize(
    ("coefficients", "groups"),
    [
        ([1.0, -1.0, 0.0] * 2, [0] * 3 + [1] * 3),
        ([1.0, -1.0, 0.5, -0.5] * 2, [0] * 8),
        ([1.0, 1.0, 0.5, -0.5] * 2, [0] * 4 + [1] * 4),
        ([1.0, -1.0, 0.5, -0.5] * 2, [-1] * 8),
    ],
    ids=["three completions", "one prompt", "no baseline", "unknown groups"],
)
def test_what_cannot_be_split_is_unknown(coefficients: list[float], groups: list[int]) -> None:
    kernel = torch.eye(len(groups))
    found = noise_split(torch.tensor([coefficients]), kernel[None], torch.tensor([groups]))
    assert found is None


def test_the_cheapest_batch_of_the_same_noise() -> None:
    for split in (SPLIT, replace(SPLIT, between=0.0), replace(SPLIT, between=9.0)):
        prompts, generations = split.cheapest(8, 16)
        assert split.variance(prompts, generations) <= split.variance(8, 16) * (1 + 1e-6)
        assert generations >= 2
        for p, n in itertools.product(range(1, 65), range(2, 129)):
            if p * n < prompts * generations:
                assert split.variance(p, n) > split.variance(8, 16)
    assert replace(SPLIT, between=0.0).cheapest(8, 16)[0] < 8
    assert replace(SPLIT, between=9.0).cheapest(8, 16)[1] < 16


def test_in_words() -> None:
    prompts, generations = SPLIT.cheapest(8, 16)
    share = f"{prompts * generations / 128:.0%}"
    said = SPLIT.sentence()
    assert f"You sample 8 x 16; {prompts} x {generations} would have the same noise at" in said
    assert f"{share} of the rollouts" in said
    assert f"equally long at {SPLIT.critical_prompts(16):.3g} x 16" in said
    hidden = replace(SPLIT, squared_gradient=-1.0)
    assert hidden.critical_prompts(16) == math.inf
    assert "equally long" not in hidden.sentence()
    few = replace(SPLIT, num_prompts=1, num_generations=2)
    assert "nothing is much cheaper" in few.sentence()
    assert "no noise" in replace(SPLIT, between=0.0, single=0.0, pair=0.0).sentence()
    assert pooled([]) is None

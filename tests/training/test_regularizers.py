"""The entropy bonus and the KL penalty: their gradient, alone, beside an objective and ISOPO."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import Silent, tiny_recipe
from tests.models import tiny_qwen3
from tests.selection import slow, square
from torch import Tensor, nn

from proxstep.config.recipe import Recipe
from proxstep.logprobs.tokens import entropy, kl_divergence
from proxstep.runs.folder import RunFolder
from proxstep.training import lifecycle
from proxstep.training.batch import Batch
from proxstep.training.regularizers import regularizer_loss
from proxstep.training.rollout import Completions
from proxstep.training.trainer import Trainer

VOCAB = 19
PROMPTS, RESPONSES = (2, 5, 3, 4), (4, 1, 6, 2)
COEFS = [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)]


def completions(seed: int = 0) -> Completions:
    """Four completions of unequal lengths, prompts padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width, longest = max(PROMPTS), max(RESPONSES)
    column = torch.arange(width + longest)
    prompt, response = torch.tensor(PROMPTS)[:, None], torch.tensor(RESPONSES)[:, None]
    answer = (column >= width) & (column < width + response)
    return Completions(
        torch.randint(VOCAB, (4, width + longest), generator=generator),
        answer | ((column < width) & (column >= width - prompt)),
        answer,
        torch.zeros(4, dtype=torch.bool),
    )


def batch(signal: tuple[float, ...] = (0.0,) * 4) -> Batch:
    group = torch.tensor([0, 0, 1, 1])
    index = torch.arange(len(group))
    return Batch(completions(), torch.tensor(signal, dtype=torch.float64), group, index, None)


def trainer(recipe: Recipe, model: nn.Module) -> Trainer:
    """A trainer whose policy has left the initial one."""
    nobody: Any = None
    made = Trainer(recipe, model, nobody, nobody, nobody, RunFolder(recipe.output_dir), Silent())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.05)
    return made


def accumulated(
    folder: Path,
    algorithm: str,
    coefs: tuple[float, float],
    signal: tuple[float, ...] = (0.0,) * 4,
    size: int | None = None,
    temperature: float = 1.0,
    estimator: str = "exact",
    head: str = "full",
) -> tuple[list[Tensor], dict[str, float], Trainer]:
    """Return the gradient of one optimizer step, in float64, and what the trainer measured."""
    recipe = tiny_recipe(
        folder,
        algorithm,
        model={"head": head},
        regularizer={
            "entropy_coef": coefs[0],
            "kl_coef": coefs[1],
            "kl_estimator": estimator,
        },
        evaluation={"kl_policy_initial": False},
        update={"microbatch_size": size},
        rollout={"temperature": temperature},
    )
    torch.manual_seed(0)
    made = trainer(recipe, tiny_qwen3())
    taken = made._accumulate(batch(signal), {}, measure_entropy=False)
    return gradients(made.model), taken, made


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    norm = torch.cat([x.flatten() for x in b]).norm()
    return (torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)]).norm() / norm).item()


def probabilities(model: nn.Module, row: int, temperature: float) -> Tensor:
    """A row's distributions over the vocabulary at its completion's tokens, without padding."""
    drawn = completions()
    token = drawn.token_BT[row][drawn.attention_BT[row]]
    logits = model(input_ids=token[None]).logits[0, PROMPTS[row] - 1 : -1] / temperature
    weight = logits.exp()
    return weight / weight.sum(-1, keepdim=True)


def by_hand(
    policy: nn.Module, initial: nn.Module, coefs: tuple[float, float], temperature: float
) -> tuple[list[Tensor], float, float]:
    """The gradient of the mean over all tokens, one row at a time; the mean entropy and KL."""
    policy, entropies, divergences = copy.deepcopy(policy), [], []
    for row in range(4):
        p = probabilities(policy, row, temperature)
        q = probabilities(initial, row, temperature).detach()
        assert len(p) == RESPONSES[row]
        entropies.append(-(p * p.log()).sum(-1))
        divergences.append((p * (p / q).log()).sum(-1))
    entropy, divergence = torch.cat(entropies).mean(), torch.cat(divergences).mean()
    policy.zero_grad()
    (-coefs[0] * entropy + coefs[1] * divergence).backward()
    return gradients(policy), float(entropy.detach()), float(divergence.detach())


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
@pytest.mark.parametrize(
    ("algorithm", "coefs", "size"),
    square(["reinforce", "isopo", "isopo-natural"], COEFS, [None, 1, 3]),
)
def test_the_gradient_is_the_one_written_by_hand(
    tmp_path: Path,
    algorithm: str,
    coefs: tuple[float, float],
    size: int | None,
    temperature: float,
) -> None:
    grads, taken, made = accumulated(tmp_path, algorithm, coefs, size=size, temperature=temperature)
    torch.manual_seed(0)
    expected, entropy, divergence = by_hand(made.model, tiny_qwen3(), coefs, temperature)
    assert distance(grads, expected) < 1e-10
    terms = {"entropy": entropy, "kl": divergence}
    for name, coef in zip(terms, coefs, strict=True):
        if coef:
            assert taken[f"regularizer/{name}"] == pytest.approx(terms[name], rel=1e-10)
        else:
            assert f"regularizer/{name}" not in taken
    loss = -coefs[0] * entropy + coefs[1] * divergence
    assert taken["regularizer/loss"] == pytest.approx(loss, rel=1e-10)
    assert taken["loss"] == 0.0


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "isopo", "isopo-natural", "isopo+opo"])
def test_it_is_added_to_the_gradient_of_the_objective(tmp_path: Path, algorithm: str) -> None:
    signal = (0.5, -1.0, 2.0, -1.5)
    both, taken, _ = accumulated(tmp_path, algorithm, (0.3, 0.7), signal)
    objective, plain, _ = accumulated(tmp_path, algorithm, (0.0, 0.0), signal)
    regularizer, _, _ = accumulated(tmp_path, "reinforce", (0.3, 0.7))
    total = [a + b for a, b in zip(objective, regularizer, strict=True)]
    assert distance(both, total) < 1e-10
    assert distance(both, objective) > 1e-2
    assert distance(both, regularizer) > 1e-2
    assert taken["loss"] == pytest.approx(plain["loss"], rel=1e-10)
    assert set(plain) == {"loss"}


def estimate_by_hand(
    policy: nn.Module, initial: nn.Module, coef: float, temperature: float, kind: str
) -> tuple[list[Tensor], float]:
    """The gradient of the mean estimate over all tokens, one row at a time; and that mean."""
    policy, estimates = copy.deepcopy(policy), []
    drawn = completions()
    for row in range(4):
        token = drawn.token_BT[row][drawn.response_BT[row]][:, None]
        p = probabilities(policy, row, temperature).gather(1, token)
        ratio = probabilities(initial, row, temperature).detach().gather(1, token) / p
        of = {"k1": -ratio.log(), "k2": ratio.log() ** 2 / 2, "k3": ratio - 1 - ratio.log()}
        estimates.append(of[kind])
    mean = torch.cat(estimates).mean()
    policy.zero_grad()
    (coef * mean).backward()
    return gradients(policy), float(mean.detach())


@pytest.mark.parametrize(
    ("kind", "size", "head"), square(["k1", "k2", "k3"], [None, 3], ["full", "chunked"])
)
@pytest.mark.parametrize("algorithm", ["isopo", *slow("reinforce", "isopo+opo")])
def test_the_gradient_of_an_estimate_is_the_one_written_by_hand(
    tmp_path: Path, algorithm: str, kind: str, size: int | None, head: str
) -> None:
    grads, taken, made = accumulated(
        tmp_path, algorithm, (0.0, 0.7), size=size, temperature=0.7, estimator=kind, head=head
    )
    torch.manual_seed(0)
    expected, mean = estimate_by_hand(made.model, tiny_qwen3(), 0.7, 0.7, kind)
    assert distance(grads, expected) < 1e-9
    assert taken["regularizer/kl"] == pytest.approx(mean, rel=1e-9)
    assert taken["regularizer/loss"] == pytest.approx(0.7 * mean, rel=1e-9)


def test_an_estimate_and_the_entropy_go_together(tmp_path: Path) -> None:
    both, taken, _ = accumulated(tmp_path, "reinforce", (0.3, 0.7), estimator="k3")
    bonus, _, _ = accumulated(tmp_path, "reinforce", (0.3, 0.0))
    penalty, _, _ = accumulated(tmp_path, "reinforce", (0.0, 0.7), estimator="k3")
    assert distance(both, [a + b for a, b in zip(bonus, penalty, strict=True)]) < 1e-10
    assert {"regularizer/entropy", "regularizer/kl"} <= set(taken)


def test_nothing_but_completions_counts() -> None:
    drawn = completions()
    generator = torch.Generator().manual_seed(2)
    entropy_BT, kl_BT = torch.randn(2, 4, 11, generator=generator, dtype=torch.float64)
    options = {"entropy_coef": 0.3, "kl_coef": 0.7, "num_tokens": sum(RESPONSES)}
    loss, _ = regularizer_loss(entropy_BT, kl_BT, drawn.response_BT, **options)
    elsewhere = kl_BT.masked_fill(~drawn.response_BT, float("nan"))
    assert regularizer_loss(entropy_BT, elsewhere, drawn.response_BT, **options)[0] == loss
    by_hand = (-0.3 * entropy_BT + 0.7 * kl_BT)[drawn.response_BT].sum() / sum(RESPONSES)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_terms_are_in_float32_or_better(dtype: torch.dtype) -> None:
    logits, initial = torch.randn(2, 2, 3, VOCAB).to(dtype)
    response = torch.ones(2, 3, dtype=torch.bool)
    options = {"entropy_coef": 1.0, "kl_coef": 1.0, "num_tokens": 6}

    def loss_of(logits: Tensor, initial: Tensor) -> Tensor:
        terms = entropy(logits), kl_divergence(logits, initial)
        return regularizer_loss(*terms, response, **options)[0]

    loss, exact = loss_of(logits, initial), loss_of(logits.double(), initial.double())
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_regularizer_of_nothing_is_refused() -> None:
    response = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs entropy_BT or kl_BT"):
        regularizer_loss(None, None, response, entropy_coef=0.0, kl_coef=1.0, num_tokens=2)


# In a run


def run(folder: Path, algorithm: str, **changes: Any) -> list[dict[str, Any]]:
    reward = folder.with_suffix(".py")
    reward.write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    recipe = tiny_recipe(
        folder,
        algorithm,
        steps=8,
        task={"rewards": [f"{reward}:spread"]},
        optimizer={"name": "sgd", "learning_rate": 0.05},
        evaluation={"every": 8},
        **changes,
    )
    lifecycle.train(recipe, Silent())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("algorithm", "lora", "estimator"),
    [
        ("reinforce", {"rank": 2}, "exact"),
        *slow(
            ("reinforce", None, "exact"),
            ("reinforce", None, "k2"),
            ("isopo", None, "exact"),
            ("isopo", {"rank": 2}, "exact"),
            ("isopo", {"rank": 2}, "k2"),
        ),
    ],
)
def test_a_large_penalty_keeps_the_policy_near_the_initial_one(
    tmp_path: Path, algorithm: str, lora: Any, estimator: str
) -> None:
    model = {"lora": lora}
    free = run(tmp_path / "free", algorithm, model=model)
    regularizer = {"kl_coef": 40.0, "kl_estimator": estimator}
    near = run(tmp_path / "near", algorithm, model=model, regularizer=regularizer)
    assert near[-1]["kl_policy_initial"] < 0.3 * free[-1]["kl_policy_initial"]
    assert near[1]["regularizer/kl"] == pytest.approx(0.0, abs=1e-6)
    assert near[-1]["regularizer/kl"] > 0


@pytest.mark.parametrize("algorithm", ["reinforce", *slow("isopo")])
def test_a_bonus_keeps_the_policy_open(tmp_path: Path, algorithm: str) -> None:
    free = run(tmp_path / "free", algorithm)
    bonus = run(tmp_path / "open", algorithm, regularizer={"entropy_coef": 20.0})
    assert bonus[-1]["entropy"] > free[-1]["entropy"] + 0.01
    for record in bonus[1:]:
        assert record["regularizer/entropy"] == pytest.approx(record["entropy"], rel=1e-4)
        expected = -20.0 * record["regularizer/entropy"]
        assert record["regularizer/loss"] == pytest.approx(expected, rel=1e-4)

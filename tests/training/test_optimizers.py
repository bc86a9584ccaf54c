"""The recipe's optimizer: which parameters go where, what reaches it, and what its steps are."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.engine import Silent, tiny_recipe
from tests.models import tiny_gpt2, tiny_qwen3
from torch import Tensor, nn

from proxstep.config.loading import resolve
from proxstep.config.optimizer import OPTIMIZER_OPTIONS
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import lifecycle
from proxstep.training.optimizers import (
    JointOptimizer,
    hidden_matrices,
    make_optimizer,
    make_schedule,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def recipe_with(**optimizer: Any) -> Recipe:
    return resolve({"algorithm": "grpo", "optimizer": optimizer}, {}, "test")


def adapted(*targets: str) -> nn.Module:
    config = LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads a property that transformers deprecates
        return get_peft_model(tiny_qwen3(tied=False), config)


MODELS = {
    "tied": tiny_qwen3,
    "untied": lambda: tiny_qwen3(tied=False),
    "gpt2": tiny_gpt2,
    "lora": lambda: adapted(*PROJECTIONS),
    "lora-everywhere": lambda: adapted("q_proj", "lm_head", "embed_tokens"),
    "biases": lambda: only(tiny_gpt2(), "bias"),
}


def only(model: nn.Module, ending: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(ending))
    return model


# In a run


@pytest.fixture
def reward(tmp_path: Path) -> str:
    """A reward that an untrained model's completions differ in."""
    path = tmp_path / "reward.py"
    path.write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    return f"{path}:spread"


@pytest.mark.parametrize(
    "algorithm",
    [
        "isopo",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("reinforce", "grpo", "isopo-natural")),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
def test_every_optimizer_trains_every_parameter(
    tmp_path: Path, reward: str, name: str, algorithm: str
) -> None:
    optimizer = {"name": name, "learning_rate": 1e-3}
    task = {"rewards": [reward]}
    recipe = tiny_recipe(tmp_path / "run", algorithm, steps=2, optimizer=optimizer, task=task)
    assert lifecycle.train(recipe, Silent()) == "finished"
    before = load_file(Path(lifecycle.model_source(recipe, print)) / "model.safetensors")
    after = load_file(latest_checkpoint(tmp_path / "run") / "model.safetensors")
    assert set(before) == set(after)
    for weight, start in before.items():
        assert after[weight].isfinite().all()
        assert not torch.equal(after[weight], start), weight


@pytest.mark.parametrize("name", ["soap", "kron"])
def test_a_library_that_is_missing_is_said_before_any_work(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda module, *rest: None if module == "pytorch_optimizer" else find_spec(module, *rest),
    )
    refused_before_any_work(
        tmp_path / "run",
        monkeypatch,
        name,
        f"optimizer.name {name} needs the package pytorch-optimizer: install proxstep[train]",
    )


def test_a_torch_without_muon_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    complaint = "optimizer.name muon needs torch 2.9 or newer, this is "
    refused_before_any_work(tmp_path / "run", monkeypatch, "muon", complaint)


def refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    def worked(*arguments: Any, **options: Any) -> None:
        pytest.fail("work began")

    for function in ("model_source", "load_tokenizer", "load_model"):
        monkeypatch.setattr(lifecycle, function, worked)
    with pytest.raises(ProxstepError) as caught:
        lifecycle.train(tiny_recipe(folder, optimizer={"name": name}), Silent())
    assert str(caught.value).startswith(complaint)
    assert not folder.exists()


# Which parameters go where


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(model: Any, name: str) -> None:
    policy = model()
    optimizer = make_optimizer(recipe_with(name=name).optimizer, policy)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in policy.parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_hidden_linear_layers(tied: bool) -> None:
    expected = {
        f"model.layers.{layer}.{'mlp' if name[:4] in ('gate', 'up_p', 'down') else 'self_attn'}."
        f"{name}.weight"
        for layer in range(2)
        for name in PROJECTIONS
    }
    assert set(hidden_matrices(tiny_qwen3(tied=tied))) == expected


def test_muon_takes_the_linear_layers_of_gpt2() -> None:
    expected = {
        f"transformer.h.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(hidden_matrices(tiny_gpt2())) == expected


def test_muon_takes_both_matrices_of_an_adapter() -> None:
    model = adapted(*PROJECTIONS)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * len(PROJECTIONS)
    assert set(hidden_matrices(model)) == trainable


def test_adapters_of_output_and_embedding_are_not_muons() -> None:
    matrices = hidden_matrices(adapted("q_proj", "lm_head", "embed_tokens"))
    assert len(matrices) == 4
    assert all(".q_proj.lora_" in name for name in matrices)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("tied", [torch.optim.AdamW, torch.optim.Muon]),
        ("lora", [torch.optim.Muon]),
        ("biases", [torch.optim.AdamW]),
    ],
)
def test_muon_leaves_out_a_part_that_would_be_empty(model: str, kinds: list[type]) -> None:
    optimizer = make_optimizer(recipe_with(name="muon").optimizer, MODELS[model]())
    assert isinstance(optimizer, JointOptimizer)
    assert [type(part) for part in optimizer.parts] == kinds


# What reaches it


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("adamw", {"betas": [0.8, 0.9], "eps": 1e-5}),
        ("sgd", {"momentum": 0.7}),
        ("soap", {"betas": [0.8, 0.9], "eps": 1e-5}),
        ("kron", {"momentum": 0.7}),
    ],
)
def test_a_recipes_options_reach_the_optimizer(name: str, own: dict[str, Any]) -> None:
    given = {"learning_rate": 1e-3, "weight_decay": 0.02, **own}
    optimizer = make_optimizer(recipe_with(name=name, **given).optimizer, tiny_qwen3())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.02)
    for key, value in own.items():
        assert (list(group[key]) if key == "betas" else group[key]) == value


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_OPTIONS if name != "muon"])
def test_null_is_the_optimizers_own_default(name: str) -> None:
    optimizer = make_optimizer(recipe_with(name=name).optimizer, tiny_qwen3())
    (group,) = optimizer.param_groups
    kind: Any = type(optimizer)
    plain = kind(nn.Linear(2, 2).parameters(), lr=1e-3)
    for key in OPTIMIZER_OPTIONS[name]:
        assert group[key] == plain.param_groups[0][key]
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("rate", [None, 2e-2])
def test_muons_options_reach_their_part(rate: float | None) -> None:
    given = {"betas": [0.8, 0.9], "eps": 1e-5, "momentum": 0.7, "weight_decay": 0.02}
    recipe = recipe_with(name="muon", learning_rate=1e-3, muon_learning_rate=rate, **given)
    optimizer = make_optimizer(recipe.optimizer, tiny_qwen3())
    adamw, muon = optimizer.param_groups
    assert (adamw["lr"], adamw["weight_decay"]) == (1e-3, 0.02)
    assert (list(adamw["betas"]), adamw["eps"]) == ([0.8, 0.9], 1e-5)
    assert (muon["lr"], muon["weight_decay"]) == (rate or 1e-3, 0.02)
    assert (muon["momentum"], muon["adjust_lr_fn"]) == (0.7, "match_rms_adamw")
    (plain,) = torch.optim.Muon([nn.Parameter(torch.ones(2, 2))]).param_groups
    assert muon["eps"] == plain["eps"]


def test_the_schedule_reaches_both_of_muons_parts_also_after_a_restart() -> None:
    recipe = recipe_with(name="muon", learning_rate=4e-3, muon_learning_rate=8e-3, warmup_updates=3)
    model = tiny_qwen3()
    optimizer = make_optimizer(recipe.optimizer, model)
    schedule = make_schedule(optimizer, recipe.optimizer, 100)
    state, when = optimizer.state_dict(), schedule.state_dict()
    for _ in range(2):
        rates = []
        for update in range(5):
            rates.append([group["lr"] for group in optimizer.param_groups])
            parts: Any = optimizer
            assert rates[-1] == [part.param_groups[0]["lr"] for part in parts.parts]
            give_gradients(model, update)
            optimizer.step()
            schedule.step()
        shares = [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates == [[pytest.approx(4e-3 * s), pytest.approx(8e-3 * s)] for s in shares]
        optimizer = make_optimizer(recipe.optimizer, model)
        schedule = make_schedule(optimizer, recipe.optimizer, 100)
        optimizer.load_state_dict(state)
        schedule.load_state_dict(when)


def rates_of(recipe: Recipe, num_updates: int) -> list[float]:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=recipe.optimizer.learning_rate)
    schedule = make_schedule(optimizer, recipe.optimizer, num_updates)
    rates = []
    for _ in range(num_updates):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules_are_transformers_and_end_at_the_floor(kind: str, floor: float) -> None:
    from transformers import get_scheduler

    recipe = recipe_with(learning_rate=2e-3, lr_scheduler_type=kind, min_lr_rate=floor)
    rates = rates_of(recipe, 20)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2e-3)
    name, options = kind, {}
    if kind == "cosine":
        name, options = "cosine_with_min_lr", {"min_lr_rate": floor}
    theirs = get_scheduler(name, optimizer, 0, 20, scheduler_specific_kwargs=options)
    for rate in rates:
        wanted = theirs.get_last_lr()[0]
        if kind == "linear":
            wanted = 2e-3 * floor + (1 - floor) * wanted
        assert rate == pytest.approx(wanted)
        optimizer.step()
        theirs.step()
    assert rates[-1] > 2e-3 * floor  # reached after the last step, at which nothing is left to do


def test_a_schedule_begins_after_the_warm_up() -> None:
    section = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "min_lr_rate": 0.5}
    rates = rates_of(recipe_with(**section, warmup_updates=3), 7)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625])
    with pytest.raises(ProxstepError, match=r"optimizer\.warmup_updates 100 is all of the"):
        recipe_with(**section, warmup_updates=100)
    with pytest.raises(ProxstepError, match=r"optimizer\.min_lr_rate is where"):
        recipe_with(min_lr_rate=0.5)


# What its steps are


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = drawn.to(parameter.dtype)


def steps(optimizers: list[Any], model: nn.Module, number: int) -> list[Tensor]:
    for step in range(number):
        give_gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    return [p.detach() for p in model.parameters()]


def test_muon_steps_as_its_two_parts_do_apart() -> None:
    recipe = recipe_with(name="muon", learning_rate=1e-3, muon_learning_rate=3e-3)
    torch.manual_seed(0)
    joint_model = tiny_qwen3()
    apart_model = tiny_qwen3()
    apart_model.load_state_dict(joint_model.state_dict())
    matrices = hidden_matrices(apart_model)
    others = [p for name, p in apart_model.named_parameters() if name not in matrices]
    apart = [
        torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0),
        torch.optim.Muon(
            list(matrices.values()), lr=3e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    joint = steps([make_optimizer(recipe.optimizer, joint_model)], joint_model, 3)
    for a, b in zip(joint, steps(apart, apart_model, 3), strict=True):
        assert torch.equal(a, b)


def test_a_step_of_muon_is_as_long_as_the_recipe_says() -> None:
    model = tiny_qwen3()
    before = {name: p.detach().clone() for name, p in hidden_matrices(model).items()}
    recipe = recipe_with(name="muon", learning_rate=1e-3, muon_learning_rate=1e-2)
    steps([make_optimizer(recipe.optimizer, model)], model, 1)
    for name, parameter in hidden_matrices(model).items():
        rms = (parameter.detach() - before[name]).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 * 1e-2, rel=0.3), name


class Matrix(nn.Linear):
    """A model of one hidden layer."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start.shape[1], start.shape[0], bias=False)
        self.weight = nn.Parameter(start.clone())

    def get_output_embeddings(self) -> None:
        return None


def matrix(name: str, start: Tensor, rate: float) -> tuple[Tensor, torch.optim.Optimizer]:
    model = Matrix(start)
    return model.weight, make_optimizer(recipe_with(name=name, learning_rate=rate).optimizer, model)


@pytest.mark.parametrize("seed", range(3))
def test_soaps_second_update_is_a_sign_in_the_firsts_eigenbasis(seed: int) -> None:
    """W moves by rate * L sign(L^T G2 R) R^T, with L and R the eigenvectors of G1 G1^T, G1^T G1."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 6, 6, generator=generator)
    weight, optimizer = matrix("soap", torch.zeros(6, 6), rate=0.5)
    weight.grad = first.clone()
    optimizer.step()
    assert torch.equal(weight, torch.zeros(6, 6))
    weight.grad = second.clone()
    optimizer.step()
    left, _, right = torch.linalg.svd(first.double())
    sign = (left.T @ second.double() @ right.T).sign()
    assert torch.allclose(weight.double(), -0.5 * left @ sign @ right, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
def test_a_quadratic_falls(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator)
    curvature = root @ root.T / 12 + 0.1 * torch.eye(12)
    rate = 0.5 if name == "muon" else 0.05  # its steps are shorter
    weight, optimizer = matrix(name, torch.randn(12, 7, generator=generator), rate)
    losses = []
    for _ in range(100):
        loss = (weight * (curvature @ weight)).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.1 * losses[0]


def test_kron_draws_from_torchs_generator_alone() -> None:
    weights = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(5)
        weight, optimizer = matrix("kron", torch.zeros(6, 4), rate=0.1)
        for step in range(200):
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)

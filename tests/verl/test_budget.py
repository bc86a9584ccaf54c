"""A KL budget inside verl: its worker's steps are judged by their own mini-batch, and scaled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed import Ranks
from tests.verl.verl_case import (
    Case,
    actor_config,
    join_group,
    made_engine,
    measured,
    saved_model,
    trained,
    whole,
)
from tests.verl.verl_data import Rollout, completions, quiet, rollout, verl_batch
from torch import Tensor, nn
from verl.workers.config import FSDPOptimizerConfig
from verl.workers.config.optimizer import build_optimizer

from proxstep.budget import CONTROLS, KlBudget
from proxstep.budget.prediction import sampled_kl
from proxstep.errors import ProxstepError
from proxstep.training.rollout import score

pytestmark = pytest.mark.verl

NATS, LARGE, SMALL = 0.02, 0.03, 1e-6
OPTIONS = {"global_batch_size": 8, "micro_batch_size_per_gpu": 2, "use_remove_padding": True}
SIGNAL = torch.linspace(-1, 1, 8)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def case_of(folder: Path, **actor: Any) -> Case:
    """A model, and an actor with a budget that all of its sequences judge."""
    saved_model(folder / "model")
    options = {"kl_budget": NATS, "kl_num_sequences": 8, **actor}
    return Case(str(folder / "model"), geometry=None, actor=options, optimizer={"lr": LARGE})


def steps(case: Case, data: Rollout, number: int, **options: Any) -> dict[str, Any]:
    """Some updates with this rank's part of the rows: each one's metrics, and the weights."""
    join_group()
    size = len(data.uids) // dist.get_world_size()
    rows = list(range(dist.get_rank() * size, (dist.get_rank() + 1) * size))
    engine, loss_function = made_engine(case)
    metrics = []
    for step in range(number):
        sign = 1 if step % 2 == 0 else -1
        batch = verl_batch(data.rows(rows), (sign * SIGNAL)[rows], **(OPTIONS | options))
        output, _ = trained(engine, loss_function, batch)
        metrics.append(budget_of(measured(output["metrics"])))
    weights = {name: whole(value) for name, value in engine.module.state_dict().items()}
    return {"metrics": metrics, "weights": weights}


def steps_on_rank(options: dict[str, Any], *args: Any) -> dict[str, Any]:
    return steps(*args, **options)


def budget_of(metrics: dict[str, float]) -> dict[str, float]:
    """A step's metrics of the budget."""
    start = "kl_budget_"
    return {k.removeprefix(start): v for k, v in metrics.items() if k.startswith(start)}


def log_probs(model: nn.Module, data: Rollout) -> tuple[Tensor, Tensor]:
    """Every response's log-probabilities by the local engine, and which tokens count."""
    done = completions(data)
    return score(model, done, 1.0).log_prob_BT, done.response_BT[:, 1:]


def differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max((left[name] - right[name]).abs().max().item() for name in left)


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_it_is_the_budget_of_a_plain_loop(tmp_path: Path, control: Any) -> None:
    """The same predictions, scales and weights as `KlBudget` by hand, on verl's gradients."""
    case, data = case_of(tmp_path, kl_control=control), rollout(0)
    model = saved_model(tmp_path / "local")
    optimizer_config = FSDPOptimizerConfig(lr=LARGE, clip_grad=1e9)
    optimizer = KlBudget(
        build_optimizer(model.parameters(), optimizer_config), model, NATS, control=control
    )
    engine, loss_function = made_engine(case)
    assert isinstance(engine.optimizer, KlBudget)
    for step in range(3):
        signal = SIGNAL if step % 2 == 0 else -SIGNAL
        output, gradients = trained(engine, loss_function, verl_batch(data, signal, **OPTIONS))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step(lambda: log_probs(model, data))
        found = budget_of(measured(output["metrics"]))
        assert found == pytest.approx(optimizer.measured, rel=1e-3)
        model.load_state_dict({k: whole(v) for k, v in engine.module.state_dict().items()})
    assert found["scale"] < 1 or control == "adaptive-learning-rate"


@pytest.mark.parametrize("control", ["predicted", "measured-backtracking"])
def test_a_large_rates_step_is_scaled_to_the_budget(tmp_path: Path, control: str) -> None:
    """What the policy really moved, by the local engine's scores before and after."""
    case, data = case_of(tmp_path, kl_control=control), rollout(1)
    model = saved_model(tmp_path / "local")
    moved = copy.deepcopy(model)
    found = steps(case, data, 1)
    moved.load_state_dict(found["weights"])
    with torch.no_grad():
        before_BT, response_BT = log_probs(model, data)
        kl = sampled_kl(before_BT, log_probs(moved, data)[0], response_BT).mean().item()
    (metrics,) = found["metrics"]
    assert metrics["scale"] < 0.5
    assert metrics["predicted"] > 4 * NATS
    if control == "predicted":
        assert kl == pytest.approx(NATS, rel=0.1)
    else:
        assert kl == pytest.approx(metrics["realized"], rel=1e-3)
        assert kl <= NATS


def test_a_small_rates_step_is_verls_own_to_the_bit(tmp_path: Path) -> None:
    case, data = case_of(tmp_path), rollout(2)
    case.optimizer = {"lr": SMALL}
    ours = steps(case, data, 2)
    plain = steps(replace(case, actor={}), data, 2)
    assert [metrics["scale"] for metrics in ours["metrics"]] == [1.0, 1.0]
    assert plain["metrics"] == [{}, {}]
    assert differ(ours["weights"], plain["weights"]) == 0.0


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_two_ranks_take_the_step_of_one(tmp_path: Path, ranks: Ranks, micro_batch: int) -> None:
    """Each scores its own sequences; the mean over both decides."""
    case, data = case_of(tmp_path), rollout(3)
    one = steps(case, data, 2)
    options = {"micro_batch_size_per_gpu": micro_batch}
    two = ranks.run(steps_on_rank, options, case, data, 2)
    assert two[0]["metrics"] == two[1]["metrics"]
    for left, right in zip(one["metrics"], two[0]["metrics"], strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    assert differ(one["weights"], two[0]["weights"]) < 1e-5


def test_padding_has_no_say(tmp_path: Path, ranks: Ranks) -> None:
    """verl fills batches with sequences without a token: here one rank has no others."""
    case, data = case_of(tmp_path), rollout(4)
    masks = [mask * int(row < 3) for row, mask in enumerate(data.masks)]
    padded = replace(data, masks=masks)
    found = ranks.run(steps_on_rank, {"global_batch_size": 3}, case, padded, 1)
    alone = steps(case, data.rows([0, 1, 2]), 1, global_batch_size=3, micro_batch_size_per_gpu=1)
    assert found[0]["metrics"][0] == pytest.approx(alone["metrics"][0], rel=1e-3)
    assert found[1]["metrics"] == found[0]["metrics"]


def test_with_a_geometry(tmp_path: Path) -> None:
    """ISOPO's gradient, the optimizer's step, the budget."""
    case, data = case_of(tmp_path), rollout(5)
    case.geometry = {"rule": "isopo"}
    (metrics,) = steps(case, data, 1)["metrics"]
    assert 0 < metrics["scale"] < 1
    case.actor = {}
    assert steps(case, data, 1)["metrics"] == [{}]


# -- a rollout -------------------------------------------------------------------------------------


def test_a_rollouts_updates_share_its_budget(tmp_path: Path) -> None:
    case, data = case_of(tmp_path, kl_num_updates=2), rollout(6)
    engine, loss_function = made_engine(case)
    for last in (False, True, False, True):
        batch = verl_batch(data, SIGNAL, **OPTIONS, update_lr_scheduler=last)
        output, _ = trained(engine, loss_function, batch)
        metrics = budget_of(measured(output["metrics"]))
        part = metrics["predicted"] * metrics["scale"] ** 2
        assert part == pytest.approx(NATS / 2, rel=1e-3)


@pytest.mark.parametrize(("said", "flags"), [(1, [False]), (2, [True]), (2, [False, False])])
def test_another_number_of_updates_is_refused(tmp_path: Path, said: int, flags: list[bool]) -> None:
    """Before the step that is one too many."""
    case, data = case_of(tmp_path, kl_num_updates=said), rollout(7)
    engine, loss_function = made_engine(case)

    def one(last: bool) -> None:
        batch = verl_batch(data, SIGNAL, **OPTIONS, update_lr_scheduler=last)
        trained(engine, loss_function, batch)

    for last in flags[:-1]:
        one(last)
    with pytest.raises(ProxstepError, match=rf"kl_num_updates is {said}, but a rollout gave"):
        one(flags[-1])


def resumed(case: Case, data: Rollout, folder: str) -> tuple[Any, ...]:
    """Three updates, and the third of them again from a checkpoint of two."""
    size = len(data.uids) // dist.get_world_size()
    rows = list(range(dist.get_rank() * size, (dist.get_rank() + 1) * size))

    def one(engine: Any, loss_function: Any, step: int) -> Any:
        batch = verl_batch(data.rows(rows), (SIGNAL + step)[rows], **OPTIONS)
        output, _ = trained(engine, loss_function, batch)
        weights = {name: whole(value) for name, value in engine.module.state_dict().items()}
        return budget_of(measured(output["metrics"])), weights

    first, loss_function = made_engine(case)
    one(first, loss_function, 0)
    one(first, loss_function, 1)
    with quiet():
        first.save_checkpoint(folder)
    second, loss_function = made_engine(case)
    with quiet():
        second.load_checkpoint(folder)
    return one(first, loss_function, 2), one(second, loss_function, 2)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, ranks: Ranks) -> None:
    """To the bit, with the parameters that "corrected" keeps from step to step."""
    case = case_of(tmp_path, kl_control="corrected")
    for first, second in ranks.run(resumed, case, rollout(8), str(tmp_path / "checkpoint")):
        assert "realized" in first[0]
        assert first[0] == second[0]
        assert differ(first[1], second[1]) == 0.0


# -- what cannot be done ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actor", "engine", "message"),
    [
        ({}, {"mixed_precision": None}, r"mixed_precision and kl_budget .*set '\+actor.*fp32"),
        ({}, {"mixed_precision": {"param_dtype": "bf16"}}, "mixed_precision and kl_budget"),
        ({}, {"model_dtype": "bf16"}, "model_dtype and kl_budget .*set it to fp32"),
        ({"use_fused_kernels": True}, {}, "use_fused_kernels and kl_budget"),
        ({"ulysses_sequence_parallel_size": 2}, {}, "ulysses_sequence_parallel_size and kl_budget"),
        ({"strategy": "megatron"}, {}, "strategy is 'megatron'.*set actor.*strategy=kl_budget"),
        ({"strategy": "fsdp"}, {}, "strategy is 'fsdp'.*set actor.*strategy=kl_budget"),
        ({"kl_budget": None, "kl_num_sequences": None}, {}, "needs actor_rollout_ref.actor.kl_b"),
        ({"kl_budget": -1.0}, {}, "actor.kl_budget is -1.0"),
        ({"kl_control": "best"}, {}, "actor.kl_control is 'best'"),
        ({"kl_num_updates": 0}, {}, "actor.kl_num_updates is 0"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, actor: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    options = {"kl_budget": NATS, "kl_num_sequences": 8, **actor}
    case = Case(str(tmp_path), geometry=None, actor=options, engine=engine)
    with pytest.raises(ProxstepError, match=message) as caught:
        actor_config(case)
    assert "\n" not in str(caught.value)


def test_a_key_without_a_budget() -> None:
    case = Case("", actor={"kl_control": "corrected"})
    with pytest.raises(ProxstepError, match=r"actor.kl_control is of actor.*kl_budget"):
        actor_config(case)


def test_the_command_says_how_many_updates_a_rollout_gives() -> None:
    actor = actor_config(Case("", geometry=None, actor={"kl_budget": NATS}))
    actor.ppo_mini_batch_size = 8
    with pytest.raises(ProxstepError, match=r"gives 4 optimizer steps.*kl_num_updates=4"):
        actor.validate(1, 32)
    actor.validate(1, 8)


def test_a_plain_configuration(tmp_path: Path) -> None:
    """`strategy=kl_budget` alone: verl hands our engine its own configuration class."""
    saved_model(tmp_path / "model")
    with pytest.raises(ProxstepError, match=r"_target_=proxstep\.engines\.verl\.BudgetActorConfig"):
        made_engine(Case(str(tmp_path / "model"), geometry=None), strategy="kl_budget")

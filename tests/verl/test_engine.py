"""ISOPO's engine inside verl: steps, checkpoints, metrics, passes that are not training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed import Ranks
from tests.verl.cpu_settings import cpu_environment
from tests.verl.verl_case import Case, made_engine, saved_model, step_on_rank, trained, whole
from tests.verl.verl_data import Rollout, quiet, rollout, verl_batch
from torch import Tensor
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import FSDPEngineWithLMHead

from proxstep.engines.verl.engine import STATE_FILE, IsopoEngine
from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import SITE

pytestmark = pytest.mark.verl

OPTIONS = {"global_batch_size": 8, "micro_batch_size_per_gpu": 2, "use_remove_padding": True}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    saved_model(tmp_path / "model")
    return Case(str(tmp_path / "model"), geometry={"rule": "isopo"})


def state_of(engine: Any) -> dict[str, Any]:
    """Everything that the next step depends on."""
    return {
        "model": {name: whole(value) for name, value in engine.module.state_dict().items()},
        "isopo": engine.isopo.state_dict(),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def resumed(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Three steps, and the third of them again from a checkpoint of two."""
    data, signal = rollout(0), torch.linspace(-1, 1, 8)
    size = 8 // dist.get_world_size()
    rows = list(range(dist.get_rank() * size, (dist.get_rank() + 1) * size))

    def one(engine: Any, loss_function: Any, step: int) -> None:
        batch = verl_batch(data.rows(rows), (signal + step)[rows], **OPTIONS)
        trained(engine, loss_function, batch)

    first, loss_function = made_engine(case)
    one(first, loss_function, 0)
    one(first, loss_function, 1)
    with quiet():
        first.save_checkpoint(folder)
    one(first, loss_function, 2)
    second, loss_function = made_engine(case)
    with quiet():
        second.load_checkpoint(folder)
    same = equal(second.isopo.state_dict()["step"], 2)
    one(second, loss_function, 2)
    return state_of(first), state_of(second), same


@pytest.mark.parametrize(
    "geometry",
    [
        {"rule": "isopo", "overlap_source": "microbatch", "num_overlap_positions": 5},
        {"rule": "isopo", "overlap_source": "previous_step", "num_overlap_positions": 5},
        {"rule": "isopo-natural"},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, ranks: Ranks, case: Case, geometry: dict[str, Any]
) -> None:
    """To the bit: weights, trailing means, carried samples."""
    case.geometry = geometry
    for first, second, same in ranks.run(resumed, case, str(tmp_path / "checkpoint")):
        assert same
        assert equal(first, second)
        assert first["isopo"]["trailing"]
    assert [path.name for path in (tmp_path / "checkpoint").glob("proxstep*")] == [STATE_FILE]


def test_a_checkpoint_without_our_state(
    tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """As another engine wrote it: said, and continued."""
    engine, _ = made_engine(case)
    with quiet():
        engine.save_checkpoint(str(tmp_path / "checkpoint"))
        (tmp_path / "checkpoint" / STATE_FILE).unlink()
        engine.load_checkpoint(str(tmp_path / "checkpoint"))
    assert f"{STATE_FILE} is not in" in caplog.text


def test_metrics_and_the_loss_are_the_objectives(case: Case) -> None:
    """verl's names; the loss is that of verl's own engine, not the sum that is differentiated."""
    data, signal = rollout(1), torch.randn(8)
    case.actor = {"use_kl_loss": True, "kl_loss_coef": 0.2, "entropy_coeff": 0.1}
    options = {**OPTIONS, "calculate_entropy": True}
    ours = step_on_rank(case, data, signal, options)
    plain = step_on_rank(replace(case, geometry=None), data, signal, options)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    added = {"geometry_weight_spread", "geometry_frac_filled_fisher"}
    assert set(ours["metrics"]) == set(plain["metrics"]) | added
    for name, value in plain["metrics"].items():
        if name != "grad_norm":
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert ours["metrics"]["geometry_weight_spread"] > 0


def test_inference_is_verls_own(case: Case) -> None:
    """Bit for bit, also with a training step before."""
    data, signal = rollout(2), torch.randn(8)

    def log_probs(engine: Any) -> Tensor:
        with quiet(), engine.eval_mode():
            output = engine.infer_batch(verl_batch(data, signal, **OPTIONS))
        return output["model_output"]["log_probs"].values()

    ours, loss_function = made_engine(case)
    plain, _ = made_engine(replace(case, geometry=None))
    assert torch.equal(log_probs(ours), log_probs(plain))
    trained(ours, loss_function, verl_batch(data, signal, **OPTIONS))
    assert not torch.equal(log_probs(ours), log_probs(plain))
    plain.module.load_state_dict(ours.module.state_dict())
    assert torch.equal(log_probs(ours), log_probs(plain))


def test_a_reference_policy_is_an_ordinary_engine(case: Case) -> None:
    """verl gives the reference the actor's strategy; its configuration is verl's."""
    engine, _ = made_engine(replace(case, geometry=None), strategy="isopo", forward_only=True)
    assert type(engine) is IsopoEngine
    assert engine.isopo is None
    assert not any(hasattr(module, SITE) for module in engine.module.modules())
    with quiet(), engine.eval_mode():
        output = engine.infer_batch(verl_batch(rollout(3), torch.zeros(8), **OPTIONS))
    assert output["model_output"]["log_probs"].values().isfinite().all()


def test_the_engine_is_verls_subclass() -> None:
    found = EngineRegistry._engines["language_model"]["isopo"]
    assert set(found) == {"cuda", "npu"}
    assert set(found.values()) == {IsopoEngine}
    assert issubclass(IsopoEngine, FSDPEngineWithLMHead)


def error_in_half(case: Case, data: Rollout, signal: Tensor) -> float:
    """The relative difference that bfloat16 makes to the whole gradient."""
    precision = {"mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "fp32"}}
    wide, half = (
        step_on_rank(replace(case, engine=engine), data, signal, OPTIONS)["gradients"]
        for engine in ({}, precision)
    )
    assert any(not torch.equal(half[name], value) for name, value in wide.items())
    square = sum(float((half[name] - value).square().sum()) for name, value in wide.items())
    return (square / sum(float(value.square().sum()) for value in wide.values())) ** 0.5


def test_gradients_in_bfloat16(case: Case) -> None:
    """verl's default precision, parameters cast by FSDP under autocast: no worse than plain."""
    data, signal = rollout(4), torch.randn(8)
    plain = error_in_half(replace(case, geometry=None), data, signal)
    assert 1e-3 < plain < 0.2
    assert error_in_half(case, data, signal) <= 3 * plain


@pytest.mark.parametrize(
    "engine", [{"param_offload": True, "optimizer_offload": True}, {"offload_policy": True}]
)
def test_offloading(case: Case, engine: dict[str, Any]) -> None:
    """Between phases, and of FSDP2 within them; two steps, the second damped by the first."""
    data, signal = rollout(9), torch.randn(8)

    def weights(case: Case) -> dict[str, Tensor]:
        made, loss_function = made_engine(case)
        for _ in range(2):
            trained(made, loss_function, verl_batch(data, signal, **OPTIONS))
        return {name: whole(value) for name, value in made.module.state_dict().items()}

    assert equal(weights(case), weights(replace(case, engine=engine)))


def without_uids(case: Case, data: Rollout) -> str:
    """The message of a mini-batch that lost its prompts."""
    engine, loss_function = made_engine(case)
    batch = verl_batch(data, torch.randn(len(data.uids)), **OPTIONS)
    del batch["uid"]
    try:
        trained(engine, loss_function, batch)
    except ProxstepError as error:
        return str(error)
    return ""


def test_groups_need_prompts(case: Case) -> None:
    case.geometry = {"rule": "isopo-natural", "interact": "group"}
    assert "geometry.interact=group needs the batch's uid" in without_uids(case, rollout(5))
    case.geometry = {"rule": "isopo-natural"}
    assert without_uids(case, rollout(5)) == ""


def test_an_advantage_for_every_token_is_refused(case: Case) -> None:
    data = rollout(6)
    engine, loss_function = made_engine(case)
    batch = verl_batch(data, torch.randn(8), **OPTIONS)
    values = batch["advantages"].values()
    batch["advantages"] = torch.nested.nested_tensor_from_jagged(
        torch.randn_like(values), batch["advantages"].offsets()
    )
    with pytest.raises(ProxstepError, match="differs between the tokens of a response"):
        trained(engine, loss_function, batch)


def padding_on_one_rank(case: Case, data: Rollout) -> str:
    """What a rank says whose partner's first micro-batch has no response token."""
    try:
        step_on_rank(case, data, torch.randn(8), OPTIONS)
    except ProxstepError as error:
        return str(error)
    return ""


def test_ranks_that_share_samples_need_tokens(ranks: Ranks, case: Case) -> None:
    """An error on both ranks, not a rank that waits for the other."""
    case.geometry = {"rule": "isopo", "overlap_source": "ranks"}
    data = rollout(7)
    masks = [mask.clone() for mask in data.masks]
    for mask in masks[:2]:
        mask.zero_()
    assert ranks.run(padding_on_one_rank, case, data) == ["", ""]
    messages = ranks.run(padding_on_one_rank, case, replace(data, masks=masks))
    assert all("overlap_source=ranks" in message for message in messages)


def test_another_loss_function_is_refused(case: Case) -> None:
    def distillation_ppo_loss() -> None: ...

    engine, _ = made_engine(case)
    batch = verl_batch(rollout(8), torch.randn(8), **OPTIONS)
    with pytest.raises(ProxstepError, match=r"distillation_ppo_loss \(distillation"):
        trained(engine, distillation_ppo_loss, batch)


def test_it_loads_before_verl_is_whole(tmp_path: Path) -> None:
    """`VERL_USE_EXTERNAL_MODULES` imports us while verl is being imported."""
    code = (
        "import verl, sys; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get;"
        "print(get('chi2_opo').__module__)"
    )
    modules = "tests.verl.cpu,proxstep.engines.verl"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **cpu_environment(), "VERL_USE_EXTERNAL_MODULES": modules},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert "proxstep.engines.verl.policy_loss" in done.stdout, done.stderr[-2000:]

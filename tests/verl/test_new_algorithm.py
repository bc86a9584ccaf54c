"""An algorithm that this file alone declares: verl computes it, or refuses it by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import tiny_recipe
from tests.verl.verl_case import Case, actor_config, local_gradients, saved_model, step_on_rank
from tests.verl.verl_data import algorithm_section, estimated, rollout
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    get_adv_estimator_fn,
    get_policy_loss_fn,
)

import proxstep.engines.verl
from proxstep.algorithms import (
    ALGORITHMS,
    SEQ_MEAN_TOKEN_SUM,
    Algorithm,
    Key,
    Signal,
    SignalInputs,
    register,
    reinforce,
)
from proxstep.engines.verl.estimator import numbered
from proxstep.errors import ProxstepError
from proxstep.training.objective import Objective

pytestmark = pytest.mark.verl


def loss(log_probs: Any, old: Any, signal: Any, mask: Any, *, power: float = 2.0,
         aggregation: Any = SEQ_MEAN_TOKEN_SUM) -> Any:  # fmt: skip
    """REINFORCE with a power of the signal."""
    bent = signal.sign() * signal.abs() ** power
    return reinforce(log_probs, old, bent, mask, aggregation=aggregation)


def prepare(inputs: SignalInputs, *, shift: float = 0.25) -> Signal:
    return Signal(inputs.advantage_B + shift)


KEYS = {"power": Key("Of the signal.", gt=0), "shift": Key("Of the advantages.")}
BENT = Algorithm("bent-up", loss, level="sequence", about="For tests.", keys=KEYS, prepare=prepare)


@pytest.fixture
def declare() -> Iterator[Callable[..., Algorithm]]:
    """Declare an algorithm for the length of a test."""
    registries: tuple[dict[Any, Any], ...] = (
        ALGORITHMS,
        POLICY_LOSS_REGISTRY,
        ADV_ESTIMATOR_REGISTRY,
    )
    before = [dict(registry) for registry in registries]

    def declared(**changes: Any) -> Algorithm:
        made = register(replace(BENT, **changes))
        proxstep.engines.verl.register()
        return made

    yield declared
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.parametrize("geometry", [None, {"rule": "isopo", "num_overlap_positions": None}])
def test_verl_computes_it(
    tmp_path: Path, declare: Callable[..., Algorithm], geometry: dict[str, Any] | None
) -> None:
    """Its keys, its preparation, its loss and its composition with ISOPO, from the declaration."""
    declare()
    keys = {"power": 1.5, "shift": 0.5, "advantage": "batch-normalized"}
    data = rollout(0)
    kind = proxstep.engines.verl.BentUpPolicyLossConfig
    assert kind().power == 2.0
    assert kind.__doc__ == BENT.about
    name = "bent-up" if geometry is None else "isopo+bent-up"
    more = {"geometry": {"num_overlap_positions": None}} if geometry else {}
    recipe = tiny_recipe(tmp_path, name, objective=keys, seed=42, **more)
    local, groups = Objective(recipe), numbered(data.uids)
    signal = local.signal(local.advantages(data.rewards, groups)[0], groups, None)
    found = estimated(data, "bent-up", keys)
    torch.testing.assert_close(found, signal.value_B)

    model = saved_model(tmp_path / "model")
    policy_loss = {"loss_mode": "proxstep_bent-up", **keys}
    case = Case(str(tmp_path / "model"), geometry, policy_loss, micro_batch=4)
    options = {"global_batch_size": 8, "micro_batch_size_per_gpu": 4, "use_remove_padding": True}
    result = step_on_rank(case, data, found, options)
    parts = [[0, 1, 2, 3], [4, 5, 6, 7]]
    expected = local_gradients(model, recipe, data, signal.value_B, parts)
    for parameter, gradient in expected.items():
        error = (result["gradients"][parameter] - gradient).norm() / gradient.norm()
        assert error <= 1e-5
    assert "actor/objective_ratio" in result["metrics"]


def reads(inputs: SignalInputs, *, shift: float = 0.25) -> Signal:
    assert inputs.old_policy is not None
    return Signal(inputs.advantage_B + inputs.old_policy.log_prob_BT.sum(dim=1))


def sets_power(inputs: SignalInputs, *, shift: float = 0.25) -> Signal:
    return Signal(inputs.advantage_B, hyper={"power": inputs.advantage_B.max().item()})


def weighs(inputs: SignalInputs, *, shift: float = 0.25) -> Signal:
    return Signal(inputs.advantage_B, importance_B=torch.ones_like(inputs.advantage_B))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prepare": reads, "reads_old_policy": lambda options: True},
            "loss_mode=proxstep_bent-up is not for verl: .* reads the old policy.*local engine",
        ),
        (
            {"prepare": reads, "reads_old_policy": lambda options: options["shift"] > 1},
            "policy_loss.shift is 2.0: .* reads the old policy.*use 0.25",
        ),
        ({"prepare": sets_power}, r"loss_mode=.* follows from the rollout.*\(power\)"),
        ({"prepare": weighs}, "loss_mode=.* weighs the sequences.*local engine"),
    ],
)
def test_what_the_seams_do_not_carry_is_refused(
    declare: Callable[..., Algorithm], changes: dict[str, Any], message: str
) -> None:
    declare(**changes)
    with pytest.raises(ProxstepError, match=message) as caught:
        proxstep.engines.verl.BentUpPolicyLossConfig(shift=2.0)
    assert "\n" not in str(caught.value)


def test_what_only_a_rollout_shows_is_refused_at_its_first_step(
    declare: Callable[..., Algorithm],
) -> None:
    def sets_power_later(inputs: SignalInputs, *, shift: float = 0.25) -> Signal:
        return Signal(inputs.advantage_B, hyper={"power": float(max(2, len(inputs.advantage_B)))})

    declare(prepare=sets_power_later, loss=partial(loss, power=4.0))
    with pytest.raises(ProxstepError, match=r"policy_loss\.loss_mode: .*\(power\)"):
        estimated(rollout(0), "bent-up", {})


def test_ratios_to_the_sampler_need_its_log_probabilities(
    declare: Callable[..., Algorithm],
) -> None:
    """verl computes the old policy's anew unless it is told to keep those of the rollout."""
    declare(ratio_to_sampler=True)
    section = algorithm_section("bent-up")
    tensors = {"token_level_rewards": torch.rand(2, 3), "response_mask": torch.ones(2, 3)}
    estimate = get_adv_estimator_fn("proxstep_bent-up")
    estimate(**tensors, config=section, index=["a", "a"])
    section.rollout_correction.bypass_mode = False
    with pytest.raises(ProxstepError, match=r"set algorithm\.rollout_correction\.bypass_mode=True"):
        estimate(**tensors, config=section, index=["a", "a"])


def test_a_key_of_verls_own_is_refused(declare: Callable[..., Algorithm]) -> None:
    """verl's configuration would hand it another default."""

    def taken(*tensors: Any, dro_beta: float = 1.0, aggregation: Any = SEQ_MEAN_TOKEN_SUM) -> Any:
        return reinforce(*tensors, aggregation=aggregation)

    declare(loss=taken, prepare=None, keys={"dro_beta": Key("Taken.")})
    with pytest.raises(ProxstepError, match="bent-up: dro_beta is a field of verl's"):
        _ = proxstep.engines.verl.BentUpPolicyLossConfig


def test_a_key_where_verls_losses_have_it_is_refused() -> None:
    """actor.clip_ratio_high is of verl's own losses: ours would leave it unread."""
    mode = "proxstep_grpo"
    config = actor_config(
        Case("", None, policy_loss={"loss_mode": mode}, actor={"clip_ratio_high": 0.28})
    )
    tensors = dict.fromkeys(("old_log_prob", "log_prob", "advantages"), torch.zeros(2, 3))
    with pytest.raises(ProxstepError, match=r"set .*policy_loss\.clip_ratio_high instead"):
        get_policy_loss_fn(mode)(
            **tensors, response_mask=torch.ones(2, 3), loss_agg_mode="token-mean", config=config
        )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_isopo_takes_what_is_declared_for_sequences(
    declare: Callable[..., Algorithm], level: Any
) -> None:
    declare(level=level)
    case = Case("", {"rule": "isopo"}, {"loss_mode": "proxstep_bent-up"})
    if level == "sequence":
        assert actor_config(case).policy_loss.shift == 0.25
        return
    with pytest.raises(ProxstepError, match="loss_mode is 'proxstep_bent-up'; ISOPO needs one"):
        actor_config(case)

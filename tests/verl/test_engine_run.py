"""verl's main program with OPO and ISOPO: two ranks under Ray, loaded by `external_lib` alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.verl.cpu_run import Run, prepared

from proxstep.engines.verl.engine import STATE_FILE

pytestmark = [pytest.mark.verl, pytest.mark.slow]

ACTOR = "actor_rollout_ref.actor."
OVERRIDES = [
    "actor_rollout_ref.model.external_lib=proxstep.engines.verl",
    "algorithm.adv_estimator=chi2_opo",
    f"{ACTOR}policy_loss._target_=proxstep.engines.verl.OpoPolicyLossConfig",
    f"{ACTOR}policy_loss.loss_mode=chi2_opo",
    f"{ACTOR}loss_agg_mode=seq-mean-token-mean",
    f"{ACTOR}strategy=isopo",
    f"{ACTOR}_target_=proxstep.engines.verl.IsopoActorConfig",
    f"+{ACTOR}geometry.rule=isopo-natural",
    f"+{ACTOR}geometry.interact=group",  # needs the prompts' ids in the workers
    f"{ACTOR}ppo_mini_batch_size=4",
    f"+{ACTOR}kl_budget=1e-4",
    f"+{ACTOR}kl_num_updates=2",
    f"{ACTOR}use_kl_loss=true",  # needs a reference policy, which has the actor's strategy
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
]


def test_a_run(tmp_path: Path) -> None:
    """Two steps of two updates each, and ISOPO's state beside the optimizer's."""
    run = Run(prepared(tmp_path), OVERRIDES)
    run.start()
    steps = run.finish(500)
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["actor/geometry_ntk_off_diagonal"] > 0
        assert metrics["actor/objective_chi_square"] > 0  # of the second update
        assert metrics["actor/kl_coef"] > 0
        assert 0 < metrics["actor/kl_budget_scale"] < 1
    state = torch.load(
        tmp_path / "checkpoints" / "global_step_2" / "actor" / STATE_FILE, weights_only=True
    )
    assert state["step"] == 4
    assert run.none_left(120)

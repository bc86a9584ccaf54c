"""OPO's drive as verl's advantage estimator, against the core on each prompt's responses alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from tests.verl.verl_data import algorithm_section, quiet
from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from proxstep.algorithms import ADVANTAGES, OPO, SignalInputs
from proxstep.engines.verl import OpoPolicyLossConfig
from proxstep.errors import ProxstepError

pytestmark = pytest.mark.verl


def batch(seed: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Rewards per token, masks, and uids in shuffled order."""
    torch.manual_seed(seed)
    count = sum(sizes)
    labels = [f"uid{group}" for group, size in enumerate(sizes) for _ in range(size)]
    labels = [labels[i] for i in torch.randperm(count)]
    mask_BT = (torch.arange(5) < torch.randint(1, 6, (count, 1))).long()
    reward_BT = torch.randn(count, 5, dtype=torch.float64) * mask_BT
    return reward_BT, mask_BT, np.array(labels, dtype=object)


def estimated(
    reward_BT: Tensor, mask_BT: Tensor, uids: np.ndarray, **keys: Any
) -> tuple[Tensor, Tensor]:
    estimate = get_adv_estimator_fn("chi2_opo")
    return estimate(
        token_level_rewards=reward_BT,
        response_mask=mask_BT,
        config=algorithm_section(**keys),
        index=uids,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"alpha": 0.1, "tau": 0.5},
        {"drive": "zscore"},
        {"drive": "none", "advantage": "group-centered"},
        {"target_min": -0.1, "mu": 2.0},
        {"advantage": "leave-one-out"},
    ],
)
def test_each_prompt_alone(keys: dict[str, Any], seed: int) -> None:
    """Uneven, shuffled groups: each prompt's drive is that of a batch of its own."""
    reward_BT, mask_BT, uids = batch(seed, (2, 5, 3, 4))
    found_BT, returns_BT = estimated(reward_BT, mask_BT, uids, **keys)
    assert torch.equal(found_BT, returns_BT)
    assert found_BT[~mask_BT.bool()].abs().max() == 0
    section = OpoPolicyLossConfig(**keys).section()
    for uid in set(uids):
        own = torch.tensor(uids == uid)
        group_B = torch.zeros(int(own.sum()), dtype=torch.long)
        advantage_B, _ = ADVANTAGES[section.advantage](reward_BT[own].sum(dim=1), group_B)
        drive_B = OPO.signal(SignalInputs(advantage_B, group_B), section.options()).value_B
        torch.testing.assert_close(found_BT[own][:, 0], drive_B, rtol=1e-12, atol=1e-12)


def test_the_order_does_not_matter() -> None:
    reward_BT, mask_BT, uids = batch(4, (3, 4, 2))
    order = torch.randperm(9)
    found_BT, _ = estimated(reward_BT, mask_BT, uids, normalize="batch")
    shuffled_BT, _ = estimated(
        reward_BT[order], mask_BT[order], uids[order.numpy()], normalize="batch"
    )
    torch.testing.assert_close(shuffled_BT, found_BT[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [{}, {"normalize": "batch"}])
def test_padding_and_lone_responses_count_nowhere(keys: dict[str, Any]) -> None:
    """verl pads a batch with masked rows of a prompt of their own; a session may fail."""
    reward_BT, mask_BT, uids = batch(5, (4, 3))
    expected_BT, _ = estimated(reward_BT, mask_BT, uids, **keys)
    more_BT = torch.cat([reward_BT, torch.zeros(3, 5), torch.full((1, 5), 7.0)])
    masks_BT = torch.cat([mask_BT, torch.zeros(3, 5).long(), torch.ones(1, 5).long()])
    labels = np.concatenate([uids, np.array(["pad0", "pad0", "pad0", "alone"], dtype=object)])
    found_BT, _ = estimated(more_BT, masks_BT, labels, **keys)
    assert torch.equal(found_BT[:7], expected_BT)
    assert found_BT[7:].abs().max() == 0


def test_a_rejected_response_counts_in_its_group() -> None:
    """verl masks what it rejects; as in its own estimators, the reward still compares."""
    reward_BT, mask_BT, uids = batch(6, (4, 4))
    expected_BT, _ = estimated(reward_BT, mask_BT, uids)
    rejected_BT = mask_BT.clone()
    rejected_BT[2] = 0
    found_BT, _ = estimated(reward_BT, rejected_BT, uids)
    others = torch.arange(8) != 2
    assert torch.equal(found_BT[others], expected_BT[others])
    assert found_BT[2].abs().max() == 0


def test_through_verls_driver() -> None:
    """As `compute_advantage` of both of verl's trainers calls it."""
    with quiet():  # Ray's, of its own modules
        compute_advantage = import_module("verl.trainer.ppo.ray_trainer").compute_advantage
    reward_BT, mask_BT, uids = batch(7, (3, 3))
    data = DataProto.from_dict(
        {"token_level_rewards": reward_BT, "response_mask": mask_BT}, {"uid": uids}
    )
    done = compute_advantage(data, "chi2_opo", num_repeat=3, config=algorithm_section(alpha=0.2))
    expected_BT, _ = estimated(reward_BT, mask_BT, uids, alpha=0.2)
    assert torch.equal(done.batch["advantages"], expected_BT)


def test_without_prompts_or_keys() -> None:
    reward_BT, mask_BT, uids = batch(8, (2, 2))
    estimate = get_adv_estimator_fn("chi2_opo")
    tensors = {"token_level_rewards": reward_BT, "response_mask": mask_BT}
    with pytest.raises(ProxstepError, match="needs the batch's uid"):
        estimate(**tensors, config=algorithm_section())
    with pytest.raises(ProxstepError, match="hand it verl's whole configuration"):
        estimate(**tensors, config=None, index=uids)
    plain = algorithm_section(_target_="verl.workers.config.PolicyLossConfig")
    with pytest.raises(ProxstepError, match=r"policy_loss\._target_"):
        estimate(**tensors, config=plain, index=uids)
    with pytest.raises(ProxstepError, match="groups have only one"):
        estimated(reward_BT, mask_BT, np.arange(4))

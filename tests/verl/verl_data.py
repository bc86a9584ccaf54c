"""Mini-batches for verl's engine and for the local one: a few responses of several prompts."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_module("tests.verl.cpu")  # before verl chooses its platform
    from omegaconf import OmegaConf
    from tensordict import NonTensorData, NonTensorStack, TensorDict
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.utils import tensordict_utils as tu

from proxstep.algorithms import ALGORITHMS
from proxstep.engines.verl import register
from proxstep.engines.verl.seams import config_name, loss_mode
from proxstep.training.rollout import Completions

VOCAB = 19

register()


@contextmanager
def quiet() -> Any:
    """Without the warnings that verl and transformers give of their own defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Rollout:
    """Responses of several prompts: tokens, what was measured of them, and their prompts."""

    prompts: list[Tensor]
    responses: list[Tensor]
    masks: list[Tensor]
    old_log_probs: list[Tensor]
    ref_log_prob: list[Tensor]
    rewards: Tensor
    uids: list[str]
    weights: Tensor | None = None

    def rows(self, index: list[int]) -> Rollout:
        """The responses at these places."""
        lists = {
            name: [getattr(self, name)[i] for i in index]
            for name in ("prompts", "responses", "masks", "old_log_probs", "ref_log_prob", "uids")
        }
        weights = None if self.weights is None else self.weights[index]
        return replace(self, **lists, rewards=self.rewards[index], weights=weights)


def rollout(seed: int, sizes: tuple[int, ...] = (3, 2, 3)) -> Rollout:
    """Shuffled groups of these sizes; responses of 1 to 5 tokens; old log-probabilities near."""
    torch.manual_seed(seed)
    prompts, responses, uids = [], [], []
    for group, size in enumerate(sizes):
        prompt = torch.randint(0, VOCAB, (2 + group % 3,))
        for _ in range(size):
            prompts.append(prompt)
            responses.append(torch.randint(0, VOCAB, (int(torch.randint(1, 6, ())),)))
            uids.append(f"prompt{group}")
    made = Rollout(
        prompts,
        responses,
        [torch.ones_like(response) for response in responses],
        [-3 + 0.3 * torch.randn(len(response)) for response in responses],
        [-3 + 0.5 * torch.randn(len(response)) for response in responses],
        torch.randint(0, 4, (len(responses),)).float() + torch.rand(len(responses)),
        uids,
    )
    return made.rows(torch.randperm(len(responses)).tolist())


def nested(values: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


def verl_batch(data: Rollout, advantages: Tensor, **options: Any) -> TensorDict:
    """What verl's worker gets of a mini-batch; the options are those of its trainer."""
    whole = [torch.cat(pair) for pair in zip(data.prompts, data.responses, strict=True)]
    batch = TensorDict(
        {
            "input_ids": nested(whole),
            "position_ids": nested([torch.arange(len(tokens)) for tokens in whole]),
            "prompts": nested(data.prompts),
            "responses": nested(data.responses),
            "response_mask": nested(data.masks),
            "loss_mask": nested(data.masks),
            "old_log_probs": nested(data.old_log_probs),
            "ref_log_prob": nested(data.ref_log_prob),
            "advantages": nested(
                [a * mask for a, mask in zip(advantages, data.masks, strict=True)]
            ),
            "uid": NonTensorStack(*[NonTensorData(uid) for uid in data.uids]),
        },
        batch_size=len(whole),
    )
    if data.weights is not None:
        batch["rollout_is_weights"] = nested(
            [w * mask for w, mask in zip(data.weights, data.masks, strict=True)]
        )
    defaults = {"temperature": 1.0, "calculate_entropy": False, "use_dynamic_bsz": False}
    tu.assign_non_tensor(batch, **(defaults | options))
    return batch


def padded_batch(data: Rollout, advantages: Tensor, **options: Any) -> TensorDict:
    """The same with prompts padded on the left and responses on the right."""
    prompt_BT, real_BT = (
        nested([value.flip(0) for value in values]).to_padded_tensor(0).flip(1)
        for values in (data.prompts, [torch.ones_like(prompt) for prompt in data.prompts])
    )
    response_BT, mask_BT, old_BT, ends_BT = (
        nested(values).to_padded_tensor(0)
        for values in (
            *(data.responses, data.masks, data.old_log_probs),
            [torch.ones_like(response) for response in data.responses],
        )
    )
    attention_BT = torch.cat([real_BT, ends_BT], dim=1)
    tensors = {
        "input_ids": torch.cat([prompt_BT, response_BT], dim=1),
        "attention_mask": attention_BT,
        "position_ids": (attention_BT.cumsum(dim=1) - 1).clamp(min=0),
        "prompts": prompt_BT,
        "responses": response_BT,
        "response_mask": mask_BT,
        "old_log_probs": old_BT,
        "advantages": advantages[:, None] * mask_BT,
    }
    batch = TensorDict(tensors, batch_size=len(mask_BT))
    tu.assign_non_tensor(batch, **({"temperature": 1.0, "use_dynamic_bsz": False} | options))
    return batch


def completions(data: Rollout) -> Completions:
    """The same for the local engine: padded rows."""
    width = max(len(p) + len(r) for p, r in zip(data.prompts, data.responses, strict=True))
    shape = (len(data.prompts), width)
    token_BT = torch.zeros(shape, dtype=torch.long)
    attention_BT, response_BT = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for row, (prompt, response, mask) in enumerate(
        zip(data.prompts, data.responses, data.masks, strict=True)
    ):
        start, end = len(prompt), len(prompt) + len(response)
        token_BT[row, :end] = torch.cat([prompt, response])
        attention_BT[row, :end] = True
        response_BT[row, start:end] = mask.bool()
    return Completions(token_BT, attention_BT, response_BT, torch.zeros(shape[0], dtype=torch.bool))


def aligned(data: Rollout, values: list[Tensor]) -> Tensor:
    """Values of response tokens where `completions` has them, from the second position on."""
    result_BT = torch.zeros(completions(data).token_BT.shape)
    for row, (prompt, value) in enumerate(zip(data.prompts, values, strict=True)):
        result_BT[row, len(prompt) : len(prompt) + len(value)] = value
    return result_BT[:, 1:]


def algorithm_section(name: str = "opo", **keys: Any) -> Any:
    """verl's algorithm section, as its driver has it, beside a policy loss with these keys."""
    target = f"proxstep.engines.verl.{config_name(ALGORITHMS[name])}"
    keys = {"_target_": target, **keys}
    correction = {"bypass_mode": ALGORITHMS[name].ratio_to_sampler}
    whole = {
        "algorithm": {"rollout_correction": correction},
        "actor_rollout_ref": {"actor": {"policy_loss": keys}},
    }
    return OmegaConf.create(whole).algorithm


def estimated(data: Rollout, name: str, keys: dict[str, Any]) -> Tensor:
    """What verl's driver computes of a rollout's rewards: the signal of each response."""
    mask_BT = nested(data.masks).to_padded_tensor(0)
    reward_BT = torch.zeros(mask_BT.shape)
    reward_BT[:, 0] = data.rewards
    estimate = get_adv_estimator_fn(loss_mode(ALGORITHMS[name]))
    signal_BT, _ = estimate(
        token_level_rewards=reward_BT,
        response_mask=mask_BT,
        config=algorithm_section(name, **keys),
        index=np.array(data.uids, dtype=object),
    )
    return signal_BT[:, 0]

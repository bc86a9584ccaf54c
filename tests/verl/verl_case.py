"""One mini-batch through verl's engine and through the local one: a model of a thousand weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests import models
from tests.verl.verl_data import VOCAB, Rollout, aligned, completions, quiet, verl_batch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensordict import TensorDict
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
    )
    from verl.workers.engine import EngineRegistry
    from verl.workers.utils.losses import ppo_loss


from proxstep.algorithms import ALGORITHMS
from proxstep.config.recipe import Recipe
from proxstep.engines.verl import BudgetActorConfig, IsopoActorConfig
from proxstep.engines.verl.estimator import numbered
from proxstep.engines.verl.policy_loss import config_class
from proxstep.engines.verl.seams import loss_mode
from proxstep.training.objective import Objective, make_isopo
from proxstep.training.rollout import score

FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
ENGINE: dict[str, Any] = {
    "strategy": "fsdp2",
    "model_dtype": "fp32",
    "mixed_precision": FP32,
    "use_torch_compile": False,
    "use_dynamic_bsz": False,
}
OPTIMIZER = {"lr": 1e-2, "clip_grad": 1e9}


# -- the engine ------------------------------------------------------------------------------------


@dataclass
class Case:
    """What differs between tests; the defaults are ISOPO's, packed and checkpointed."""

    folder: str
    geometry: dict[str, Any] | None = field(default_factory=dict)
    policy_loss: dict[str, Any] = field(default_factory=lambda: {"loss_mode": "gpg"})
    loss_agg_mode: str = "seq-mean-token-sum"
    micro_batch: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    actor: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def saved_model(folder: Path, *, tied: bool = True, lora: bool = False) -> nn.Module:
    """A model in a folder, and itself; its adapters lie in a folder of their own."""
    torch.manual_seed(1)
    model = models.finish(models.qwen3(tied, VOCAB), torch.float32, exact=False)
    with quiet():
        model.save_pretrained(folder)
        if lora:
            model = models.with_adapters(model)
            model.save_pretrained(folder / "adapters")
    return model


def actor_config(case: Case) -> FSDPActorConfig:
    """verl's actor configuration, as hydra makes it."""
    isopo, budget = case.geometry is not None, "kl_budget" in case.actor
    policy_loss = dict(case.policy_loss)
    ours = {loss_mode(algorithm): algorithm for algorithm in ALGORITHMS.values()}
    mode = policy_loss["loss_mode"]
    kind = config_class(ours[mode]) if mode in ours else PolicyLossConfig
    options: dict[str, Any] = {
        "strategy": "isopo" if isopo else "kl_budget" if budget else "fsdp2",
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": case.micro_batch,
        "loss_agg_mode": case.loss_agg_mode,
        "policy_loss": kind(**policy_loss),
        "fsdp_config": FSDPEngineConfig(**(ENGINE | case.engine)),
        **case.actor,
    }
    if isopo:
        return IsopoActorConfig(**options, geometry=case.geometry)
    return BudgetActorConfig(**options) if budget else FSDPActorConfig(**options)


def join_group() -> None:
    """Be a group of one rank, where there is none yet."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def made_engine(case: Case, **changes: Any) -> tuple[Any, Any]:
    """An engine that is ready, and the loss function that verl's worker would hand to it.

    The changes are to its engine's configuration, past what checks it.
    """
    join_group()
    actor = actor_config(case)
    with quiet():
        model = HFModelConfig(
            path=case.folder,
            load_tokenizer=False,
            **(
                {"override_config": {"attn_implementation": "sdpa"}, "use_remove_padding": True}
                | case.model
            ),
        )
        for name, value in changes.items():
            object.__setattr__(actor.engine, name, value)
        engine = EngineRegistry.new(
            "language_model",
            actor.engine.strategy,
            model_config=model,
            engine_config=actor.engine,
            optimizer_config=FSDPOptimizerConfig(
                **({"lr": 1e-2, "clip_grad": 1e9} | case.optimizer)
            ),
            checkpoint_config=CheckpointConfig(),
        )
        engine.initialize()
    return engine, functools.partial(ppo_loss, config=actor)


def step_on_rank(
    case: Case, data: Rollout, signal: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """One optimizer step on this rank's half of the rows, and what it left behind."""
    join_group()
    rank, size = dist.get_rank(), len(data.uids) // dist.get_world_size()
    rows = list(range(rank * size, (rank + 1) * size))
    engine, loss_function = made_engine(case)
    batch = verl_batch(data.rows(rows), signal[rows], **options)
    output, gradients = trained(engine, loss_function, batch)
    state = None if case.geometry is None else engine.isopo.state_dict()
    weights = {name: whole(value) for name, value in engine.module.state_dict().items()}
    return {
        "gradients": gradients,
        "metrics": measured(output["metrics"]),
        "loss": sum(output["loss"]),
        "state": state,
        "weights": weights,
    }


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """A step's metrics of one rank as numbers."""
    return {
        name: float(
            value.aggregate() if hasattr(value, "aggregate") else torch.tensor(value).mean()
        )
        for name, value in metrics.items()
    }


def trained(engine: Any, loss_function: Any, batch: TensorDict) -> tuple[Any, dict[str, Tensor]]:
    """One optimizer step; its output, and the gradients before it."""
    gradients: dict[str, Tensor] = {}
    step = engine.optimizer_step

    def watched() -> float:
        gradients.update(gradients_of(engine.module))
        return step()

    engine.optimizer_step = watched
    try:
        with quiet(), engine.train_mode():
            output = engine.train_batch(batch, loss_function)
    finally:
        engine.optimizer_step = step
    return output, gradients


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: whole(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def whole(value: Any) -> Tensor:
    """A tensor of all ranks' parts."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()


# -- the local engine ------------------------------------------------------------------------------


def local_gradients(
    model: nn.Module,
    recipe: Recipe,
    data: Rollout,
    signal: Tensor,
    parts: list[list[int]],
    keys: list[int] | None = None,
    state: dict[str, Any] | None = None,
    extra: Callable[[nn.Module, Rollout], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The local engine's gradient of one optimizer step, microbatch by microbatch.

    Args:
        model: The policy.
        recipe: Its objective and geometry.
        data: The step's responses.
        signal: What the objective takes of each as its advantage.
        parts: The rows of each microbatch.
        keys: The rows' `sequence_keys`; the rows themselves where None.
        state: Of ISOPO, from earlier steps.
        extra: Another loss of a microbatch, differentiated plainly.
    """
    algorithm, isopo = Objective(recipe), make_isopo(recipe, model)
    if isopo is not None and state is not None:
        isopo.load_state_dict(state)
    groups = numbered(data.uids)
    counted = [bool(mask.any()) for mask in data.masks]

    def accumulate(extra: Callable[[nn.Module, Rollout], Tensor] | None) -> None:
        for rows in parts:
            rows = [row for row in rows if counted[row]]
            if not rows:
                continue
            part, done = data.rows(rows), completions(data.rows(rows))
            log_prob_BT = score(model, done, 1.0).log_prob_BT
            algorithm.backward(
                log_prob_BT,
                aligned(part, part.old_log_probs),
                signal[rows],
                done.response_BT[:, 1:],
                num_sequences=len(data.uids),
                num_tokens=sum(int(mask.sum()) for mask in data.masks),
                isopo=isopo,
                extra_loss=None,
                sequence_ids=done.sequence_ids(),
                completion_mask=done.response_BT,
                groups=groups[rows],
                sequence_keys=torch.tensor(rows if keys is None else [keys[row] for row in rows]),
                importance_B=part.weights,
                hyper={},
            )
            if extra is not None:
                with nullcontext() if isopo is None else isopo.off():
                    extra(model, part).backward()

    while isopo is not None and isopo.needs_past:
        with isopo.measuring():
            accumulate(None)
    accumulate(extra)
    return gradients_of(model)

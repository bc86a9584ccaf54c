"""What each of two ranks does with verl's training worker on the CPU platform."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

NUM_RANKS = 2
SECONDS = 240
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
PROMPT, RESPONSE = 5, 4


def on_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returns on each rank; its process group is verl's to start."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    calls = [(function, rank, port, args) for rank in range(NUM_RANKS)]
    with multiprocessing.get_context("spawn").Pool(NUM_RANKS) as pool:
        return pool.starmap_async(_run, calls, chunksize=1).get(timeout=SECONDS)


def _run(function: Callable[..., Any], rank: int, port: int, args: tuple[Any, ...]) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")  # verl's
    import tests.verl.cpu  # noqa: F401  before anything of verl
    import torch

    torch.set_num_threads(1)
    return function(rank, *args)


def made_worker(folder: Path, *, forward_only: bool, packed: bool) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker

    sizes = {"micro_batch_size_per_gpu": 2, "infer_micro_batch_size_per_gpu": 4}
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(folder),
            use_remove_padding=packed,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            forward_only=forward_only,
            use_torch_compile=False,
            mixed_precision=FP32,
            use_dynamic_bsz=False,
            **sizes,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2),
        checkpoint_config=CheckpointConfig(),
    )
    worker = TrainingWorker(config)
    worker.reset()
    return worker


def made_tokens(seed: int) -> tuple[Any, Any]:
    """Four left- and right-padded sequences: ids and attention."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 14, (4, PROMPT + RESPONSE), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, :2], attention[1, -1], attention[2, 0] = 0, 0, 0
    return ids, attention


def made_data(seed: int) -> Any:
    """The sequences as verl carries them, with random advantages."""
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    ids, attention = made_tokens(seed)
    generator = torch.Generator().manual_seed(seed)
    padded = TensorDict(
        {
            "prompts": ids[:, :PROMPT],
            "responses": ids[:, PROMPT:],
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
            "response_mask": attention[:, PROMPT:],
            "old_log_probs": -torch.rand(4, RESPONSE, generator=generator),
            "advantages": torch.randn(4, RESPONSE, generator=generator),
        },
        batch_size=4,
    )
    data = left_right_2_no_padding(padded)
    tu.assign_non_tensor(data, temperature=1.0, global_batch_size=8, compute_loss=False)
    tu.assign_non_tensor(data, global_token_num=[9] * 4, update_lr_scheduler=True)
    return data


def log_probs_of(rank: int, folder: Path, packed: bool) -> dict[str, Any]:
    """Each sequence's log-probabilities by the training and by the reference engine."""
    from verl.utils import tensordict_utils as tu

    found: dict[str, Any] = {}
    for name, forward_only in (("train", False), ("reference", True)):
        worker = made_worker(folder, forward_only=forward_only, packed=packed)
        out = worker.infer_batch(made_data(rank))
        found[name] = [row.clone() for row in out["log_probs"].unbind()]
        found[f"{name}_memory"] = tu.get(out, "metrics")["perf/max_memory_allocated_gb"]
    return found


def train_and_go_back(rank: int, folder: Path, packed: bool) -> dict[str, Any]:
    """Weights before, after one and two updates, and after loading the checkpoint between them."""
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    worker = made_worker(folder, forward_only=False, packed=packed)
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, use_dynamic_bsz=False
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))

    def weights() -> dict[str, Any]:
        return {name: value.clone() for name, value in worker.engine.get_per_tensor_param()[0]}

    found = {"before": weights()}
    worker.train_batch(made_data(rank))
    found["once"] = weights()
    checkpoint = str(folder / "checkpoint")
    worker.save_checkpoint(checkpoint)
    worker.train_batch(made_data(10 + rank))
    found["twice"] = weights()
    worker.load_checkpoint(checkpoint)
    found["back"] = weights()
    worker.train_batch(made_data(10 + rank))
    found["again"] = weights()
    return found

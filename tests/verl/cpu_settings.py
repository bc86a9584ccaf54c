"""What verl must be told on a machine without an accelerator: settings and environment.

Apart from `tests.verl.cpu`, whose import needs verl and changes it.
"""

from __future__ import annotations

import os
from pathlib import Path

from proxstep.engines.verl.overrides import Machine

_ROOT = str(Path(__file__).parents[2])


def cpu_environment() -> dict[str, str]:
    """Return the environment variables for `python -m verl.trainer.main_ppo`."""
    paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]  # verl has a `tests`, too
    return {
        "VERL_USE_EXTERNAL_MODULES": "tests.verl.cpu",  # in every process
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",  # the ranks share the cores
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TMPDIR": "/tmp",  # Ray's sockets lie below it, and a long TMPDIR breaks their names
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",  # one process for every pretended CPU
        "RAY_prestart_worker_first_driver": "0",
    }


def cpu_overrides(num_ranks: int = 2) -> list[str]:
    """Return the hydra overrides for `python -m verl.trainer.main_ppo`.

    They name what the CPU needs and nothing of the algorithm. FSDP2 is among it, since FSDP1 does
    not run: a later override of `actor_rollout_ref.actor.strategy` may name another engine that
    is FSDP2 underneath. None holds a space.

    Args:
        num_ranks: Data-parallel ranks, each a process.
    """
    ray = "ray_kwargs.ray_init"
    actor = "actor_rollout_ref.actor"
    precision = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    return [
        "trainer.device=cpu",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={num_ranks}",
        f"+{ray}.address=local",  # not another cluster of the machine
        f"+{ray}.num_gpus={num_ranks}",
        f"{ray}.num_cpus={3 * num_ranks + 6}",
        f"+{ray}.include_dashboard=false",
        f"+{ray}._node_ip_address=127.0.0.1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "data.dataloader_num_workers=0",
        "reward.num_workers=1",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_torch_compile=false",
        f"{actor}.fsdp_config.use_torch_compile=false",
        f"+{actor}.fsdp_config.mixed_precision={precision}",
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile=false",
        f"+actor_rollout_ref.ref.fsdp_config.mixed_precision={precision}",
        "actor_rollout_ref.rollout.name=cpu",
        "actor_rollout_ref.rollout.dtype=float32",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={num_ranks}",
        "actor_rollout_ref.rollout.agent.num_workers=1",
    ]


def cpu_machine() -> Machine:
    """Return this machine as a recipe's run of verl is to take it."""
    return Machine(2, {text.partition("=")[0]: text for text in cpu_overrides(2)})

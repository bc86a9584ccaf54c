"""The rollout that verl knows as `actor_rollout_ref.rollout.name=cpu`."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import ray
from tests.verl.cpu import patches
from tests.verl.cpu.server import CpuServer
from torch import Tensor
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from proxstep.errors import ProxstepError


class CpuReplica(RolloutReplica):
    """One server for `tensor_model_parallel_size` ranks, which send it their weights.

    It serves verl's synchronous trainer. There is no memory to give back between the phases of a
    step, so sleeping and waking are empty.

    Raises:
        ProxstepError: For a reward model, a teacher, or adapters that are not merged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self)
        patches.look_for_completions_often()

    async def launch_servers(self) -> None:
        """Start the server, and wait until its model is loaded."""
        server = (
            ray.remote(CpuServer)
            .options(
                name=_server_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = _server_name(self.replica_rank)

    async def sleep(self) -> None:
        """Do nothing."""

    async def wake_up(self) -> None:
        """Do nothing."""

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Refuse: generation that goes on beside training is not for the CPU.

        Raises:
            ProxstepError: Always.
        """
        raise ProxstepError(
            "actor_rollout_ref.rollout.name=cpu does not interrupt requests: set "
            "trainer.v1.trainer_mode=sync"
        )


class CpuRollout(BaseRollout):
    """A training rank's side: hands the weights to the replica's server.

    Args:
        config: verl's rollout section.
        model_config: verl's model section.
        device_mesh: Of the ranks, not used.
        replica_rank: -1 for the replica that the rank belongs to.
    """

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        num_ranks = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // num_ranks if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % num_ranks == 0
        self._server: Any = None

    async def update_weights(
        self,
        weights: Generator[tuple[str, Tensor], None, None],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Send the server the weights, bit for bit where rollout.dtype is theirs.

        Args:
            weights: Names and whole tensors; every rank runs through them, since gathering a
                tensor takes all ranks, and one rank of a replica sends.
            wire_format: "named_tensors".
            global_steps: The step that they are of.
            kwargs: What concerns adapters, which are refused at the start.
        """
        whole = {name: tensor.detach() for name, tensor in weights}
        if self.is_leader_rank:
            if self._server is None:
                self._server = ray.get_actor(_server_name(self.replica_rank))
            await self._server.update_weights.remote(whole, global_steps)

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: nothing was released."""

    async def release(self) -> None:
        """Do nothing: memory of the CPU is not handed over."""


def register() -> None:
    """Make the rollout known to verl."""
    _ROLLOUT_REGISTRY["cpu", "async"] = f"{__name__}.{CpuRollout.__name__}"
    RolloutReplicaRegistry.register("cpu", lambda: CpuReplica)


def _server_name(replica_rank: int) -> str:
    return f"cpu_server_{replica_rank}"


def _refuse(replica: RolloutReplica) -> None:
    if replica.is_reward_model:
        raise ProxstepError(
            "actor_rollout_ref.rollout.name=cpu serves the policy alone: set "
            "reward.reward_model.enable=false, or give it another rollout"
        )
    if replica.is_teacher_model:
        raise ProxstepError(
            "actor_rollout_ref.rollout.name=cpu serves the policy alone: set "
            "distillation.enabled=false, or give the teacher another rollout"
        )
    model = replica.model_config
    adapters = model.lora_rank > 0 or model.lora.rank > 0 or model.lora_adapter_path is not None
    if adapters and not model.lora.merge:
        raise ProxstepError(
            "actor_rollout_ref.rollout.name=cpu takes whole weights, no adapters: set "
            "actor_rollout_ref.model.lora.merge=true"
        )

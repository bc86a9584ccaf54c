"""The CPU as a verl platform."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

from tests.verl.cpu import device
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

from proxstep.errors import ProxstepError


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """One CPU device per process, gloo between the processes.

    To Ray the ranks stand on GPUs, because verl counts no other resource: start it with as many
    pretended ones as there are ranks (`ray_kwargs.ray_init.num_gpus`).
    """

    device_name = "cpu"  # type: ignore[assignment]
    vendor_name = "cpu"  # type: ignore[assignment]
    device_module: ModuleType = device  # type: ignore[assignment]

    def is_available(self) -> bool:
        """Whether the device is there: always."""
        return True

    def current_device(self) -> Any:
        """Return "cpu", not an index: verl hands it to `Tensor.to`, where 0 would mean a GPU."""
        return "cpu"

    def device_count(self) -> int:
        """Return 1."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: no work is pending on a CPU."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch's generator."""
        device.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch's generator."""
        device.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing: the settings are those of CUDA's allocator."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """Return (None, None): a CPU has no compute capability."""
        return None, None

    def communication_backend_name(self) -> str:
        """Return "gloo"."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Return CUDA's name, which Ray sets for its GPUs, the pretended ones too."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """Return "GPU": verl's check of the cluster's resources counts GPU and NPU alone."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Return none: which pretended GPU a rank stands on makes no difference."""
        return []

    def is_ipc_supported(self) -> bool:
        """Whether tensors go to another process by handle: no."""
        return False

    def nvtx_range(self, msg: str) -> Any:
        """Return a context that does nothing."""
        return nullcontext()

    def profiler_start(self) -> None:
        """Do nothing: there is no device profiler."""

    def profiler_stop(self) -> None:
        """Do nothing: there is no device profiler."""

    def cudart(self) -> None:
        """Return None: there is no CUDA runtime."""


def use() -> None:
    """Make the CPU this process's platform.

    Raises:
        ProxstepError: If verl has chosen another one already.
    """
    current = platform_manager._current_platform
    if current is None:
        set_platform(CpuPlatform())
    elif not isinstance(current, CpuPlatform):
        raise ProxstepError(
            f"verl's platform in this process is {current.device_name} already: set "
            "VERL_USE_EXTERNAL_MODULES=tests.verl.cpu for every process, so that "
            "tests.verl.cpu is loaded before it is chosen"
        )

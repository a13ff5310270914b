"""A CPU platform for verl, through its public plugin interface; verl 0.9.1 knows accelerators only.

`install()` must run before anything of `verl.workers` is imported: verl reads the device name at import.
"""

import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, set_platform


class _CpuDeviceModule(types.ModuleType):
    """`torch.cpu` with the calls of `torch.cuda` that verl makes; a CPU has no device memory to report."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def get_rng_state(*_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def memory_allocated(*_: Any) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    @staticmethod
    def mem_get_info(*_: Any) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def empty_cache() -> None:
        pass

    ipc_collect = empty_cache


class PlatformCPU(PlatformBase):  # type: ignore[misc]  # verl is untyped
    """The CPU as verl's platform: gloo collectives and the host's memory. See verl's `PlatformBase`."""

    device_name = vendor_name = "cpu"
    device_module = _CpuDeviceModule("verl_cpu_device")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"  # verl hands it to Tensor.to, which takes no index for the CPU

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> AbstractContextManager[None]:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def _nothing(self, *_: Any) -> None:
        """What verl asks of a platform and a CPU does not have."""

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


def install() -> None:
    """Make the CPU verl's device in this process. Further calls do nothing."""
    from verl.plugin.platform import platform_manager

    if not isinstance(platform_manager._current_platform, PlatformCPU):
        set_platform(PlatformCPU())

"""Our vLLM server on a CPU, with a sleep mode: what sleeps has no memory, and what wakes has garbage in it.

Linear layers compute with plain parameters (see `plain_server`), so nothing else holds a copy of the weights.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from atropos_exp.parts.engine.vllm.worker import WeightWorker
from tests.vllm import plain_server

PAGE = os.sysconf("SC_PAGE_SIZE")
NO_ACCESS, READ_AND_WRITE, GIVE_BACK = 0, 3, 4  # PROT_NONE, PROT_READ | PROT_WRITE, MADV_DONTNEED

GARBAGE = {"weights": 0xFF, "kv_cache": 0x3F}  # NaN; 0.75, for CPU kernels multiply what they mask out by zero


def storages(worker: Any, tag: str) -> list[Any]:
    runner = worker.model_runner
    tensors = list(runner.model.parameters()) if tag == "weights" else list(runner.kv_caches)
    return list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())


def pages(storage: Any) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    """Those that it fills alone: address and bytes."""
    start = -(-storage.data_ptr() // PAGE) * PAGE
    end = (storage.data_ptr() + storage.nbytes()) // PAGE * PAGE
    return ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start))


def main() -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    libc = ctypes.CDLL(None, use_errno=True)

    def system(call: Any, storage: Any, how: int) -> None:
        if call(*pages(storage), ctypes.c_int(how)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def sleep(self: Any, level: int = 1) -> None:
        assert level == 2, "a level that keeps the weights on the host would need the room there"
        for storage in storages(self, "weights") + storages(self, "kv_cache"):
            system(libc.madvise, storage, GIVE_BACK)
            system(libc.mprotect, storage, NO_ACCESS)  # whoever uses it now crashes

    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        for tag in tags or ["weights", "kv_cache"]:
            for storage in storages(self, tag):
                system(libc.mprotect, storage, READ_AND_WRITE)
                storage.fill_(GARBAGE[tag])

    def memory(self: Any) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    CpuPlatform.is_sleep_mode_available = lambda self: True  # type: ignore[method-assign]
    CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up  # type: ignore[method-assign]
    WeightWorker.atropos_memory = memory  # type: ignore[method-assign]
    plain_server.main()


if __name__ == "__main__":
    main()

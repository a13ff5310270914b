"""`engine.transport=cuda_ipc`: weights stay on the GPU that trainer and engine share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_exp.processes.wire import Message
from atropos_exp.weights.tensors import layout, write_bucket
from atropos_exp.weights.transport import Bucket, StoredTransport

if TYPE_CHECKING:
    from torch import Tensor


class CudaTransport(StoredTransport):
    """One buffer on the shared GPU, allocated for the first bucket and grown for a larger one."""

    on_device = True

    def __init__(self, log_folder: Path) -> None:
        """`log_folder` is not used: all transports are constructed alike."""
        self._buffer: Tensor | None = None
        self._handle: list[Any] = []  # what another process on this GPU opens the buffer with

    def arguments(self, server: int) -> list[str]:
        return ["--weights-cuda-ipc"]

    def write(self, bucket: Bucket) -> Message:
        import torch

        from atropos_exp.weights.receiver import share_cuda

        pieces, num_bytes = layout(bucket)
        if self._buffer is None or len(self._buffer) < num_bytes:
            self._buffer = torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=bucket[0][1].device)
            self._handle = share_cuda(self._buffer)
        write_bucket(bucket, pieces, self._buffer)
        torch.cuda.synchronize(self._buffer.device)  # the engine reads on a stream of its own
        return {"pieces": [piece.to_message() for piece in pieces], "num_bytes": num_bytes, "cuda": self._handle}

    def clear(self) -> None:
        """The buffer stays: the engine keeps it open."""

    def close(self) -> None:
        """The servers were killed with the buffer open; without this torch warns at exit that it is still shared."""
        if self._handle:
            import torch

            torch.UntypedStorage._release_ipc_counter_cuda(*self._handle[4:6])
        self._buffer, self._handle = None, []

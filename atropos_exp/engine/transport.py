"""How a bucket of weights reaches server processes: shared memory, device memory, files, or a group of processes.

One transport serves all replicas of an engine: each bucket is laid down once, and every server is told of it. A message
has a key for each way in which the bucket can be reached; a server knows its own.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atropos_exp.engine.group import BACKENDS
from atropos_exp.engine.group_transport import GroupTransport
from atropos_exp.engine.mixed_transport import MIXED, MixedTransport
from atropos_exp.types import UserError
from atropos_exp.wire_tensors import layout, write_bucket

if TYPE_CHECKING:
    from torch import Tensor

TRANSPORTS = ("shm", "disk", "cuda_ipc", "nccl", "gloo", *MIXED)
Bucket = Sequence[tuple[str, "Tensor"]]
Message = dict[str, Any]


class Transport(Protocol):
    """The sender's side."""

    @property
    def on_device(self) -> bool:
        """Tensors are handed over on the trainer's GPU and never leave it."""
        ...

    @property
    def inherited_fds(self) -> tuple[int, ...]: ...

    def arguments(self, server: int) -> list[str]:
        """What tells this one of the engine's servers (0, 1, …) where to look."""
        ...

    def sending(self, bucket: Bucket) -> AbstractContextManager[Message]:
        """Lay the bucket down, or begin to send it; the message that tells a server of it. It may be overwritten after
        leaving. Leaving by an exception gives it up."""
        ...

    def clear(self) -> None:
        """Give the space of the last bucket back."""
        ...

    def reset(self) -> None:
        """A server was started anew and knows nothing of what came before."""
        ...

    def close(self) -> None: ...


def is_transport(name: str) -> bool:
    """Whether `make_transport` knows it: one of the built-in ones, or a class of this folder by its full name."""
    return name in TRANSPORTS or (name.startswith(f"{__package__}.") and name.count(".") == 3)


def make_transport(
    name: str,
    log_folder: Path,
    *,
    num_servers: int = 1,
    receivers_per_server: int = 1,
    near: Collection[int] = (),
) -> Transport:
    """shm | disk | cuda_ipc | nccl | gloo, two of them joined by + (see `MIXED`), or a class of a file of this folder,
    made with the log folder. Raises UserError. `receivers_per_server`: processes of each server that receive weights.
    `near`: the servers that the first of two serves."""
    if name in MIXED:
        first, second = name.split("+")
        others = GroupTransport(second, num_servers=num_servers - len(near), receivers_per_server=receivers_per_server)
        return MixedTransport(make_transport(first, log_folder), others, near=near)
    if name in BACKENDS:
        return GroupTransport(name, num_servers=num_servers, receivers_per_server=receivers_per_server)
    if name == "cuda_ipc":
        return CudaTransport()
    if name == "shm":
        return ShmTransport()
    if name == "disk":
        return DiskTransport(log_folder)
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"engine.transport: got {name}, but there is no such class ({error})") from None
    transport: Transport = cls(log_folder)
    return transport


class Laid:
    """Of a transport that lays buckets down with `write`, where they lie until the next one."""

    def write(self, bucket: Bucket) -> Message:
        raise NotImplementedError

    @contextlib.contextmanager
    def sending(self, bucket: Bucket) -> Iterator[Message]:
        yield self.write(bucket)

    def reset(self) -> None:
        """Nothing is kept but the last bucket, which `clear` removes."""


class ShmTransport(Laid):
    """Anonymous shared memory that the child inherits: it has no name that could be left behind, whoever dies."""

    on_device = False

    def __init__(self) -> None:
        self._fd = os.memfd_create("atropos_exp-weights", os.MFD_CLOEXEC)

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return (self._fd,)

    def arguments(self, server: int) -> list[str]:
        return ["--weights-fd", str(self._fd)]

    def write(self, bucket: Bucket) -> Message:
        pieces, num_bytes = layout(bucket)
        if os.fstat(self._fd).st_size < num_bytes:
            os.ftruncate(self._fd, num_bytes)
        if num_bytes:
            write_bucket(bucket, pieces, mmap.mmap(self._fd, num_bytes))
        return {"pieces": [piece.to_message() for piece in pieces], "num_bytes": num_bytes, "shm": True}

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DiskTransport(Laid):
    """One safetensors file, overwritten by each bucket, in a folder of its own."""

    FILE = "bucket.safetensors"
    on_device = False

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="weights_", dir=parent))

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return ()

    def arguments(self, server: int) -> list[str]:
        return ["--weights-folder", str(self._folder)]

    def write(self, bucket: Bucket) -> Message:
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, self._folder / self.FILE)
        return {"file": self.FILE}

    def clear(self) -> None:
        (self._folder / self.FILE).unlink(missing_ok=True)

    def close(self) -> None:
        self.clear()
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()


class CudaTransport(Laid):
    """One buffer on the GPU that trainer and engine share. Made at the first bucket, grown for a larger one."""

    on_device = True

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._handle: list[Any] = []

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return ()

    def arguments(self, server: int) -> list[str]:
        return ["--weights-cuda-ipc"]

    def write(self, bucket: Bucket) -> Message:
        import torch

        from atropos_exp.engine.bucket import share_cuda

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
        """After the servers were killed, with the buffer open: torch would warn at exit that it is still theirs."""
        if self._handle:
            import torch

            torch.UntypedStorage._release_ipc_counter_cuda(*self._handle[4:6])
        self._buffer, self._handle = None, []

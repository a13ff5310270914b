"""`engine.transport=shm`: weights through shared memory on the host."""

import mmap
import os
from pathlib import Path

from atropos_exp.processes.wire import Message
from atropos_exp.weights.tensors import layout, write_bucket
from atropos_exp.weights.transport import Bucket, StoredTransport


class ShmTransport(StoredTransport):
    """One anonymous memory file that the servers inherit: it has no name, so nothing is left when processes die."""

    on_device = False

    def __init__(self, log_folder: Path) -> None:
        """`log_folder` is not used: all transports are constructed alike."""
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

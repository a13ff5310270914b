"""TODO."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from atropos_exp.weights.tensors import layout, write_bucket
from atropos_exp.weights.transport import Bucket, Laid, Message

if TYPE_CHECKING:
    pass


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

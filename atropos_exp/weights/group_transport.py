"""`engine.transport=nccl` and `gloo`: each bucket is sent to all processes of the engine at once, by a broadcast."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from atropos_exp.errors import EngineError, EngineLost
from atropos_exp.processes.wire import Message
from atropos_exp.weights.group import SEND_SECONDS, Group, GroupError, Transfer, nccl_version, store_file
from atropos_exp.weights.tensors import layout, write_bucket
from atropos_exp.weights.transport import Bucket

if TYPE_CHECKING:
    from torch import Tensor

END_SECONDS = 10.0


class GroupTransport:
    """A `Transport`. A thread of its own broadcasts the bucket while the servers get the message, so a server that dies
    or refuses never leaves this process waiting for it: the group is abandoned, and the next bucket forms a new one.
    """

    def __init__(self, backend: str, *, num_servers: int, receivers_per_server: int) -> None:
        """`backend`: nccl | gloo. `receivers_per_server`: processes of each server that receive weights."""
        self.on_device = backend == "nccl"
        self._backend = backend
        self._receivers_per_server = receivers_per_server
        self._size = 1 + num_servers * receivers_per_server
        self._fd = store_file()
        self._group: Group | None = None
        self._abandoned: list[Group] = []
        self._buffer: Tensor | None = None
        self._resetting = threading.Lock()

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return (self._fd,)

    def arguments(self, server: int) -> list[str]:
        rank = 1 + server * self._receivers_per_server
        return ["--group-backend", self._backend, "--group-fd", str(self._fd), "--group-rank", str(rank)]

    @contextlib.contextmanager
    def sending(self, bucket: Bucket) -> Iterator[Message]:
        import torch

        pieces, num_bytes = layout(bucket)
        if self._group is None:
            store = f"/proc/{os.getpid()}/fd/{self._fd}"
            self._group = Group(backend=self._backend, store=store, name=secrets.token_hex(16), rank=0, size=self._size)
        message: Message = {
            "pieces": [piece.to_message() for piece in pieces],
            "num_bytes": num_bytes,
            "group": {
                "name": self._group.name,
                "size": self._size,
                "nccl": nccl_version() if self.on_device else None,
                "torch": str(torch.__version__),
            },
        }
        transfer: Transfer | None = None
        if num_bytes:
            if self._buffer is None or len(self._buffer) < num_bytes:
                device = bucket[0][1].device if self.on_device else "cpu"
                self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            write_bucket(bucket, pieces, self._buffer)
            if self.on_device:
                torch.cuda.synchronize(self._buffer.device)  # the sending thread has a stream of its own
            transfer = self._group.start(self._buffer[:num_bytes])
        try:
            yield message
            if transfer is not None:
                transfer.wait(SEND_SECONDS)  # all receivers have it, so it is over
        except EngineLost:
            self.reset()
            raise
        except (EngineError, GroupError) as error:
            self.reset()
            if transfer is None or transfer.error is None or transfer.error is error.__cause__:
                raise EngineError(str(error)) from error
            own = f"{type(transfer.error).__name__}: {transfer.error}"
            raise EngineError(f"{error}; the sender of weights met {own}") from error
        except BaseException:
            self.reset()
            raise

    def clear(self) -> None:
        """The buffer stays for the next update."""

    def reset(self) -> None:
        with self._resetting:  # servers that share this transport are restarted side by side
            group, self._group, self._buffer = self._group, None, None  # a transfer that hangs still has the old buffer
            if group is not None:
                group.abandon()
                self._abandoned.append(group)

    def close(self) -> None:
        """After the servers have ended, so that nothing waits for them any more."""
        self.reset()
        while self._abandoned:
            self._abandoned.pop().wait_for_threads(END_SECONDS)

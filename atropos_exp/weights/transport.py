"""How a bucket of weights reaches the engine's server processes: the sender's side.

A bucket is a few named tensors, at most `sync.bucket_mb` of them at a time. One transport serves all servers of an
engine: each bucket is written or sent once, and every server gets the same message over HTTP. The message has a key for
each way in which the bucket can be reached, and a server knows its own (`receiver.BucketSource`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from atropos_exp.processes.wire import Message

if TYPE_CHECKING:
    from torch import Tensor

Bucket = Sequence[tuple[str, "Tensor"]]


class Transport(Protocol):
    """Carries buckets of weights from this process to all servers of an engine.

        transport = DiskTransport(Path("log"))
        process = start_a_server(*transport.arguments(0), pass_fds=transport.inherited_fds)
        with transport.sending([("lm_head.weight", tensor)]) as message:
            process.post("/weights/bucket", message)  # returns when the server has loaded it
        transport.clear()

    A transport of one's own is constructed with the folder of the run's logs; docs/extending.md has one.
    """

    @property
    def on_device(self) -> bool:
        """Whether `sending` takes tensors on the trainer's GPU, which then never leave it."""

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        """File descriptors that every server process must inherit."""

    def arguments(self, server: int) -> list[str]:
        """Command-line options that tell the engine's server with this number (0, 1, …) where buckets arrive."""

    def sending(self, bucket: Bucket) -> AbstractContextManager[Message]:
        """Write the bucket, or begin to send it. Inside the block, hand the message to every server, and leave when all
        of them have loaded the bucket: the next one may overwrite it. Leaving by an exception gives the bucket up.
        Raises EngineError if the bucket does not get through."""

    def clear(self) -> None:
        """Release the space of the last bucket. The transport can go on."""

    def reset(self) -> None:
        """Forget all servers' connections: one of them has been restarted."""

    def close(self) -> None:
        """Release everything. The servers have ended. May be called twice."""


class StoredTransport:
    """The base of transports that store a bucket in one place, where it stays until the next: they define `write`."""

    def write(self, bucket: Bucket) -> Message:
        """Store the bucket over the last one. Returns the message that tells a server where it is."""
        raise NotImplementedError

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return ()

    @contextlib.contextmanager
    def sending(self, bucket: Bucket) -> Iterator[Message]:
        yield self.write(bucket)

    def reset(self) -> None:
        """There are no connections."""

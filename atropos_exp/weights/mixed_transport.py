"""`engine.transport=cuda_ipc+nccl` and `shm+gloo`: some servers are on the trainer's GPU, others are not."""

import contextlib
from collections.abc import Collection, Iterator

from atropos_exp.processes.wire import Message
from atropos_exp.weights.group_transport import GroupTransport
from atropos_exp.weights.transport import Bucket, Transport

MIXED = ("cuda_ipc+nccl", "shm+gloo")  # near + far; the second one is how the first is tested without GPUs


class MixedTransport:
    """A `Transport` made of two.

        MixedTransport(CudaTransport(folder), GroupTransport("nccl", num_servers=1, receivers_per_server=1), near=[0])

    NCCL allows one process per GPU, so a server on the trainer's own GPU gets its weights in another way.
    """

    def __init__(self, near_transport: Transport, far_transport: GroupTransport, *, near: Collection[int]) -> None:
        """`near`: numbers of the servers that `near_transport` serves."""
        self._near, self._near_servers = near_transport, frozenset(near)
        self._far = far_transport
        self.on_device = near_transport.on_device and far_transport.on_device

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return (*self._near.inherited_fds, *self._far.inherited_fds)

    def arguments(self, server: int) -> list[str]:
        if server in self._near_servers:
            return self._near.arguments(server)
        return self._far.arguments(server - sum(near < server for near in self._near_servers))

    @contextlib.contextmanager
    def sending(self, bucket: Bucket) -> Iterator[Message]:
        # The near one first: it waits for the whole GPU, on which the far one's send waits for the servers' message.
        with self._near.sending(bucket) as near, self._far.sending(bucket) as far:
            yield {**far, **near}

    def clear(self) -> None:
        self._near.clear()
        self._far.clear()

    def reset(self) -> None:
        self._near.reset()
        self._far.reset()

    def close(self) -> None:
        self._near.close()
        self._far.close()

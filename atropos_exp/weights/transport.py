"""How a bucket of weights reaches server processes: shared memory, device memory, files, or a group of processes.

One transport serves all replicas of an engine: each bucket is laid down once, and every server is told of it. A message
has a key for each way in which the bucket can be reached; a server knows its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

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


class Laid:
    """Of a transport that lays buckets down with `write`, where they lie until the next one."""

    def write(self, bucket: Bucket) -> Message:
        raise NotImplementedError

    @contextlib.contextmanager
    def sending(self, bucket: Bucket) -> Iterator[Message]:
        yield self.write(bucket)

    def reset(self) -> None:
        """Nothing is kept but the last bucket, which `clear` removes."""

"""A process group of the sender of weights and the processes that receive them, separate from all their other groups.

It is constructed directly (`ProcessGroupNCCL`, or `ProcessGroupGloo` without GPUs), so neither the trainer's default
group nor vLLM's is touched. Its members meet through a memory file that the servers inherit: there is no store port
that other programs could reach, and nothing is left behind. Gloo's sockets are on loopback, and NCCL's cannot be joined
without the 64 random bits of an id that is in that file only. What is sent is bytes of known length.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("nccl", "gloo")
FORM_SECONDS = 120.0  # until all members are connected
SEND_SECONDS = 60.0  # for one bucket
POLL_SECONDS = 0.05  # between two checks whether the group was abandoned
ABANDONED = "given_up"
# Read when a group is constructed. By default NCCL ends the process when a peer is lost; ours abandons the group.
NCCL_VARIABLES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",  # abort the communicator, nothing more
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
}


class GroupError(RuntimeError):
    """The group did not form, or lost a member."""


def nccl_version() -> tuple[int, ...] | None:
    """NCCL's version in this process, or None without NCCL. All members of a group need the same."""
    import torch

    if not torch.cuda.is_available():
        return None
    from torch.cuda import nccl

    return tuple(nccl.version())


class Group:
    """Rank 0 broadcasts buffers to all others. The group forms at the first transfer; one that failed is replaced by a
    new group with another name.

        group = Group(backend="gloo", store=f"/proc/{os.getpid()}/fd/{store_file()}", name="a", rank=0, size=2)
        group.start(buffer).wait(SEND_SECONDS)  # the receiver does the same with rank=1 and a buffer of that size
    """

    def __init__(self, *, backend: str, store: str, name: str, rank: int, size: int) -> None:
        """`store`: path of the memory file in this process. `name`: unique among the groups that use this file."""
        self.name = name
        self._backend = backend
        self._store = store
        self._rank = rank
        self._size = size
        self._members: Any = None
        self._is_over = False
        self._threads: list[threading.Thread] = []

    def start(self, buffer: Tensor) -> Transfer:
        """Begin to send (rank 0) or fill (other ranks) a buffer of bytes, in a thread of its own. One at a time."""
        transfer = Transfer(self, buffer)
        self._run(transfer.run)
        return transfer

    def transfer(self, buffer: Tensor) -> None:
        """Send or fill the buffer in this thread. Raises GroupError, or what the library raises."""
        if buffer.device.type == "cuda":
            import torch

            torch.cuda.set_device(buffer.device)
        if self._members is None:
            self._members = self._form()
        members = self._members
        if self._is_over:  # abandoned while it formed
            raise GroupError("the group was given up")
        work = members.broadcast(buffer, 0)  # NCCL connects here the first time
        deadline = time.monotonic() + SEND_SECONDS
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise GroupError(f"a bucket was not through after {SEND_SECONDS:g} s")
            time.sleep(0.0002)
        work.wait()  # raises what happened in Gloo
        if self._backend == "nccl" and hasattr(members, "get_error"):  # not in every torch
            state = members.get_error().name
            if state != "SUCCESS":
                raise GroupError(f"NCCL met {state}")

    def abandon(self) -> None:
        """Abandon the group and signal the other members. A member that hangs may hold the thread that does this, so it
        is another thread than the caller's."""
        self._is_over = True
        members, self._members = self._members, None
        self._run(self._abort, members)

    def is_abandoned(self) -> bool:
        """Whether a member has abandoned this group."""
        return bool(_open(self._store, f"{self.name}/flags").check([ABANDONED]))

    def wait_for_threads(self, seconds: float) -> None:
        """Wait for unfinished transfers before the process ends: Python kills the process if threads are in a library
        then."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, args=arguments, name="weights", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _abort(self, members: Any) -> None:
        _open(self._store, f"{self.name}/flags").set(ABANDONED, "1")
        if self._backend == "nccl" and members is not None:
            with contextlib.suppress(RuntimeError):
                members.abort()
        # Gloo closes its connections when its last reference goes, which is ours.

    def _form(self) -> Any:
        store = _open(self._store, self.name)
        if self._backend == "nccl":
            from torch.distributed.distributed_c10d import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=FORM_SECONDS + SEND_SECONDS)
            with _environment(NCCL_VARIABLES):
                return ProcessGroupNCCL(store, self._rank, self._size, options)
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._threads = 1
        options._timeout = timedelta(seconds=FORM_SECONDS)
        return gloo(store, self._rank, self._size, options)


class Transfer:
    """One buffer being sent. A daemon thread runs it: a library call that never returns must not keep the process."""

    def __init__(self, group: Group, buffer: Tensor) -> None:
        self.error: BaseException | None = None
        self._group = group
        self._buffer = buffer
        self._done = threading.Event()

    def run(self) -> None:
        """The work of the thread."""
        try:
            self._group.transfer(self._buffer)
        except BaseException as error:  # raised by `wait`
            self.error = error
            self._group.abandon()
        finally:
            self._done.set()

    def wait(self, seconds: float, *, while_wanted: bool = False) -> None:
        """Wait until the bytes have been sent. Raises GroupError; with `while_wanted`, also as soon as another member
        has abandoned the group."""
        deadline = time.monotonic() + seconds
        while not self._done.wait(POLL_SECONDS):
            reason = None
            if while_wanted and self._group.is_abandoned():
                reason = "the sender gave the group up"
            elif time.monotonic() > deadline:
                reason = f"nothing came for {seconds:g} s"
            if reason is not None:
                self._group.abandon()
                raise GroupError(reason)
        if self.error is not None:
            raise GroupError(f"{type(self.error).__name__}: {self.error}") from self.error


@dataclass(frozen=True, kw_only=True)
class GroupSource:
    """The receiver's side of the group of one server. It can be sent to a worker process of the server."""

    backend: str
    store: str  # path of the memory file
    first_rank: int  # of this server's first receiver

    def receive(self, place: Any, num_bytes: int, *, receiver: int) -> Tensor:
        """The next bucket as `num_bytes` bytes, on the GPU with NCCL; the next call overwrites them. `place`: the
        sender's description of the group. `receiver`: the number of this process among those of the server that receive
        weights. Raises Refused."""
        import torch

        match place:
            case {"name": str(name), "size": int(size), "nccl": list() | None as theirs, "torch": str(their_torch)}:
                pass
            case _:
                raise Refused(400, f"not a group: {place!r:.200}")
        ours = nccl_version() if self.backend == "nccl" else None
        if self.backend == "nccl" and (ours is None or theirs is None or tuple(theirs) != ours):
            raise Refused(
                409,
                f"the trainer has NCCL {_dotted(theirs)} (torch {their_torch}) and this engine NCCL {_dotted(ours)} "
                f"(torch {torch.__version__}), which cannot talk to each other; install the same torch in both "
                "environments, or use engine.transport=shm or disk",
            )
        member = _members.get(self.store)
        if member is None or member.group.name != name:
            if member is not None:
                member.group.abandon()
            rank = self.first_rank + receiver
            group = Group(backend=self.backend, store=self.store, name=name, rank=rank, size=size)
            member = _members[self.store] = _Member(group=group)
        seconds = FORM_SECONDS if member.buffer is None else SEND_SECONDS
        if member.buffer is None or len(member.buffer) < num_bytes:
            member.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device())
            if self.backend == "nccl":
                torch.cuda.synchronize()  # NCCL writes on a stream of its own: nothing may still use this memory
        if num_bytes:
            try:
                member.group.start(member.buffer[:num_bytes]).wait(seconds + 5.0, while_wanted=True)
            except GroupError as error:
                raise Refused(
                    503,
                    f"no weights came over {self.backend}: {error} (trainer: torch {their_torch}, NCCL "
                    f"{_dotted(theirs)}; here: torch {torch.__version__}, NCCL {_dotted(ours)})",
                ) from error
        return member.buffer[:num_bytes]

    def _device(self) -> str:
        import torch

        return f"cuda:{torch.cuda.current_device()}" if self.backend == "nccl" else "cpu"


@dataclass(kw_only=True)
class _Member:
    group: Group
    buffer: Tensor | None = None


_members: dict[str, _Member] = {}  # of this process, by the path of their store


def _dotted(version: Any) -> str:
    return ".".join(map(str, version)) if version else "(none)"


_stores: dict[str, Any] = {}  # by path
_store_file: list[int] = []  # of this process, as the sender


def store_file() -> int:
    """The descriptor of the memory file for all groups in which this process is the sender. It stays open: a FileStore
    ends the process if its path leads to another file when it is destroyed."""
    if not _store_file:
        _store_file.append(os.memfd_create("atropos_exp-group", os.MFD_CLOEXEC))
    return _store_file[0]


def _open(path: str, name: str) -> Any:
    """The part `name` of the store in this file. It is never closed either: closing takes a lock of the file, which a
    stopped member may hold."""
    import torch.distributed as dist

    if path not in _stores:
        _stores[path] = dist.FileStore(path, -1)  # type: ignore[attr-defined]
        _stores[path].set_timeout(timedelta(seconds=FORM_SECONDS))
    return dist.PrefixStore(name, _stores[path])  # type: ignore[attr-defined]


_environment_lock = threading.Lock()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set these environment variables inside the block."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

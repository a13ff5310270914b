"""A process group of the sender of weights and of those who receive them, apart from all other groups of theirs.

It is made directly (`ProcessGroupNCCL`, or `ProcessGroupGloo` where there is no GPU), so neither the trainer's default
group nor vLLM's is touched. Its members find each other through a memory file that the servers inherit: there is no
store port that others could reach, and nothing is left behind. Gloo's sockets are on loopback, and a stranger cannot
join NCCL's without the 64 random bits of an id that is in that file only. What travels is bytes of known length.
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
LOOK_SECONDS = 0.05  # between two looks whether the group was given up
GIVEN_UP = "given_up"
# Read when a group is made. By default a group of NCCL ends its process when a peer is lost; ours is given up instead.
NCCL_VARIABLES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",  # give the communicator up, nothing more
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
}


class GroupError(RuntimeError):
    """The group did not form, or lost a member."""


def nccl_version() -> tuple[int, ...] | None:
    """Of this process: members of a group need the same. None without NCCL."""
    import torch

    if not torch.cuda.is_available():
        return None
    from torch.cuda import nccl

    return tuple(nccl.version())


class Group:
    """Rank 0 sends to all others. It forms with the first transfer; a new one takes the place of one that failed."""

    def __init__(self, *, backend: str, store: str, name: str, rank: int, size: int) -> None:
        """`store`: path of the memory file in this process. `name`: of this group among those before it."""
        self.name = name
        self._backend = backend
        self._store = store
        self._rank = rank
        self._size = size
        self._members: Any = None
        self._is_over = False
        self._threads: list[threading.Thread] = []

    def start(self, buffer: Tensor) -> Transfer:
        """Rank 0 sends the bytes, the others fill theirs with them, in a thread of its own. One at a time."""
        transfer = Transfer(self, buffer)
        self._run(transfer.run)
        return transfer

    def transfer(self, buffer: Tensor) -> None:
        """The work of that thread. Ends when the bytes are there, or raises."""
        if buffer.device.type == "cuda":
            import torch

            torch.cuda.set_device(buffer.device)
        if self._members is None:
            self._members = self._form()
        members = self._members
        if self._is_over:  # given up while it formed
            raise GroupError("the group was given up")
        work = members.broadcast(buffer, 0)  # NCCL connects here the first time
        deadline = time.monotonic() + SEND_SECONDS
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise GroupError(f"a bucket was not through after {SEND_SECONDS:g} s")
            time.sleep(0.0002)
        work.wait()  # raises what Gloo met
        if self._backend == "nccl" and hasattr(members, "get_error"):  # not in every torch
            state = members.get_error().name
            if state != "SUCCESS":
                raise GroupError(f"NCCL met {state}")

    def give_up(self) -> None:
        """Tell the others, and let go of it: a member that hangs must not hold this thread, so another does it."""
        self._is_over = True
        members, self._members = self._members, None
        self._run(self._bury, members)

    def is_given_up(self) -> bool:
        return bool(_open(self._store, f"{self.name}/flags").check([GIVEN_UP]))

    def wait_for_threads(self, seconds: float) -> None:
        """Before the process ends: Python ends threads that are still in a library by force, and so the process."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, args=arguments, name="weights", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _bury(self, members: Any) -> None:
        _open(self._store, f"{self.name}/flags").set(GIVEN_UP, "1")
        if self._backend == "nccl" and members is not None:
            with contextlib.suppress(RuntimeError):
                members.abort()
        # Gloo closes its connections with its last reference, which is ours.

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
    """One bucket on its way. A daemon thread runs it: a library that never returns must not keep the process."""

    def __init__(self, group: Group, buffer: Tensor) -> None:
        self.error: BaseException | None = None
        self._group = group
        self._buffer = buffer
        self._done = threading.Event()

    def run(self) -> None:
        try:
            self._group.transfer(self._buffer)
        except BaseException as error:  # raised by `wait`
            self.error = error
            self._group.give_up()
        finally:
            self._done.set()

    def wait(self, seconds: float, *, while_wanted: bool = False) -> None:
        """Until the bytes are through. Raises GroupError; `while_wanted`: also when another member gave up."""
        deadline = time.monotonic() + seconds
        while not self._done.wait(LOOK_SECONDS):
            reason = None
            if while_wanted and self._group.is_given_up():
                reason = "the sender gave the group up"
            elif time.monotonic() > deadline:
                reason = f"nothing came for {seconds:g} s"
            if reason is not None:
                self._group.give_up()
                raise GroupError(reason)
        if self.error is not None:
            raise GroupError(f"{type(self.error).__name__}: {self.error}") from self.error


@dataclass(frozen=True, kw_only=True)
class GroupSource:
    """What a server was told of its group. Usable in a worker process of the server, too."""

    backend: str
    store: str  # path of the memory file
    first_rank: int  # of this server's first receiver

    def receive(self, place: Any, num_bytes: int, *, receiver: int) -> Tensor:
        """The next bucket, on the GPU with NCCL. `place`: what the sender says of the group. `receiver`: number of
        this process among those of the server. The next call overwrites the bytes. Raises Refused."""
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
                member.group.give_up()
            rank = self.first_rank + receiver
            group = Group(backend=self.backend, store=self.store, name=name, rank=rank, size=size)
            member = _members[self.store] = _Member(group=group)
        seconds = FORM_SECONDS if member.buffer is None else SEND_SECONDS
        if member.buffer is None or len(member.buffer) < num_bytes:
            member.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device())
            if self.backend == "nccl":
                torch.cuda.synchronize()  # NCCL writes on a stream of its own: nobody may still use this memory
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
    """The memory file of all groups that this process sends to. It stays open: a FileStore whose path leads to another
    file when it is destroyed ends the process."""
    if not _store_file:
        _store_file.append(os.memfd_create("atropos_exp-group", os.MFD_CLOEXEC))
    return _store_file[0]


def _open(path: str, name: str) -> Any:
    """Part `name` of the store in this file. It is never closed either, for that takes a lock of the file, which a
    member that was stopped may hold."""
    import torch.distributed as dist

    if path not in _stores:
        _stores[path] = dist.FileStore(path, -1)  # type: ignore[attr-defined]
        _stores[path].set_timeout(timedelta(seconds=FORM_SECONDS))
    return dist.PrefixStore(name, _stores[path])  # type: ignore[attr-defined]


_environment_lock = threading.Lock()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """With these variables for as long as it lasts."""
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

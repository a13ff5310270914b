"""The trainer processes of one run, and how they agree. torch.distributed is imported only where there are several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from atropos_exp.errors import StopRequested, SyncError, UserError

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the trainer processes of a run.

    Every method is collective: all ranks call it, in the same order, once torch's process group exists. With one rank
    they do nothing but return.
    """

    rank: int
    world_size: int

    @staticmethod
    def of_environment() -> Ranks:
        """Return the rank that the launcher gave in RANK and WORLD_SIZE; the only one without them."""
        return Ranks(rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1")))

    @staticmethod
    def of_group() -> Ranks:
        """Return the rank in torch's process group; the only one without a group."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())

    @property
    def is_zero(self) -> bool:
        """Whether this is rank 0, which writes the run folder and talks to other programs."""
        return self.rank == 0

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        message = [value]
        dist.broadcast_object_list(message, src=0)
        return message[0]

    def on_zero(self, work: Callable[[], Value]) -> Value:
        """Run `work` on rank 0 alone; every rank gets its result, or an error that says what rank 0's was."""
        if self.world_size == 1:
            return work()
        result: tuple[bool, object] = (False, None)
        failure: Exception | StopRequested | None = None
        if self.is_zero:
            try:
                result = (True, work())
            except StopRequested as stop:
                failure = stop
            except Exception as error:
                failure = error
                result = (False, f"{type(error).__name__}: {error}")
        succeeded, value = self.broadcast(result)
        if failure is not None:
            raise failure
        if not succeeded:
            raise StopRequested if value is None else UserError(f"rank 0 failed: {value}")
        return value  # type: ignore[return-value]

    def keep_on_zero(self, make: Callable[[], Value]) -> Value | None:
        """Make something on rank 0 alone, which keeps it; None on the others. An error is raised on every rank."""
        kept: list[Value] = []
        self.on_zero(lambda: kept.append(make()))
        return kept[0] if kept else None

    @contextlib.contextmanager
    def same_outcome(self, what: str) -> Iterator[None]:
        """An error in this block is raised where it happened, and as a SyncError on every other rank:

        with ranks.same_outcome("the weight sync to version 3"):
            send(...)
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # raised again below, when the other ranks know of it
            error = raised
        if self.world_size > 1:
            import torch.distributed as dist

            told: list[str | None] = [None] * self.world_size
            dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
            if error is None:
                for rank, text in enumerate(told):
                    if text is not None:
                        raise SyncError(f"{what} failed on rank {rank}: {text}")
        if error is not None:
            raise error

    def folder_on_every_node(self, find: Callable[[], Path]) -> Path:
        """Return rank 0's `find()` on every rank; where nodes share no such folder, one rank of each node calls `find`
        too.

        Raises UserError on every rank if `find` fails on one.
        """
        folder = self.on_zero(find)
        if self.world_size == 1:
            return folder
        import torch.distributed as dist

        for only_first in (True, False):  # the others of a node then find what the first one has downloaded
            problem = ""
            if not folder.is_dir() and (os.environ.get("LOCAL_RANK", "0") == "0") is only_first:
                try:
                    folder = find()
                except Exception as error:
                    problem = f"rank {self.rank}: {type(error).__name__}: {error}"
            problems = [""] * self.world_size
            dist.all_gather_object(problems, problem)
            if any_problem := next(filter(None, problems), ""):
                raise UserError(any_problem)
        return folder

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank: all ranks stop at the same step."""
        if self.world_size == 1:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())


ALONE = Ranks(rank=0, world_size=1)

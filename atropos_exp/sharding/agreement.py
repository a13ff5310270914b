"""Agreement between ranks: if one fails, all fail together, instead of waiting for it in a collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from atropos_exp.sharding.proof import SyncError

Value = TypeVar("Value")


def num_ranks() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def same_outcome(what: str) -> Iterator[None]:
    """Collective: an error of the body is raised where it happened, and as a SyncError on every other rank."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # raised again below, when the other ranks know of it
        error = raised
    if num_ranks() > 1:
        import torch.distributed as dist

        told: list[str | None] = [None] * num_ranks()
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            for rank, text in enumerate(told):
                if text is not None:
                    raise SyncError(f"{what} failed on rank {rank}: {text}")
    if error is not None:
        raise error


def from_rank_zero(value: Value) -> Value:
    """Collective: rank 0's value on every rank."""
    if num_ranks() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]

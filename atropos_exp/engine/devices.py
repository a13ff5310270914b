"""Which GPUs an engine's servers are on, and so how weights reach them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from atropos_exp.engine.process import DEVICES_VARIABLE
from atropos_exp.types import UserError


def gpu_problems(
    gpus: Sequence[int] | None, *, tensor_parallel_size: int, data_parallel_size: int, device: str
) -> list[str]:
    """What does not fit between the GPUs that are named and those that are needed."""
    problems = []
    if gpus is not None and device == "cpu":
        problems.append(f"engine.gpus is {list(gpus)}, but device is cpu; use engine.gpus=null")
    needed = tensor_parallel_size * data_parallel_size
    if gpus is not None and len(gpus) != needed:
        product = "engine.tensor_parallel_size is"
        if data_parallel_size > 1:
            product = "engine.data_parallel_size × engine.tensor_parallel_size is"
        problems.append(f"engine.gpus names {len(gpus)} GPUs, but {product} {needed}; make them equal")
    return problems


def transport_problems(transport: str, gpus: Sequence[int] | None, *, device: str) -> list[str]:
    """What cannot be, whatever the machine."""
    if transport == "cuda_ipc" and (device == "cpu" or gpus is not None):
        return [
            "engine.transport is cuda_ipc, which hands weights over on the GPU that trainer and engine share; "
            "use engine.transport=auto"
        ]
    if transport == "nccl" and device == "cpu":
        return ["engine.transport is nccl, which sends weights from GPU to GPU, but device is cpu; use gloo or shm"]
    return []


def choose_transport(transport: str, gpus: Sequence[int] | None, *, device: str) -> str:
    """`auto` resolved. Raises UserError for one that needs the engine on other GPUs where it is not."""
    on_gpu = device.startswith("cuda")
    others = _own(gpus) or []
    if transport == "nccl" and (not on_gpu or not others or _name(device) in others):
        raise UserError(
            "engine.transport is nccl, which sends weights to other GPUs than the trainer's, but the engine has "
            f"{'none of its own' if not others else 'GPU ' + _name(device) + ', where the trainer is'}; name others "
            "in engine.gpus, or use engine.transport=auto"
        )
    if transport != "auto":
        return transport
    if not on_gpu or _name(device) in others:
        return "shm"  # NCCL takes a GPU once, and not every server is on the trainer's
    return "nccl" if others else "cuda_ipc"


def _own(gpus: Sequence[int] | None) -> list[str] | None:
    """The engine's own GPUs: those that a launcher keeps for it, else `gpus`."""
    if kept := os.environ.get(DEVICES_VARIABLE):
        return kept.split(",")
    return None if gpus is None else [str(gpu) for gpu in gpus]


def _name(device: str) -> str:
    """Of the trainer's GPU, as engine.gpus would name it."""
    number = int(device.partition(":")[2] or 0)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number] if number < len(visible) else str(number)


def visible_devices(
    gpus: Sequence[int] | None, *, tensor_parallel_size: int, data_parallel_size: int, device: str
) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server; None: as in this process. What a launcher keeps for engines comes first.
    Raises UserError."""
    if not device.startswith("cuda"):
        return [None] * data_parallel_size
    names = _own(gpus)
    needed = tensor_parallel_size * data_parallel_size
    if names is None:
        if data_parallel_size > 1:
            raise UserError(
                f"engine.data_parallel_size is {data_parallel_size}, but engine.gpus names no GPUs, of which each "
                f"server needs {tensor_parallel_size} of its own; name {needed}"
            )
        return [None]
    if len(names) != needed:
        raise UserError(
            f"the engine has the GPUs {', '.join(names)}, but engine.data_parallel_size × engine.tensor_parallel_size "
            f"is {needed}; make them equal"
        )
    size = tensor_parallel_size
    return [",".join(names[server * size : (server + 1) * size]) for server in range(data_parallel_size)]

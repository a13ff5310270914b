"""Which GPUs an engine's servers are on, and so how weights reach them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from atropos_exp.engine.mixed_transport import MIXED
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


def transport_problems(transport: str, *, device: str) -> list[str]:
    """What cannot be, whatever the machine."""
    if transport == "cuda_ipc" and device == "cpu":
        return [
            "engine.transport is cuda_ipc, which hands weights over on the GPU that trainer and engine share, but "
            "device is cpu; use engine.transport=auto"
        ]
    if transport in ("nccl", "cuda_ipc+nccl") and device == "cpu":
        return [
            f"engine.transport is {transport}, which sends weights from GPU to GPU, but device is cpu; use gloo or shm"
        ]
    return []


def near_servers(servers: Sequence[str | None], *, device: str) -> list[int]:
    """Those that have the trainer's GPU and no other. On a CPU the first one stands for them, so that a mixed transport
    can be tried there. `servers`: as `visible_devices` has them."""
    if not device.startswith("cuda"):
        return [0]
    return [number for number, names in enumerate(servers) if names is None or names == _name(device)]


def choose_transport(transport: str, servers: Sequence[str | None], *, device: str) -> str:
    """`auto` resolved for servers as `visible_devices` has them. Raises UserError for one that does not suit them."""
    on_gpu = device.startswith("cuda")
    shared = [number for number, names in enumerate(servers) if names is None or _name(device) in names.split(",")]
    if transport == "nccl" and (not on_gpu or shared):
        what = "none of its own" if None in servers else f"GPU {_name(device)}, where the trainer is"
        raise UserError(
            "engine.transport is nccl, which sends weights to other GPUs than the trainer's, but the engine has "
            f"{what}; name others in engine.gpus, or use engine.transport=auto"
        )
    near = near_servers(servers, device=device)
    if transport == "cuda_ipc" and len(near) < len(servers):
        raise UserError(
            "engine.transport is cuda_ipc, which hands weights over on the GPU that trainer and engine share, but the "
            f"trainer is on GPU {_name(device)} and the engine's servers on {' and '.join(map(str, servers))}; use "
            "engine.transport=auto"
        )
    if transport in MIXED and (not 0 < len(near) < len(servers) or (on_gpu and shared != near)):
        raise UserError(
            f"engine.transport is {transport}, for an engine with a server on the trainer's own GPU alone and "
            "others elsewhere, but it has none such; use engine.transport=auto"
        )
    if transport != "auto":
        return transport
    if not on_gpu or shared != near:
        return "shm"  # NCCL takes a GPU once, and a server has the trainer's among others
    if not near:
        return "nccl"
    return "cuda_ipc" if len(near) == len(servers) else "cuda_ipc+nccl"


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

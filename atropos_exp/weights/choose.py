"""TODO."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.errors import UserError
from atropos_exp.weights.cuda import CudaTransport
from atropos_exp.weights.disk import DiskTransport
from atropos_exp.weights.group import BACKENDS
from atropos_exp.weights.group_transport import GroupTransport
from atropos_exp.weights.mixed_transport import MIXED, MixedTransport
from atropos_exp.weights.shm import ShmTransport
from atropos_exp.weights.transport import Transport

if TYPE_CHECKING:
    pass


TRANSPORTS = ("shm", "disk", "cuda_ipc", "nccl", "gloo", *MIXED)


def is_transport(name: str) -> bool:
    """Whether `make_transport` knows it: one of the built-in ones, or a class of this folder by its full name."""
    return name in TRANSPORTS or (name.startswith(f"{__package__}.") and name.count(".") == 3)


def make_transport(
    name: str,
    log_folder: Path,
    *,
    num_servers: int = 1,
    receivers_per_server: int = 1,
    near: Collection[int] = (),
) -> Transport:
    """shm | disk | cuda_ipc | nccl | gloo, two of them joined by + (see `MIXED`), or a class of a file of this folder,
    made with the log folder. Raises UserError. `receivers_per_server`: processes of each server that receive weights.
    `near`: the servers that the first of two serves."""
    if name in MIXED:
        first, second = name.split("+")
        others = GroupTransport(second, num_servers=num_servers - len(near), receivers_per_server=receivers_per_server)
        return MixedTransport(make_transport(first, log_folder), others, near=near)
    if name in BACKENDS:
        return GroupTransport(name, num_servers=num_servers, receivers_per_server=receivers_per_server)
    if name == "cuda_ipc":
        return CudaTransport()
    if name == "shm":
        return ShmTransport()
    if name == "disk":
        return DiskTransport(log_folder)
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"engine.transport: got {name}, but there is no such class ({error})") from None
    transport: Transport = cls(log_folder)
    return transport


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


def _name(device: str) -> str:
    """Of the trainer's GPU, as engine.gpus would name it."""
    number = int(device.partition(":")[2] or 0)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number] if number < len(visible) else str(number)

"""Which transport carries the weights: the names that `engine.transport` knows, and which one suits which GPUs."""

import importlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.weights.group import BACKENDS
from atropos_exp.weights.group_transport import GroupTransport
from atropos_exp.weights.mixed_transport import MIXED, MixedTransport
from atropos_exp.weights.transport import Transport

TRANSPORTS = {
    "shm": "atropos_exp.weights.shm.ShmTransport",
    "disk": "atropos_exp.weights.disk.DiskTransport",
    "cuda_ipc": "atropos_exp.weights.cuda.CudaTransport",
    "nccl": "atropos_exp.weights.group_transport.GroupTransport",
    "gloo": "atropos_exp.weights.group_transport.GroupTransport",
    "cuda_ipc+nccl": "atropos_exp.weights.mixed_transport.MixedTransport",
    "shm+gloo": "atropos_exp.weights.mixed_transport.MixedTransport",
}
_OWN_CLASS = re.compile(r"atropos_exp(\.[A-Za-z_]\w*){2,}")


def is_transport(name: str) -> bool:
    """Whether `make_transport` takes the name: one of `TRANSPORTS`, or the full name of a class inside this package,
    such as "atropos_exp.weights.ram_disk.RamDisk". Imports nothing, so there may be no such class."""
    return name in TRANSPORTS or _OWN_CLASS.fullmatch(name) is not None


def make_transport(
    name: str,
    log_folder: Path,
    *,
    num_servers: int = 1,
    receivers_per_server: int = 1,
    near: Collection[int] = (),
) -> Transport:
    """The transport with this name, for all servers of an engine. Raises UserError if there is none.

        make_transport("nccl", Path("log"), num_servers=2)
        make_transport("atropos_exp.weights.ram_disk.RamDisk", Path("log"))

    A transport of one's own is a class inside this package that satisfies `Transport`; it is named in full and
    constructed with `log_folder`. `receivers_per_server`: processes of each server that receive weights. `near`: the
    numbers of the servers that the first half of a mixed transport serves.
    """
    if name in MIXED:
        first, second = name.split("+")
        others = GroupTransport(second, num_servers=num_servers - len(near), receivers_per_server=receivers_per_server)
        return MixedTransport(make_transport(first, log_folder), others, near=near)
    if name in BACKENDS:
        return GroupTransport(name, num_servers=num_servers, receivers_per_server=receivers_per_server)
    module, _, attribute = TRANSPORTS.get(name, name).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"engine.transport: got {name}, but there is no such class ({error})") from None
    transport: Transport = cls(log_folder)
    return transport


def transport_problems(transport: str, *, device: str) -> list[str]:
    """Why this transport cannot work on this device, whatever the machine; one sentence each."""
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
    """The numbers of the servers that have the trainer's GPU and no other. `servers`: the CUDA_VISIBLE_DEVICES of each,
    None where it is the trainer's. On a CPU the first server stands for them, so that a mixed transport can be tried
    there."""
    if not device.startswith("cuda"):
        return [0]
    return [number for number, names in enumerate(servers) if names is None or names == _name(device)]


def choose_transport(transport: str, servers: Sequence[str | None], *, device: str) -> str:
    """The transport to use: `auto` resolved, any other name checked. `servers`: the CUDA_VISIBLE_DEVICES of each, None
    where it is the trainer's. Raises UserError for a transport that does not suit them.

        choose_transport("auto", ["1", "2"], device="cuda:0")  # "nccl"
    """
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
    """The trainer's GPU as engine.gpus would name it."""
    number = int(device.partition(":")[2] or 0)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number] if number < len(visible) else str(number)

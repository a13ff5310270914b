"""Joining the ranks (one process per device, started by python, torchrun or srun), and collectives over them."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from atropos_exp.errors import UserError


def join_process_group(device: str, *, timeout_s: float) -> torch.device:
    """Join the ranks that the environment variables name, or be the only one. Return this rank's device.

    A process group that already exists is used as it is. CPU tensors always travel over gloo, CUDA tensors over NCCL.
    Raises UserError if `device` cannot be used.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but torch sees no GPU. Choose device=cpu or install a CUDA build of torch.")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        # A launcher may show each rank all devices of the machine, or only its own.
        torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else local)
    elif device != "cpu":
        raise UserError(f"device must be cpu or cuda; got {device!r}")
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
                _keep_to_loopback()
            dist.init_process_group(backend, timeout=timeout)
        else:
            _keep_to_loopback()
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def _keep_to_loopback() -> None:
    """On one machine gloo needs no other interface than the loopback."""
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place; every rank gets the same bits. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The maximum over all ranks, in place. Collective."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values

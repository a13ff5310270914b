"""The random streams (torch, NumPy, Python) of all ranks as tensors, for checkpoints."""

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """The state of this process's random streams, by name."""
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, gauss = legacy
    version, internal, python_gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
    return {
        "torch_cpu": torch.get_rng_state(),
        "torch_cuda": cuda,
        "numpy_state": torch.tensor([position, has_gauss, *keys.tolist()]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python_state": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor([math.nan if python_gauss is None else python_gauss], dtype=torch.float64),
    }


def gather() -> dict[str, Tensor]:
    """The state of each stream for all ranks, [ranks, ...]. Collective."""
    streams = {}
    for key, mine in capture().items():
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        streams[key] = torch.stack(everyone)
    return streams


def restore(streams: Mapping[str, Tensor]) -> None:
    """Set this rank's streams. If fewer ranks were saved, rank r continues those of rank r modulo their number."""
    mine: dict[str, Any] = {key: values[dist.get_rank() % len(values)] for key, values in streams.items()}
    torch.set_rng_state(mine["torch_cpu"].contiguous())
    if torch.cuda.is_available() and mine["torch_cuda"].numel():
        torch.cuda.set_rng_state(mine["torch_cuda"].contiguous())
    position, has_gauss, *keys = mine["numpy_state"].tolist()
    gauss = mine["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, *internal = mine["python_state"].tolist()
    python_gauss = mine["python_gauss"].item()
    random.setstate((version, tuple(internal), None if math.isnan(python_gauss) else python_gauss))

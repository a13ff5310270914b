"""Which GPUs each of an engine's servers gets."""

import os
from collections.abc import Sequence

from atropos_exp.errors import UserError
from atropos_exp.processes.child import ENGINE_DEVICES


def gpu_problems(
    gpus: Sequence[int] | None, *, tensor_parallel_size: int, data_parallel_size: int, device: str
) -> list[str]:
    """Why the named GPUs are not those that are needed: one sentence each. `gpus`: of all servers, or None."""
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


def visible_devices(
    gpus: Sequence[int] | None, *, tensor_parallel_size: int, data_parallel_size: int, device: str
) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server; None where it is this process's. GPUs that a launcher keeps for the engine
    take precedence over `gpus`. Raises UserError if there are too few or too many.

        visible_devices([1, 3, 4, 6], tensor_parallel_size=2, data_parallel_size=2, device="cuda")  # ["1,3", "4,6"]
    """
    if not device.startswith("cuda"):
        return [None] * data_parallel_size
    kept = os.environ.get(ENGINE_DEVICES)
    names = kept.split(",") if kept else [str(gpu) for gpu in gpus or ()]
    needed = tensor_parallel_size * data_parallel_size
    if not kept and gpus is None:
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
    return [",".join(names[first : first + tensor_parallel_size]) for first in range(0, needed, tensor_parallel_size)]

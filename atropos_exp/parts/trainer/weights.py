"""Full tensors from sharded parameters, one at a time, and back."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from atropos_exp.parts.trainer.adapters import Adaptation, adaptations, plain_name
from atropos_exp.weights.tensors import LORA_A, LORA_B, is_adapter


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters (tied ones once) and the buffers that belong in a checkpoint, by name, sharded as they are."""
    parameters = dict(module.named_parameters())
    every_name = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict(keep_vars=True).items() if name not in every_name}
    return {**parameters, **buffers}


@torch.no_grad()
def gather(tensor: Tensor, device: torch.device) -> Tensor:
    """The full tensor on every rank. It may be the weight itself, so callers must not change it. Collective."""
    if isinstance(tensor, DTensor) and tensor.device_mesh.size() == 1:  # DTensor operations cost more than the copy
        return tensor.to_local().detach().to(device)
    on_device = tensor.detach().to(device)
    return on_device.full_tensor() if isinstance(on_device, DTensor) else on_device


@torch.no_grad()
def scatter(full: Tensor, into: Tensor) -> None:
    """Copy this rank's part of `full`, which every rank holds, into a sharded or plain tensor."""
    if isinstance(into, DTensor):
        part = distribute_tensor(full, into.device_mesh, into.placements, src_data_rank=None)
        into.to_local().copy_(part.to_local())
    else:
        into.copy_(full)


def full_parameters(module: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, float32 tensor) of the whole model: on rank 0 the tensors, on other ranks empty ones.

    LoRA is merged, W + scaling * B @ A, into a copy. At most one gathered tensor (three with LoRA) is alive here.
    """
    wanted = dist.get_rank() == 0
    nothing = torch.empty(0, device=device)
    adapted = {adaptation.weight: (layer, adaptation) for layer, adaptation in adaptations(module).items()}
    for name, tensor in named_tensors(module).items():
        if is_adapter(name):
            continue
        full = gather(tensor, device)
        if (own := plain_name(name)) in adapted:
            layer, adaptation = adapted[own]
            full = _merged(full, module.get_submodule(layer), adaptation, device)
        yield own, _as_sent(full) if wanted else nothing


@torch.no_grad()
def adapter_parameters(module: nn.Module, device: torch.device, *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of LoRA's matrices, B multiplied by its scaling, and of the frozen base `with_base`:
    on rank 0 the tensors, on other ranks empty ones. At most one gathered tensor is alive here."""
    wanted = dist.get_rank() == 0
    nothing = torch.empty(0, device=device)
    adapted = adaptations(module)
    for name, tensor in named_tensors(module).items():
        owner, _, matrix = name.partition(".lora_")  # matrix: "B.default.weight"; "" of a tensor of the base
        if not (matrix or with_base):
            continue
        full = gather(tensor, device)
        if matrix.startswith("B."):
            full = full.float() * adapted[owner].scaling
        ending = {"A": LORA_A, "B": LORA_B, "": ""}[matrix[:1]]
        yield plain_name(owner) + ending, _as_sent(full) if wanted else nothing


@torch.no_grad()
def _merged(weight: Tensor, layer: nn.Module, adaptation: Adaptation, device: torch.device) -> Tensor:
    matrices = dict(layer.named_parameters())
    (low,) = (tensor for name, tensor in matrices.items() if name.startswith("lora_A."))
    (high,) = (tensor for name, tensor in matrices.items() if name.startswith("lora_B."))
    return weight.float() + adaptation.delta(gather(low, device).float(), gather(high, device).float())


def _as_sent(tensor: Tensor) -> Tensor:
    """float32, unless it holds whole numbers."""
    return tensor.float() if tensor.is_floating_point() else tensor

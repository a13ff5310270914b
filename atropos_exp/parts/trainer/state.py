"""Checkpoints of the trainer: safetensors and JSON only, independent of the number of ranks.

    model*.safetensors      float32 master weights under transformers' names, with an index as it writes it
    adapter*.safetensors    LoRA matrices, if any (the model is then the frozen base)
    optimizer*.safetensors  exp_avg/<name>, exp_avg_sq/<name>, step/<name>
    random.safetensors      random streams of every rank
    trainer.json            counters, LoRA's rank and alpha, what adapters do to which weights, and how transformers
                            made the model's tensors of those in its files (for `export`)

Rank 0 alone touches the folder. Tensors travel one by one, in files of bounded size.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer import random_state, weights
from atropos_exp.parts.trainer.adapters import adaptations, plain_name
from atropos_exp.parts.trainer.hub_names import describe
from atropos_exp.parts.trainer.tensor_files import TensorReader, TensorWriter, read_shapes
from atropos_exp.parts.trainer.verl_backend import PackedBackend
from atropos_exp.processes.ranks import Ranks
from atropos_exp.weights.tensors import is_adapter

STEMS = ("model", "adapter", "optimizer")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A tensor of the trainer and where it is stored: under `key`, in the files that begin with `stem`."""

    stem: str
    key: str
    tensor: Tensor  # sharded or plain


def save(folder: Path, backend: PackedBackend, counters: Mapping[str, int], device: torch.device) -> None:
    """Write everything that `load` needs into `folder`, which is created if missing. Collective."""
    writes = dist.get_rank() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    slots = _slots(backend)
    for stem in STEMS:
        chosen = [slot for slot in slots if slot.stem == stem]
        writer = TensorWriter(folder, stem, {slot.key: slot.tensor.nbytes for slot in chosen}) if writes else None
        for slot in chosen:
            full = weights.gather(slot.tensor, device)
            if writer is not None:
                writer.add(slot.key, full)
    streams = random_state.gather()
    if writes:
        from safetensors.torch import save_file

        save_file(streams, folder / "random.safetensors")
        facts = {
            "counters": dict(counters),
            "lora": backend.lora_facts,
            "adapted": {layer: asdict(adaptation) for layer, adaptation in adaptations(backend.module).items()},
            "conversions": describe(backend.plain_model),
        }
        (folder / "trainer.json").write_text(json.dumps(facts, indent=1) + "\n")
    dist.barrier()


def load(folder: Path, backend: PackedBackend, device: torch.device) -> dict[str, int]:
    """Restore weights, moments and random streams in place and return the counters. Collective.

    Raises UserError if the checkpoint is damaged or belongs to another model."""
    ranks = Ranks.of_group()
    stored = ranks.broadcast(_describe(folder) if ranks.is_zero else {})
    if error := stored.get("error"):
        raise UserError(error)
    if stored["lora"] != backend.lora_facts:
        raise UserError(
            f"{folder} was trained with model.lora {stored['lora']}, this run has {backend.lora_facts}. "
            "Resume with the same, or start a new run."
        )
    shapes: dict[str, dict[str, list[int]]] = stored["shapes"]
    backend.make_optimizer_state([key.removeprefix("step/") for key in shapes["optimizer"] if key.startswith("step/")])
    slots = _slots(backend)
    _require_same(folder, slots, shapes)
    for stem in STEMS:
        reader = TensorReader(folder, stem) if ranks.is_zero else None
        for slot in slots:
            if slot.stem == stem:
                weights.scatter(_from_rank_zero(reader, slot, device), slot.tensor)
    random_state.restore(stored["random"])
    dist.barrier()
    return {name: int(value) for name, value in stored["counters"].items()}


def _slots(backend: PackedBackend) -> list[Slot]:
    slots = []
    for name, tensor in weights.named_tensors(backend.module).items():
        if is_adapter(name):
            slots.append(Slot(stem="adapter", key=name, tensor=tensor))
        else:
            slots.append(Slot(stem="model", key=plain_name(name), tensor=tensor))
    for name, moments in backend.optimizer_state().items():
        slots += [Slot(stem="optimizer", key=f"{kind}/{name}", tensor=moments[kind]) for kind in MOMENTS]
    return slots


def _describe(folder: Path) -> dict[str, Any]:
    """What `folder` stores besides weights and moments, or what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    try:
        facts: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
        facts["shapes"] = {stem: read_shapes(folder, stem) for stem in STEMS}
        facts["random"] = load_bytes((folder / "random.safetensors").read_bytes())
        return facts
    except FileNotFoundError as error:
        return {"error": f"{folder} is not a complete checkpoint of the trainer: {error.filename} is missing"}
    except (OSError, ValueError, SafetensorError) as error:
        return {"error": f"{folder}: the checkpoint of the trainer is damaged: {type(error).__name__}: {error}"}


def _require_same(folder: Path, slots: list[Slot], shapes: Mapping[str, Mapping[str, list[int]]]) -> None:
    ours = {f"{slot.stem}: {slot.key}": list(slot.tensor.shape) for slot in slots}
    theirs = {f"{stem}: {key}": shape for stem in STEMS for key, shape in shapes[stem].items()}
    if ours == theirs:
        return
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    first = different[0]
    raise UserError(
        f"{folder} does not fit this model: {len(different)} tensors differ. First {first}: shape "
        f"{theirs.get(first, 'absent')} in the checkpoint, {ours.get(first, 'absent')} expected. "
        "Resume with the model that wrote it, or start a new run."
    )


def _from_rank_zero(reader: TensorReader | None, slot: Slot, device: torch.device) -> Tensor:
    """The full tensor that `slot` stores, on every rank. Collective."""
    if reader is not None:
        full = reader.get(slot.key).to(device, slot.tensor.dtype)
    else:
        full = torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype, device=device)
    if dist.get_world_size() > 1:
        dist.broadcast(full, src=0)
    return full
